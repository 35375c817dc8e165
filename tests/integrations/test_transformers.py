"""Our own folder through transformers' from_pretrained and save_pretrained, and PEFT beside it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forks import Forks
from qalora.adapter import to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.errors import FormatError, InputError
from qalora.inspection import AdapterReport, inspect
from qalora.integrations.layers import QuantizedEmbedding, QuantizedLinear, TiedHead
from qalora.parity.reference import Forward, Reference
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.tensor import GroupQuantTensor
from qalora.testing import (
    assert_same_model,
    lazily,
    random_adapter,
    random_model,
    random_tensor,
    tiny_llama,
    tiny_model,
)

TOKENS = [(7 * n) % 200 for n in range(40)]
EMBEDDING = "model.embed_tokens.weight"


def written(model: Checkpoint, folder: Path) -> Path:
    export(model, ["qalora"], folder)
    return folder / "qalora"


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = module(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return found


def ours(folder: Path) -> torch.Tensor:
    return open_runtime("torch", folder).logits(TOKENS)


def shuffled(tensor: GroupQuantTensor) -> GroupQuantTensor:
    order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(0))
    return replace(tensor, g_idx=(order // tensor.group_size).int())


def with_quantized_embedding(model: Checkpoint) -> Checkpoint:
    """As SmolLM2's GGUF file has it: 8 bits, the middle zero point, tied to the output or not."""
    rows, columns = model.tensors[EMBEDDING].shape
    table = random_tensor(rows, columns, bits=8, group_size=32, seed=5)
    table = replace(table, scale=table.scale * 0.01, min=-table.scale * 0.01 * 128)
    made = lazily(EMBEDDING, table, zeros="integer", scale_dtype=torch.float32, min_dtype=torch.float32)
    return replace(model, tensors={**model.tensors, EMBEDDING: made})


# ---- the registry


@pytest.mark.parametrize(
    "imports",
    [
        "import qalora, transformers",
        "import transformers, qalora",
        "import transformers.quantizers.auto, qalora",
        "import qalora, transformers.quantizers.auto; import qalora.integrations.hook as h; h.install()",
        "import warnings; warnings.simplefilter('error', RuntimeWarning); import qalora.integrations.transformers",
    ],
)
def test_either_may_be_imported_first(light_forks: Forks, imports: str) -> None:
    script = f"""import sys, inspect
assert sys.modules.keys().isdisjoint({{"qalora", "transformers"}})
{imports}
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["qalora"].__name__ == "QaloraQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qalora"].__name__ == "QaloraConfig"
assert not [f for f in sys.meta_path if type(f).__module__.startswith("qalora")]
assert type(auto.__spec__.loader).__module__.startswith("_frozen"), auto.__spec__.loader
assert "register_quantizer" in inspect.getsource(auto)
"""
    done = light_forks.run("-c", script)
    assert done.returncode == 0, done.stderr


def test_a_transformers_without_the_registry_is_a_warning(light_forks: Forks, tmp_path: Path) -> None:
    """Another package of that name, whose registry has nothing to register with."""
    place = tmp_path / "transformers" / "quantizers"
    place.mkdir(parents=True)
    for file in (place.parent / "__init__.py", place / "__init__.py", place / "auto.py"):
        file.write_text("", encoding="utf-8")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import qalora, transformers.quantizers.auto"
    done = light_forks.run("-c", script)
    assert done.returncode == 0
    assert "this transformers does not open qalora folders" in done.stderr


# ---- loading


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({"bits": 3, "zeros": "integer"}, {}),
        ({"zeros": "symmetric", "group_size": None}, {"tie_word_embeddings": False}),
        ({"bits": 8, "group_size": 16}, {"attention_bias": True}),
        ({"bits": 5, "min_dtype": torch.float32}, {"num_key_value_heads": 1}),
        ({"bits": 6, "change": shuffled}, {}),
    ],
)
def test_logits_are_those_of_our_own_runtime(tmp_path: Path, options: dict[str, Any], config: dict[str, Any]) -> None:
    folder = written(random_model(load(tiny_llama(tmp_path / "float", config=config)), **options), tmp_path)
    module = AutoModelForCausalLM.from_pretrained(folder)
    linears = [part for part in module.modules() if isinstance(part, QuantizedLinear)]
    assert len(linears) == 14
    assert all(part.codes.dtype == torch.uint8 and "weight" not in part.state_dict() for part in linears)
    assert torch.equal(logits(module), ours(folder))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_quantized_embedding(tmp_path: Path, family: str, tied: bool) -> None:
    source = load(tiny_model(tmp_path / "float", family, config={"tie_word_embeddings": tied}))
    model = with_quantized_embedding(quantize(source, bits=4, group_size=32))
    folder = written(model, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(module.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(module.lm_head, TiedHead) == tied
    assert torch.equal(logits(module), ours(folder))
    module.save_pretrained(tmp_path / "copy")
    assert_same_model(load(tmp_path / "copy"), model)
    assert torch.equal(logits(module.dequantize()), ours(folder))


def test_in_bfloat16_scales_stay_as_they_are(tiny: Path, tmp_path: Path) -> None:
    """The weight is made in float32 and rounded once, as a float model's would be."""
    folder = written(quantize(load(tiny), bits=4, group_size=32), tmp_path)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layer = module.model.layers[0].self_attn.q_proj
    assert (layer.scale.dtype, layer.min.dtype) == (torch.float16, torch.float16)
    weight = load(folder).tensors["model.layers.0.self_attn.q_proj.weight"].load_float()
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight.bfloat16()))


def test_the_dtype_is_that_of_the_float_tensors(tiny_untied: Path, tmp_path: Path) -> None:
    """A model from GGUF has none in its config; transformers would take that of the scales."""
    model = quantize(load(tiny_untied), bits=4, group_size=32)
    config = {key: value for key, value in model.config.items() if key != "dtype"}
    folder = written(replace(model, config=config), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32


@pytest.mark.slow
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    model = load(smollm2)
    folder = written(model, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(module), ours(folder))
    module.save_pretrained(tmp_path / "copy")
    assert_same_model(load(tmp_path / "copy"), model)


# ---- saving


def test_what_is_saved_is_what_was_loaded(tiny: Path, tmp_path: Path) -> None:
    model = quantize(load(tiny), bits=4, group_size=32)
    folder = written(model, tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert_same_model(load(tmp_path / "copy"), model)
    theirs, wanted = load_file(tmp_path / "copy" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[name], wanted[name]) and theirs[name].dtype == wanted[name].dtype for name in wanted)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(logits(again), ours(folder))
    (config,) = (json.loads((place / "config.json").read_text("utf-8")) for place in [tmp_path / "copy"])
    assert (
        config["quantization_config"] == json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    )


def test_saved_in_shards(tiny: Path, tmp_path: Path) -> None:
    model = quantize(load(tiny), bits=4, group_size=32)
    module = AutoModelForCausalLM.from_pretrained(written(model, tmp_path))
    module.save_pretrained(tmp_path / "copy", max_shard_size="100KB")
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 1
    assert_same_model(load(tmp_path / "copy"), model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), logits(module))


def test_dequantized_it_is_an_ordinary_model(tiny: Path, tmp_path: Path) -> None:
    folder = written(quantize(load(tiny), bits=4, group_size=32), tmp_path)
    module = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not [part for part in module.modules() if isinstance(part, QuantizedLinear)]
    assert torch.equal(logits(module), ours(folder))
    module.save_pretrained(tmp_path / "float")
    assert load(tmp_path / "float").layout == "huggingface"


@pytest.mark.parametrize("embedding", [False, True])
def test_casting_a_model_does_not_round_its_scales(tiny: Path, tmp_path: Path, embedding: bool) -> None:
    """bfloat16 has 8 bits: scales that were rounded to it would be other weights, silently, and in what is saved."""
    model = quantize(load(tiny), bits=4, group_size=32)
    folder = written(with_quantized_embedding(model) if embedding else model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for cast in (lambda module: module.to(torch.bfloat16), lambda module: module.bfloat16()):
        module = cast(AutoModelForCausalLM.from_pretrained(folder))
        assert logits(module).dtype == torch.bfloat16
        count = 0
        for part, other in zip(module.modules(), loaded.modules(), strict=True):
            if isinstance(part, QuantizedLinear | QuantizedEmbedding):
                assert part.scale.dtype == other.scale.dtype != torch.bfloat16
                assert torch.equal(part.weight, other.weight)
                count += 1
        assert count == 14 + embedding
        module.save_pretrained(tmp_path / "again")
        assert_same_integers(load(tmp_path / "again"), load(folder))


def assert_same_integers(one: Checkpoint, other: Checkpoint) -> None:
    """Of a model that was cast the floats are others, the integers with scale and min are not."""
    names = [name for name, lazy in other.tensors.items() if lazy.spec is not None]
    for name in names:
        assert one.tensors[name].spec == other.tensors[name].spec
        got, wanted = one.tensors[name].load_quantized(), other.tensors[name].load_quantized()
        for part in ("packed", "scale", "min"):
            assert torch.equal(getattr(got, part), getattr(wanted, part)), name


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_a_dequantized_model_has_one_dtype(tiny: Path, tmp_path: Path, loaded: Any, dtype: Any) -> None:
    folder = written(quantize(load(tiny), bits=4, group_size=32), tmp_path)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=loaded).dequantize(dtype)
    wanted = dtype or loaded
    assert {parameter.dtype for parameter in module.parameters()} == {wanted}
    assert logits(module).dtype == wanted


# ---- what is refused


def test_quantizing_on_the_way_in_is_refused(tiny: Path) -> None:
    from qalora.integrations.transformers import QaloraConfig

    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config=QaloraConfig())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, config: config["quantization_config"].update(version=7), "version: expected 1, got 7"),
        (lambda tensors, config: config["quantization_config"].update(bits=3), r"q_proj|down_proj"),
        (lambda tensors, config: config.update(hidden_size=32, head_dim=16), "as config.json says"),
        (lambda tensors, config: config.update(num_hidden_layers=1), "expected a module of LlamaForCausalLM, got none"),
        (
            lambda tensors, config: [tensors.pop(n) for n in list(tensors) if n.endswith(".codes")],
            "named <module>.codes",
        ),
    ],
)
def test_a_damaged_folder(tiny: Path, tmp_path: Path, change: Callable[..., Any], words: str) -> None:
    folder = written(quantize(load(tiny), bits=4, group_size=32), tmp_path)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text("utf-8"))
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FormatError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)


# ---- gradients and PEFT


def test_the_gradient_is_that_of_the_float_layer(tiny: Path, tmp_path: Path) -> None:
    folder = written(quantize(load(tiny), bits=4, group_size=32), tmp_path)
    layer = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.down_proj
    x = torch.randn(5, 128, requires_grad=True)
    layer(x).square().sum().backward()
    wide = x.detach().clone().requires_grad_(True)
    torch.nn.functional.linear(wide, layer.plain_weight()).square().sum().backward()
    assert torch.equal(x.grad, wide.grad)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_puts_a_plain_lora_beside_it(tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = quantize(load(tiny), bits=4, group_size=32)
    adapter = random_adapter(model, seed=1, a_size=0.1, b_size=0.1, minima=None, scaling=0.5)
    write_adapter(to_plain_lora(adapter), tmp_path / "plain")
    module = AutoModelForCausalLM.from_pretrained(written(model, tmp_path))
    module = PeftModel.from_pretrained(module, str(tmp_path / "plain"))
    reference, side = Reference(model, adapter), Forward(weights="side")
    wanted = reference.logits(TOKENS, side)
    noise = float((reference.logits(TOKENS, replace(side, permuted=True)) - wanted).abs().max())
    assert float((logits(module) - wanted).abs().max()) <= max(4 * noise, 1e-5)
    with pytest.raises(InputError, match="fold a QA-LoRA adapter with qalora fold"):
        module.merge_and_unload()
    with pytest.raises(InputError, match="cannot take a merged weight"):
        module.merge_and_unload(safe_merge=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_ignores_use_qalora_here(tiny: Path, tmp_path: Path) -> None:
    """What the docstring says of it; inspect says so of the adapter that comes out."""
    from peft import LoraConfig, get_peft_model

    folder = written(quantize(load(tiny), bits=4, group_size=32), tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_qalora=True, qalora_group_size=32)
    module = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    ids = torch.tensor([TOKENS])
    module(input_ids=ids, labels=ids).loss.backward()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert len(trained) == 8
    assert all(value.grad is not None for value in trained.values())
    assert trained["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].shape == (4, 64)
    module.save_pretrained(tmp_path / "adapter")
    report = inspect(tmp_path / "adapter", base=folder)
    assert isinstance(report, AdapterReport)
    assert "qalora-ignored" in {finding.code for finding in report.warnings}
