"""GPTQ folders in GPTQModel and transformers, and a checkpoint that GPTQModel packed, in our reader."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import gptq, huggingface, load
from qalora.converters.plan import ExportOptions
from qalora.formats.share import Share
from qalora.residual import to_residual
from qalora.tensor import GroupQuantTensor
from qalora.testing import random_adapter, random_model

pytestmark = [
    pytest.mark.slow,
    # transformers says so whenever a backend is asked for; the arguments that are ignored are those of the folder
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    # GPTQModel keeps a temporary folder for offloading until its config is collected
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    # PEFT's loader finds the LoRA that transformers' has loaded, and replaces it
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    # optimum asks every attribute of a transformers model for its value
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOKENS = torch.arange(3, 35)[None]


def quantized(source: Path, **options) -> Checkpoint:
    return random_model(huggingface.read(source), change=tamed, **options)


def tamed(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """A quarter of the scale: random codes give weights so large that the logits say nothing."""
    return replace(tensor, scale=tensor.scale / 4, min=tensor.min / 4)


def written(model: Checkpoint, folder: Path, **options) -> Path:
    plan = gptq.plan(model, ExportOptions(**options))
    plan.check(options.get("allow_loss", ()))
    folder.mkdir()
    gptq.write(plan, model, folder, lambda name, nbytes: None, Share())
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # GPTQModel compiles its dequantizer: minutes
        return model(TOKENS).logits.double()


def opened(folder: Path, bits: int, *, again: bool = True):
    """The folder in float32 with GPTQModel's torch kernel.

    One transformers call holds the LoRA in float16, the dtype of the words' scales; PEFT's own loader, called after it
    (`again`), puts the same LoRA in its place in float32.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPTQConfig

    config = GPTQConfig(bits=bits, backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return PeftModel.from_pretrained(model, folder) if again and (folder / "adapter_config.json").exists() else model


def reference(source: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Logits of the float model with other linear weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    return logits(model)


def kernel_weights(model: Checkpoint, zeros: str | None) -> dict[str, torch.Tensor]:
    """The weights in float64 as the kernel has them: scale * (code - z) rounded to float16, plus C exactly."""
    weights = {}
    for name in model.linears:
        tensor = model.tensors[name].load_quantized()
        index = torch.arange(tensor.shape[1]) // tensor.group_size if tensor.g_idx is None else tensor.g_idx.long()
        if zeros is None:
            weights[name] = tensor.dequantize().half().double()
        else:
            left = to_residual(tensor, zeros)
            steps = tensor.codes().double() - left.zero.double()[:, index]
            weights[name] = (tensor.scale.double()[:, index] * steps).half().double() + left.c.double()[:, index]
    return weights


def without_residual(model: Checkpoint, zeros: str) -> dict[str, torch.Tensor]:
    weights = kernel_weights(model, zeros)
    for name in model.linears:
        tensor = model.tensors[name].load_quantized()
        weights[name] = weights[name] - to_residual(tensor, zeros).c.double().repeat_interleave(32, dim=1)
    return weights


def assert_only_the_kernels_rounding(got: torch.Tensor, source: Path, weights: dict[str, torch.Tensor]) -> None:
    """Equal to the model with the kernel's weights, but for float32's own noise.

    That noise is measured: the same weights in float32 against float64. The loaded model sums in another order (the
    residual apart), so its noise is of the same size; 8 times leaves room.
    """
    exact = reference(source, weights, torch.float64)
    noise = (reference(source, weights, torch.float32) - exact).abs().max()
    assert noise < 1e-4 * exact.abs().max()
    assert (got - exact).abs().max() <= 8 * noise


@pytest.mark.parametrize(
    ("bits", "form", "zeros"),
    [
        (2, "auto", "symmetric"),
        (3, "auto", "symmetric"),
        (4, "auto", "symmetric"),
        (8, "auto", "symmetric"),
        (4, "nearest", "nearest"),
    ],
)
def test_one_transformers_call_loads_words_and_residual(
    tiny_untied: Path, tmp_path: Path, bits: int, form: str, zeros: str
) -> None:
    model = quantized(tiny_untied, bits=bits)
    weights = kernel_weights(model, zeros)
    got = logits(opened(written(model, tmp_path / "gptq", gptq_form=form), bits))
    assert_only_the_kernels_rounding(got, tiny_untied, weights)
    # and without the residual they are far off, so that its absence would be seen
    bare = reference(tiny_untied, without_residual(model, zeros), torch.float64)
    assert (got - bare).norm() > 100 * (got - reference(tiny_untied, weights, torch.float64)).norm()


def test_gptqmodels_own_loader_takes_the_residual(tiny_untied: Path, tmp_path: Path) -> None:
    """GPTQModel reads A and B by itself and adds (x @ A) @ B in float16: pool(x), C and the sum are each rounded."""
    from gptqmodel.adapter.adapter import Lora

    model = quantized(tiny_untied)
    folder = written(model, tmp_path / "gptq")
    name = "model.layers.0.mlp.down_proj"
    lora = Lora(rank=None, path=str(folder))
    lora.post_init(name, device=torch.device("cpu"))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).half()
    c = to_residual(model.tensors[f"{name}.weight"].load_quantized(), "symmetric").c.double()
    pooled = x.double().view(3, -1, 32).sum(dim=2)
    got = lora.apply(x=x, out=torch.zeros(3, c.shape[0], dtype=torch.float16)).double()
    bound = 2.0**-11 * 3 * (pooled.abs() @ c.abs().T)  # of pool(x), of C, of the sum
    assert bool(((got - pooled @ c.T).abs() <= bound).all()) and bool((got != 0).any())


def test_one_transformers_call_keeps_the_residual_in_float16(tiny_untied: Path, tmp_path: Path) -> None:
    """x, pool(x), C and the product are each rounded to float16: four times 2^-11 of what the residual adds."""
    model = quantized(tiny_untied)
    got = logits(opened(written(model, tmp_path / "gptq"), 4, again=False))
    exact = reference(tiny_untied, kernel_weights(model, "symmetric"), torch.float64)
    added = exact - reference(tiny_untied, without_residual(model, "symmetric"), torch.float64)
    assert 0 < (got - exact).norm() <= 4 * 2.0**-11 * added.norm()


@pytest.mark.parametrize(("bits", "zeros"), [(3, "integer"), (4, "integer"), (4, "symmetric"), (8, "integer")])
def test_transformers_reads_own_zeros(tiny_untied: Path, tmp_path: Path, bits: int, zeros: str) -> None:
    model = quantized(tiny_untied, bits=bits, zeros=zeros)
    got = logits(opened(written(model, tmp_path / "gptq"), bits))
    assert_only_the_kernels_rounding(got, tiny_untied, kernel_weights(model, None))


def test_transformers_reads_act_order_with_a_residual(tiny_untied: Path, tmp_path: Path) -> None:
    def shuffled(tensor: GroupQuantTensor) -> GroupQuantTensor:
        order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(0))
        return replace(tamed(tensor), g_idx=(order // tensor.group_size).int())

    model = random_model(huggingface.read(tiny_untied), change=shuffled)
    got = logits(opened(written(model, tmp_path / "gptq"), 4))
    assert_only_the_kernels_rounding(got, tiny_untied, kernel_weights(model, "symmetric"))


def test_transformers_loads_the_base_and_the_adapter_beside_it(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, zeros="integer")
    adapter = random_adapter(model, rank=(3, 4), seed=1, a_size=0.1, b_size=0.1, minima=None, scaling=2.0, factor=0.5)
    weights = kernel_weights(model, None)
    for module, layer in adapter.layers.items():
        change = 0.5 * (layer.b.double() @ layer.a.double())
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + change.repeat_interleave(32, dim=1)
    got = logits(opened(written(model, tmp_path / "gptq", adapter=adapter), 4))
    assert_only_the_kernels_rounding(got, tiny_untied, weights)
    bare = reference(tiny_untied, kernel_weights(model, None), torch.float64)
    assert (got - bare).norm() > 100 * (got - reference(tiny_untied, weights, torch.float64)).norm()


@pytest.mark.parametrize(("bits", "zeros"), [(2, "integer"), (3, "symmetric"), (4, "integer"), (8, "integer")])
def test_gptqmodel_loads_own_zeros(tiny: Path, tmp_path: Path, bits: int, zeros: str) -> None:
    """Every layer as GPTQModel dequantizes it: our weight, rounded once to float16."""
    from gptqmodel import BACKEND, GPTQModel

    model = quantized(tiny, bits=bits, zeros=zeros)
    folder = written(model, tmp_path / "gptq")
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    for name in model.linears:
        module = loaded.model.get_submodule(name.removesuffix(".weight"))
        expected = model.tensors[name].load_quantized().dequantize().half()
        assert torch.equal(type(module).dequantize_weight(module).T, expected), name  # the method, not compiled


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_checkpoint_packed_by_gptqmodel_is_read(
    tiny_untied: Path, tmp_path: Path, packed_by_gptqmodel, bits: int, sym: bool, version: str
) -> None:
    """Weights in GPTQModel's words, and its own conversion to v1 (zero points of 0 too), against its dequantizer."""
    source = random_model(huggingface.read(tiny_untied), bits=bits, zeros="symmetric" if sym else "integer")
    folder, expected = packed_by_gptqmodel(source, tmp_path / "gptq", sym=sym, version=version)
    model = load(folder)
    assert [f"label says: {version}" in note for note in model.notes] == ([] if sym else [True])
    for name, weight in expected.items():
        assert torch.equal(model.tensors[name].load_float().half(), weight), name
