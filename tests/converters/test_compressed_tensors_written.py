"""compressed-tensors folders of ours: back bit for bit, in compressed-tensors' own code, and in transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.compressed_tensors import plan, write
from qalora.converters.plan import ExportOptions
from qalora.converters.torch_module import build
from qalora.errors import AdapterError, ExactnessError, InputError
from qalora.formats.share import Share
from qalora.parity import verify
from qalora.releasing.check import check_release
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.residual import to_residual
from qalora.tensor import BITS, GroupQuantTensor
from qalora.testing import (
    assert_same_model,
    byte_tokenizer,
    lazily,
    random_adapter,
    random_model,
    random_tensor,
    tiny_llama,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of what transformers imports

TOKENS = torch.arange(3, 35)[None]
FLOAT32: dict[str, Any] = {"compressed_scales": "float32"}


def tamed(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """A quarter of the scale: random codes give weights so large that the logits say nothing."""
    return replace(tensor, scale=tensor.scale / 4, min=tensor.min / 4)


def quantized(source: Path, **options: Any) -> Checkpoint:
    return random_model(load(source), **{"zeros": "integer", "change": tamed, **options})


@pytest.mark.pairs(bits=BITS, group_size=[16, 64, None], zeros=["integer", "symmetric"], scales=["float16", "float32"])
def test_there_and_back_and_in_the_librarys_own_code(
    bits: int, group_size: int | None, zeros: str, scales: Any, tiny_untied: Path, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = quantized(tiny_untied, bits=bits, group_size=group_size, zeros=zeros)
    export(model, "compressed-tensors", tmp_path, compressed_scales=scales)
    folder = tmp_path / "compressed-tensors"
    again = load(folder)
    assert_same_model(again, model)
    assert again.notes == ()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor, stored = (
        BaseCompressor.get_value_from_registry("pack-quantized"),
        load_file(folder / "model.safetensors"),
    )
    for name in model.linears:
        begin = name.removesuffix("weight")
        parts = {key.removeprefix(begin): value for key, value in stored.items() if key.startswith(begin)}
        theirs = compressor.decompress(parts, scheme)["weight"]
        ours = model.tensors[name].load_float()
        assert torch.equal(theirs, ours.half() if scales == "float16" else ours), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "zeros", "tied"), [(4, "integer", True), (3, "symmetric", False), (8, "integer", True)]
)
def test_transformers_computes_the_very_same(bits: int, zeros: str, tied: bool, tmp_path: Path) -> None:
    """With float32 scales no weight differs in a bit, and so no logit."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = tiny_llama(tmp_path / "float", config={"tie_word_embeddings": tied})
    model = quantized(source, bits=bits, zeros=zeros)
    export(model, "compressed-tensors", tmp_path, **FLOAT32)
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compressed-tensors", dtype=torch.float32, quantization_config=config
    )
    for name in model.linears:
        assert torch.equal(theirs.get_parameter(name), model.tensors[name].load_float()), name
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, build(model)(TOKENS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("adapted", [True, False])
def test_proven_in_transformers(scales: Any, adapted: bool, tmp_path: Path) -> None:
    """The base's zero points, and an adapter beside it as a plain LoRA, which the same call loads."""
    source = tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())
    model = quantized(source)
    adapter = random_adapter(model, rank=(3, 4), seed=1, a_size=0.1, b_size=0.1, minima=None, scaling=2.0, factor=0.5)
    given = {"adapter": adapter} if adapted else {}
    export(model, "compressed-tensors", tmp_path, compressed_scales=scales, **given)
    folder = tmp_path / "compressed-tensors"
    for name in ("adapter_model.safetensors", "model.safetensors.index.json"):
        assert (folder / name).exists() == adapted
    report = verify(model, [folder], level="logits", tokens=list(range(3, 40)), threads=1, **given)
    assert report.passed(), report.failure()
    assert_same_model(load(folder), model)
    assert (load(folder).beside == folder) == adapted


def test_an_output_layer_of_its_own_becomes_words_too(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied)
    name = "lm_head.weight"
    for group_size, words in ((32, True), (16, False)):
        made = random_tensor(256, 64, bits=4, group_size=group_size, zeros="integer")
        lazy = lazily(name, made, zeros="integer", min_dtype=torch.float32)
        whole = replace(model, tensors={**model.tensors, name: lazy})
        export(whole, "compressed-tensors", tmp_path / str(group_size))
        folder = tmp_path / str(group_size) / "compressed-tensors"
        assert (load(folder).tensors[name].spec is not None) == words
        assert torch.equal(load(folder).tensors[name].load_float(), made.dequantize())
        said = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
        assert said == ([] if words else ["lm_head"])


def test_scales_that_float16_rounds(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(
        tiny_untied,
        scale_dtype=torch.float32,
        change=lambda tensor: replace(tensor, scale=tensor.scale * 1.001, min=tensor.min * 1.001),
    )
    with pytest.raises(
        ExactnessError, match=r"float32 scales rounded .*`compressed_scales` float32 keeps them.*scales"
    ):
        export(model, "compressed-tensors", tmp_path)
    export(model, "compressed-tensors", tmp_path, **FLOAT32)
    name = model.linears[0]
    again = load(tmp_path / "compressed-tensors").tensors[name].load_quantized()
    assert torch.equal(again.scale, model.tensors[name].load_quantized().scale)


def test_real_zero_points_are_a_loss(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, zeros="real")
    with pytest.raises(ExactnessError, match=r"real zero points rounded to integers.*`allow_loss` zeros"):
        export(model, "compressed-tensors", tmp_path)
    export(model, "compressed-tensors", tmp_path, allow_loss="zeros")
    name = model.linears[0]
    tensor = model.tensors[name].load_quantized()
    again = load(tmp_path / "compressed-tensors").tensors[name].load_quantized()
    assert torch.equal(again.min, -tensor.scale * to_residual(tensor, "nearest").zero)


def test_what_cannot_be_is_refused(tiny_untied: Path) -> None:
    def shuffled(tensor: GroupQuantTensor) -> GroupQuantTensor:
        return replace(tensor, g_idx=(torch.arange(tensor.shape[1]) % tensor.groups).int())

    with pytest.raises(InputError, match=r"compressed-tensors: model\..* holds floats; quantize the model first"):
        plan(load(tiny_untied), ExportOptions())
    with pytest.raises(ExactnessError, match="an act-order tensor's groups mix columns"):
        plan(quantized(tiny_untied, change=shuffled), ExportOptions())
    four, eight = quantized(tiny_untied), quantized(tiny_untied, bits=8)
    mixed = replace(four, tensors={**four.tensors, four.linears[0]: eight.tensors[four.linears[0]]})
    with pytest.raises(
        InputError, match=r"one width and group size in all layers, as transformers reads, got 4, 8 bits"
    ):
        plan(mixed, ExportOptions())
    real = quantized(tiny_untied, zeros="real")
    with pytest.raises(
        InputError, match="compressed-tensors: an adapter beside the base: expected a base with integer"
    ):
        plan(real, ExportOptions(adapter=random_adapter(real)))
    other = random_adapter(quantized(tiny_untied))
    layers = {"model.layers.7.mlp.up_proj": next(iter(other.layers.values()))}
    with pytest.raises(AdapterError, match=r"adapter layer model\.layers\.7\.mlp\.up_proj"):
        plan(four, ExportOptions(adapter=replace(other, layers=layers)))


def test_shards_and_shares_are_the_same_folder(tmp_path: Path) -> None:
    """Two shares write what one does, the adapter too; shards hold what one file does."""
    model = quantized(tiny_llama(tmp_path / "float"))
    adapter = random_adapter(model, rank=2, minima=None)
    planned = plan(model, ExportOptions(adapter=adapter, max_shard_size=40_000))
    one, two = tmp_path / "one", tmp_path / "two"
    names = [*model.everything]
    shares = ((one, Share()), (two, Share(names[::2])), (two, Share(names[1::2], frame=False)))
    for folder, share in shares:
        folder.mkdir(exist_ok=True)
        write(planned, model, folder, lambda name, nbytes: None, share)
    assert len(list(one.glob("model-*.safetensors"))) > 1
    names = sorted(path.name for path in one.iterdir())
    assert "adapter_model.safetensors" in names and names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert_same_model(load(one), model)


@pytest.mark.slow
def test_a_release_of_it(tmp_path: Path) -> None:
    """Proven, with a card that says how to run it; and the check makes it again."""
    model = quantized(tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer()))
    model.save(tmp_path / "base")
    base = load(tmp_path / "base")
    adapter = random_adapter(base, rank=2, seed=1, a_size=0.1, b_size=0.1, minima=None)
    options = ReleaseOptions(targets=("compressed-tensors",), max_tokens=32, generate=2)
    release(plan_release(base, options, tmp_path / "dist", adapter=adapter), tmp_path / "dist")
    card = (tmp_path / "dist" / "README.md").read_text("utf-8")
    assert "CompressedTensorsConfig(dequantize=True)" in card
    assert check_release(tmp_path / "dist", base=base, open_artifacts=False).findings == ()
