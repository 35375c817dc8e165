"""MLX folders: every cell comes back bit for bit, mlx-lm opens them, and mlx-lm's own are read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.exports import export, export_jobs
from qalora.converters.plan import ExportOptions
from qalora.converters.specs import TENSORS
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.safetensors import read_header
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.tensor import BITS
from qalora.testing import (
    assert_parity,
    assert_same_model,
    assert_same_tensor,
    lazily,
    random_model,
    random_tensor,
    tiny_llama,
)

EMBEDDING = "model.embed_tokens.weight"
TOKENS = [(7 * n) % 250 for n in range(24)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny Llama whose rows hold 256 columns and more, of one layer."""
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
    return load(tiny_llama(tmp_path_factory.mktemp("wide"), config=config))


def written(model: Checkpoint, out: Path) -> Path:
    export(model, ["mlx"], out)
    return out / "mlx"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.pairs(bits=BITS, group_size=[32, 64, 128, 256, None], zeros=["real", "integer", "symmetric"])
def test_every_tensor_comes_back(
    wide: Checkpoint, tmp_path: Path, bits: int, group_size: int | None, zeros: Any
) -> None:
    model = random_model(wide, bits=bits, group_size=group_size, zeros=zeros)
    read = load(written(model, tmp_path))
    assert read.layout == "mlx" and read.linears == model.linears
    assert_same_model(read, model)
    assert {name: lazy.spec for name, lazy in read.tensors.items()} == {n: t.spec for n, t in model.tensors.items()}


def test_rows_are_the_tensor(wide: Checkpoint, tmp_path: Path) -> None:
    model = random_model(wide, bits=5, group_size=256)
    lazy = load(written(model, tmp_path)).tensors[model.linears[0]]
    assert_same_tensor(lazy.rows(3, 50), lazy.load_quantized().rows(3, 50))  # type: ignore[arg-type]


def test_the_files_are_those_of_the_plan(tiny: Path, tmp_path: Path) -> None:
    (plan,) = export(quantize(load(tiny)), ["mlx"], tmp_path)
    folder = tmp_path / "mlx"
    assert {path.name for path in folder.iterdir()} == set(plan.files)
    assert all((folder / name).stat().st_size == size for name, size in plan.files.items() if size is not None)
    layout = read_header(folder / "model.safetensors")
    assert layout.metadata["format"] == "mlx"
    for tensor in plan.tensors:
        assert tensor.offset == layout.entries[tensor.name].offset and tensor.loss is None


def test_the_words_and_types(wide: Checkpoint, tmp_path: Path) -> None:
    model = random_model(wide, bits=3, group_size=256, zeros="integer")
    stored = safetensors.torch.load_file(written(model, tmp_path) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert (stored[f"{name}.weight"].dtype, stored[f"{name}.weight"].shape) == (torch.uint32, (256, 24))
    assert (stored[f"{name}.scales"].dtype, stored[f"{name}.scales"].shape) == (torch.float16, (256, 2))
    assert (stored[f"{name}.biases"].dtype, stored[f"{name}.biases"].shape) == (torch.float32, (256, 2))


def mixed(model: Checkpoint, *, bits: int = 8) -> Checkpoint:
    """One layer float16, one of another width, and the embedding quantized to 8 bits with zero point 128."""
    first, second = model.linears[:2]
    half = model.tensors[first].load_float().half()
    table = random_tensor(*model.tensors[EMBEDDING].shape, bits=bits, group_size=32, seed=9)
    table = replace(table, scale=table.scale.abs(), min=-(1 << (bits - 1)) * table.scale.abs())
    embedding = lazily(EMBEDDING, table, zeros="integer", min_dtype=torch.float32)
    tensors = {
        **model.tensors,
        first: LazyTensor(name=first, shape=tuple(half.shape), dtype=torch.float16, read=lambda a, b: half[a:b]),
        second: random_model(model, bits=3, group_size=64).tensors[second],
        EMBEDDING: embedding,
    }
    return replace(model, tensors=tensors)


def test_layers_may_differ(tiny_untied: Path, tmp_path: Path) -> None:
    model = mixed(quantize(load(tiny_untied), bits=4, group_size=32))
    folder = written(model, tmp_path)
    found = config_of(folder)["quantization"]
    assert found == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        model.linears[1].removesuffix(".weight"): {"bits": 3, "group_size": 64, "mode": "affine"},
        "model.embed_tokens": {"bits": 8, "group_size": 32, "mode": "affine"},
    }
    read = load(folder)
    assert_same_model(read, model)
    assert read.tensors[model.linears[0]].dtype == torch.float16
    assert read.tensors[EMBEDDING].spec == model.tensors[EMBEDDING].spec
    entries = read_header(folder / "model.safetensors").entries
    assert entries["model.embed_tokens.scales"].dtype == torch.float32  # its lookup computes in the types of these


def test_what_mlx_lm_looks_for_elsewhere_is_there(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    base = load(tiny_llama(tmp_path / "m", config={"rope_parameters": rope, "tie_word_embeddings": False}))
    assert "rope_theta" not in base.config
    config = config_of(written(quantize(base), tmp_path))
    assert config["rope_theta"] == 5e4
    assert config["rope_scaling"] == {**rope, "type": "linear"}
    assert config["tie_word_embeddings"] is False


def test_groups_that_mlx_does_not_have(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantize(load(tiny_untied), group_size=16)
    with pytest.raises(ExactnessError, match=r"_proj\.weight: group_size: expected a multiple of 32, .* got 16; use"):
        export(model, ["mlx"], tmp_path)
    model = quantize(load(tiny_untied), group_size=32)
    lazy = model.tensors[model.linears[0]]
    assert lazy.spec is not None
    ordered = replace(lazy, spec=replace(lazy.spec, act_order=True))
    with pytest.raises(ExactnessError, match="act-order"):
        export(replace(model, tensors={**model.tensors, lazy.name: ordered}), ["mlx"], tmp_path)
    assert not (tmp_path / "mlx").exists()


def test_a_double_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    model = load(tiny_untied)
    norm = model.tensors["model.norm.weight"]
    double = replace(norm, dtype=torch.float64, read=lambda a, b: norm.load_float()[a:b].double())
    with pytest.raises(InputError, match=r"mlx: model\.norm\.weight: expected float16, bfloat16 or float32"):
        export(replace(model, tensors={**model.tensors, norm.name: double}), ["mlx"], tmp_path)


def test_a_16_bit_model_gets_a_note(tiny_untied: Path, tmp_path: Path) -> None:
    base = load(tiny_untied)
    tensors = {}
    for name, lazy in base.tensors.items():
        values = lazy.load_float().bfloat16()
        tensors[name] = replace(lazy, dtype=torch.bfloat16, read=lambda a, b, values=values: values[a:b])
    model = quantize(replace(base, tensors=tensors), group_size=32)
    (job,) = export_jobs(model, ["mlx"], ExportOptions())
    assert "are bfloat16, and MLX computes in the types it finds" in job.plan.notes[0]
    read = load(written(model, tmp_path))
    assert read.tensors["model.norm.weight"].dtype == torch.bfloat16
    assert_same_model(read, model)


def test_metadata_that_the_values_contradict(wide: Checkpoint, tmp_path: Path) -> None:
    """As after another tool changed the groups and kept the header."""
    model = random_model(wide, bits=4, group_size=256)
    file = written(model, tmp_path) / "model.safetensors"
    name = model.linears[0]
    metadata = read_header(file).metadata
    tensors = safetensors.torch.load_file(file)
    tensors[name.replace(".weight", ".biases")][3, 1] += 1
    safetensors.torch.save_file(tensors, file, metadata=dict(metadata))
    with pytest.raises(FormatError, match=rf"{name}: min: expected one value for 256 columns, as {TENSORS} says"):
        load(tmp_path / "mlx").tensors[name].load()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minima_of_the_middle_zero_point_are_float16(wide: Checkpoint, tmp_path: Path) -> None:
    """Those of a GGUF file's Q4_0: 8 times a float16 scale; mlx-lm computes the same bits as with float32 biases."""
    export(quantize(wide, bits=4, group_size=32, zeros="symmetric"), ["gguf"], tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    model = load(file)
    folder = written(model, tmp_path)
    path = folder / "model.safetensors"
    layout = read_header(path)
    biases = [name for name in layout.entries if name.endswith(".biases")]
    assert len(biases) == 7 and {layout.entries[name].dtype for name in biases} == {torch.float16}
    assert_same_model(load(folder), model)
    tokens = [token % 64 for token in TOKENS]
    narrow = open_runtime("mlx", folder).logits(tokens)
    tensors = safetensors.torch.load_file(path)
    for name in biases:
        tensors[name] = tensors[name].float()
    earlier = Path(shutil.copytree(folder, tmp_path / "earlier"))
    safetensors.torch.save_file(tensors, earlier / path.name, dict(layout.metadata))
    assert_same_model(load(earlier), model)
    assert torch.equal(open_runtime("mlx", earlier).logits(tokens), narrow)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", BITS)
def test_mlx_lm_computes_the_same(bits: int, wide: Checkpoint, tmp_path: Path) -> None:
    """Larger groups, integer zeros in float32 biases: no further from torch than summing in another order is."""
    for zeros, group_size in (("integer", 256), ("real", 64)):
        model = random_model(wide, bits=bits, group_size=group_size, zeros=zeros)  # type: ignore[arg-type]
        assert_parity(model, [written(model, tmp_path / zeros)], tokens=[token % 64 for token in TOKENS])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_mlx_lm_opens_what_differs_by_layer(tied: bool, tiny: Path, tiny_untied: Path, tmp_path: Path) -> None:
    """A quantized embedding, tied to the output or not; a float layer; two widths; and the tokenizer, by `load`."""
    model = mixed(quantize(load(tiny if tied else tiny_untied), bits=4, group_size=32))
    folder = written(model, tmp_path)
    assert_parity(model, [folder], tokens=TOKENS)
    if tied:
        from mlx_lm import generate
        from mlx_lm import load as load_mlx

        module, tokenizer = load_mlx(str(folder))
        assert isinstance(generate(module, tokenizer, prompt="Hello", max_tokens=3), str)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_layers_bias_stands_beside_its_biases(tmp_path: Path) -> None:
    """As Qwen2 has them: `bias` is the layer's, `biases` are the groups' minima; and a rope scaling."""
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    config = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope, "tie_word_embeddings": False}
    model = quantize(load(tiny_llama(tmp_path / "m", config=config)), bits=6, group_size=64)
    folder = written(model, tmp_path)
    stored = read_header(folder / "model.safetensors").entries
    assert stored["model.layers.0.self_attn.q_proj.bias"].shape == (64,)
    assert stored["model.layers.0.self_attn.q_proj.biases"].shape == (64, 1)
    assert_same_model(load(folder), model)
    assert_parity(model, [folder], tokens=TOKENS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_mlx_lm_converts_is_read(dtype: str, tiny: Path, tmp_path: Path) -> None:
    """Words, scales and biases as mlx.core reads them; and back through our writer, bit for bit."""
    import mlx.core as mx
    from mlx_lm import convert

    convert(str(tiny), str(tmp_path / "theirs"), quantize=True, q_bits=3, q_group_size=64, dtype=dtype)
    model = load(tmp_path / "theirs")
    assert model.layout == "mlx" and model.tied and model.quantized and "tokenizer.json" in model.files
    stored: Any = mx.load(str(tmp_path / "theirs" / "model.safetensors"))
    for name in (*model.linears, EMBEDDING):
        module = name.removesuffix(".weight")
        parts = [stored[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        with mx.stream(mx.cpu):
            wide = [parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)]
            expected = torch.tensor(mx.dequantize(*wide, group_size=64, bits=3).tolist())
        tensor = model.tensors[name].load_quantized()
        assert (tensor.bits, tensor.group_size) == (3, 64)
        assert torch.allclose(tensor.dequantize(), expected, rtol=0, atol=2.0**-24)  # |w| < 1/2: it may fuse the sum
    assert_same_model(load(written(model, tmp_path / "ours")), model)
    assert_parity(tmp_path / "ours" / "mlx", [tmp_path / "theirs"], tokens=TOKENS)
