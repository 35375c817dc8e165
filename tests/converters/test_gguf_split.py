"""GGUF models in several files, and types that are read as floats, against llama.cpp itself."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader

from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions, Plan
from qalora.errors import FormatError, InputError
from qalora.formats.files import OutputFile
from qalora.formats.gguf import BLOCKS, create, plan_layout, read_header
from qalora.formats.gguf_blocks import FLOAT_BLOCKS, dequantize
from qalora.inspection import inspect
from qalora.parity.artifacts import recognize
from qalora.testing import assert_parity, assert_same_model, random_model, tiny_llama

TOKENS = [(7 * n) % 250 for n in range(24)]


def split(model: Checkpoint, out: Path, limit: int = 15_000) -> tuple[Plan, list[Path]]:
    (plan,) = export(model, ["gguf"], out, ExportOptions(split_max_size=limit, name="m"))
    return plan, sorted((out / "gguf").glob("*.gguf"))


def test_what_is_split_comes_back(tiny: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny))
    plan, files = split(model, tmp_path)
    assert len(files) > 3
    assert [f"-{number:05d}-of-{len(files):05d}.gguf" for number in range(1, len(files) + 1)] == [
        file.name[-20:] for file in files
    ]
    assert {file.name: file.stat().st_size for file in [*files, tmp_path / "gguf" / "Modelfile"]} == plan.files
    read = load(files[0])
    assert_same_model(read, model)
    export(model, ["gguf"], tmp_path / "whole", ExportOptions(name="m"))
    (whole,) = (tmp_path / "whole" / "gguf").glob("*.gguf")
    assert read.gguf == load(whole).gguf
    for number, file in enumerate(files):
        keys = {key: read_header(file).metadata.get(key) for key in ("split.no", "split.count", "split.tensors.count")}
        total = len(read_header(whole).tensors)
        assert keys == {"split.no": number, "split.count": len(files), "split.tensors.count": total}
        assert {tensor.name for tensor in GGUFReader(file).tensors} == set(read_header(file).tensors)
    assert [artifact.path for artifact in recognize([tmp_path / "gguf"])] == [files[0]]
    assert inspect(files[0]).nbytes == sum(file.stat().st_size for file in files)  # type: ignore[union-attr]
    recipe = (tmp_path / "gguf" / "Modelfile").read_text("utf-8")
    assert recipe.splitlines()[: len(files)] == [f"FROM ./{file.name}" for file in files]


def test_parts_that_do_not_belong_together(tiny: Path, tmp_path: Path) -> None:
    _, files = split(random_model(load(tiny)), tmp_path)
    with pytest.raises(InputError, match=f"a part of a split model; give the first one, {files[0].name}"):
        load(files[1])
    second = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(FormatError, match=f"{files[1].name}: split: expected no 1 of {len(files)}"):
        load(files[0])
    files[1].unlink()
    with pytest.raises(InputError, match=f"1 missing, the first is {files[1].name}; fetch them too"):
        load(files[0])
    files[1].write_bytes(second)
    renamed = files[0].rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match=r"expected a name that ends as in -00001-of-00003\.gguf"):
        load(renamed)


def test_the_option(tiny: Path, tmp_path: Path) -> None:
    export(random_model(load(tiny)), ["qalora"], tmp_path)
    words = ["export", str(tmp_path / "qalora"), "--to", "gguf", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, [*words, "--split-max-size", "60kB"])
    assert result.exit_code == 0, result.output
    (plan,) = json.loads(result.stdout)
    assert set(plan["files"]) == {path.name for path in (tmp_path / "out" / "gguf").iterdir()}
    assert len(plan["files"]) > 1 and {row["file"] for row in plan["tensors"]} <= set(plan["files"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_llama_cpp_opens_the_first(tiny: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny))
    split(model, tmp_path)
    assert_parity(model, [tmp_path / "gguf"], tokens=TOKENS)


def blocks(kind: str, rows: int, columns: int) -> torch.Tensor:
    """Random blocks whose float16 numbers, wherever they stand, are small: no half has a high exponent."""
    _, elements, nbytes = BLOCKS[kind]
    rng = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (rows, columns // elements, nbytes), generator=rng, dtype=torch.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in halves[kind]:
        scale = torch.rand(rows, columns // elements, 1, generator=rng).half() * 0.01
        data[..., at : at + 2] = scale.view(torch.uint8)
    return data.view(rows, -1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_llama_cpps_own_dequantizer_agrees(kind: str) -> None:
    """In float32 both; gguf-py may multiply in another order, so that the last bit of three products can differ."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    data = blocks(kind, 8, 512)
    expected = torch.empty(8, 512)
    function = library[f"dequantize_row_{kind[:2].lower()}_K"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    function(data.data_ptr(), expected.data_ptr(), expected.numel())
    got = dequantize(data, kind)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 3 * 2**-24 * expected.abs().max()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
    return load(tiny_llama(tmp_path_factory.mktemp("wide"), config=config))


def rewritten(model: Checkpoint, out: Path, kinds: dict[str, str]) -> Path:
    """The model as a GGUF file in which some tensors, by GGUF's names, are random blocks of other types."""
    export(model, ["gguf"], out)
    (path,) = (out / "gguf").glob("*.gguf")
    header = read_header(path)
    sizes = [(info.name, info.shape, kinds.get(info.name, info.type)) for info in header.tensors.values()]
    layout = plan_layout(header.metadata, sizes)
    with create(out / "k.gguf", layout) as file:
        for info in header.tensors.values():
            _copy(file, path, header, info, layout.tensors[info.name], kinds)
    return out / "k.gguf"


def _copy(file: OutputFile, path: Path, header: Any, old: Any, new: Any, kinds: dict[str, str]) -> None:
    if old.name in kinds:
        file.write(new.offset, blocks(kinds[old.name], *old.shape))
    else:
        file.write(new.offset, path.read_bytes()[old.offset : old.offset + old.nbytes])


def test_k_quants_are_floats_with_a_note(wide: Checkpoint, tmp_path: Path) -> None:
    kinds = {"blk.0.ffn_up.weight": "Q4_K", "blk.0.ffn_down.weight": "Q6_K", "blk.0.ffn_gate.weight": "Q2_K"}
    path = rewritten(wide, tmp_path, kinds)
    model = load(path)
    (note,) = model.notes
    assert "1 in Q4_K" in note and "hold no integer groups of ours" in note and "quantize it first" in note
    assert not model.quantized
    names = {
        "blk.0.ffn_up.weight": "up_proj",
        "blk.0.ffn_down.weight": "down_proj",
        "blk.0.ffn_gate.weight": "gate_proj",
    }
    for gguf, module in names.items():
        lazy = model.tensors[f"model.layers.0.mlp.{module}.weight"]
        expected = dequantize(blocks(kinds[gguf], *lazy.shape), kinds[gguf])
        assert lazy.dtype == torch.float32 and lazy.spec is None
        assert torch.equal(lazy.load_float(), expected)
        assert torch.equal(lazy.rows(3, 50), expected[3:50])  # type: ignore[arg-type]
    result = CliRunner().invoke(main, ["train", str(path), "--data", str(path), "-o", str(tmp_path / "a")])
    assert result.exit_code == 2 and "qalora quantize" in result.output


def test_every_type_is_one_of_gguf_pys() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    for kind in FLOAT_BLOCKS:
        tag, elements, nbytes = BLOCKS[kind]
        assert GGML_QUANT_SIZES[GGMLQuantizationType(tag)] == (elements, nbytes)
        assert GGMLQuantizationType(tag).name == kind
        assert dequantize(torch.zeros(2, nbytes, dtype=torch.uint8), kind).shape == (2, elements)
    assert set(FLOAT_BLOCKS) | {"NVFP4"} >= {
        kind.name for kind in quants._type_traits if kind.name not in ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    }
