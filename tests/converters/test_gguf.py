"""GGUF files: there and back, transformers' own loader, llama.cpp, what they cannot hold, and SmolLM2 byte for byte."""

import filecmp
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.specs import TENSORS
from qalora.converters.torch_module import build
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.gguf import GgufFile, read_header
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.testing import assert_same_model, assert_same_tensor, random_model, tiny_llama

EMBEDDING = "model.embed_tokens.weight"


def written(model: Checkpoint, folder: Path, **options: Any) -> Path:
    export(model, "gguf", folder, **options)
    (path,) = (folder / "gguf").glob("*.gguf")
    return path


def blocks(file: GgufFile, name: str) -> bytes:
    """The bytes of a tensor."""
    info = file.tensors[name]
    with file.path.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.nbytes)


def types(path: Path) -> set[str]:
    return {tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) == 2}


EXACT = [
    (2, 32, "real", "Q4_1"),
    (3, 64, "real", "Q4_1"),
    (4, 32, "real", "Q4_1"),
    (4, 64, "real", "Q4_1"),
    (4, None, "real", "Q4_1"),
    (5, 32, "real", "Q5_1"),
    (4, 32, "symmetric", "Q4_0"),
    (5, 64, "symmetric", "Q5_0"),
    (6, 32, "integer", "Q8_0"),
    (6, 32, "symmetric", "Q8_0"),
    (8, 64, "symmetric", "Q8_0"),
]


@pytest.mark.parametrize(("bits", "group_size", "zeros", "kind"), EXACT)
def test_weights_come_back_bit_for_bit(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, zeros: Any, kind: str
) -> None:
    """The same weights; the same codes too where the type has the width."""
    model = random_model(load(tiny_untied), bits=bits, group_size=group_size, zeros=zeros)
    path = written(model, tmp_path)
    assert kind in types(path)
    again = load(path)
    assert set(again.tensors) == set(model.tensors)
    for name, lazy in model.tensors.items():
        assert torch.equal(again.tensors[name].load_float().float(), lazy.load_float().float()), name
    if group_size == 32 and again.tensors[model.linears[0]].spec.bits == bits:  # type: ignore[union-attr]
        assert_same_model(again, model)


@pytest.mark.parametrize(
    ("bits", "group_size", "zeros"),
    [(2, 32, "real"), (3, 64, "real"), (4, None, "real"), (5, 64, "symmetric"), (6, 32, "symmetric")],
)
def test_what_the_blocks_do_not_tell_is_metadata(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, zeros: Any
) -> None:
    model = random_model(load(tiny_untied), bits=bits, group_size=group_size, zeros=zeros)
    path = written(model, tmp_path)
    again = load(path)
    assert_same_model(again, model)
    assert again.notes == () and again.gguf is not None and again.gguf.get(TENSORS) is None
    assert TENSORS in GGUFReader(path).fields
    tokens = [(7 * n) % 200 for n in range(8)]
    assert open_runtime("llama.cpp", path, threads=1).logits(tokens).isfinite().all()  # it takes the unknown key


def test_what_the_blocks_tell_is_not_said_again(tiny_untied: Path, tmp_path: Path) -> None:
    for bits, zeros in ((4, "real"), (4, "symmetric"), (5, "real"), (8, "symmetric")):
        path = written(random_model(load(tiny_untied), bits=bits, zeros=zeros), tmp_path / f"{bits}{zeros}")  # type: ignore[arg-type]
        assert TENSORS not in GGUFReader(path).fields


def test_metadata_that_does_not_fit_is_passed_over_or_refused(tiny_untied: Path, tmp_path: Path) -> None:
    """llama.cpp's tools carry it along when they requantize."""
    model = random_model(load(tiny_untied), bits=3, group_size=64)
    path = written(model, tmp_path)
    data, name = path.read_bytes(), model.linears[0]
    assert data.count(b"[3,64,") == len(model.linears)

    path.write_bytes(data.replace(b"[3,64,", b"[5,64,"))  # no Q4_1
    stale = load(path)
    assert stale.notes[0].endswith(
        f"qalora.tensors does not describe {sorted(model.linears)[0]!r} (14 such); it is passed over"
    )
    assert (stale.tensors[name].spec.bits, stale.tensors[name].spec.group_size) == (4, 32)  # type: ignore[union-attr]
    assert torch.equal(stale.tensors[name].load_float(), model.tensors[name].load_float())

    path.write_bytes(data.replace(b"[3,64,", b"[2,64,"))
    with pytest.raises(FormatError, match=f"{name}: codes: expected 2 bits, as qalora.tensors says, got 7"):
        load(path).tensors[name].load()
    path.write_bytes(data.replace(b"[3,64,", b"[9,64,"))
    with pytest.raises(FormatError, match=r"qalora\.tensors: model\.layers\.0\..*: expected \[bits, group_size"):
        load(path)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_wide_form_holds_every_integer_zero(tiny_untied: Path, tmp_path: Path, bits: int) -> None:
    model = random_model(load(tiny_untied), bits=bits, zeros="integer")
    if bits < 6:
        with pytest.raises(ExactnessError, match="`gguf_form` wide"):
            written(model, tmp_path)
    path = written(model, tmp_path, gguf_form="wide")
    for name in model.linears:
        assert torch.equal(load(path).tensors[name].load_float(), model.tensors[name].load_float()), name


def test_minima_beyond_float16_are_a_loss_by_name(tiny_untied: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny_untied), zeros="integer")
    path = written(model, tmp_path, allow_loss=frozenset({"minima"}))
    for name in model.linears:
        wanted, got = model.tensors[name].load_quantized(), load(path).tensors[name].load_quantized()
        assert torch.equal(got.packed, wanted.packed)
        assert torch.equal(got.min, wanted.min.half().float())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 6, "zeros": "real"}, "no type holds 6-bit codes whose zero points are real"),
        ({"bits": 8, "zeros": "real"}, "no type holds 8-bit codes whose zero points are real"),
        ({"bits": 8, "zeros": "integer"}, "integer, but not the middle one"),
        ({"bits": 4, "group_size": 16}, "group_size: expected a multiple of 32, got 16"),
    ],
)
def test_what_no_type_holds_is_refused(tiny_untied: Path, tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        written(random_model(load(tiny_untied), **options), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_opens_it_with_the_same_weights(tied: bool, dtype: str, tmp_path: Path) -> None:
    """Rows of q and k are in llama.cpp's order in the file; transformers puts them back."""
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "model", config={"tie_word_embeddings": tied, "dtype": dtype})
    model = random_model(load(folder))
    path = written(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = build(model).state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_a_rope_scaling_that_is_not_written_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    folder = tiny_llama(tmp_path / "model", config={"rope_parameters": rope})
    words = "rope_type: expected default or linear or yarn or llama3, got 'dynamic'; use gptq"
    with pytest.raises(InputError, match=words):
        written(random_model(load(folder)), tmp_path / "out")


def test_metadata_and_name(tiny: Path, tmp_path: Path) -> None:
    path = written(random_model(load(tiny)), tmp_path, name="Tiny Tim")
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "Tiny Tim"
    assert fields["general.file_type"] == 3
    assert fields["general.quantization_version"] == 2
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert path.name == "Tiny-Tim-Q4_1.gguf"


def test_the_same_bytes_at_every_run(tiny: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny))
    assert written(model, tmp_path / "a").read_bytes() == written(model, tmp_path / "b").read_bytes()


def test_our_folder_keeps_what_came_from_gguf(tiny: Path, tmp_path: Path) -> None:
    first = written(random_model(load(tiny)), tmp_path / "a")
    export(load(first), "qalora", tmp_path)
    again = written(load(tmp_path / "qalora"), tmp_path / "b")
    theirs, ours = GGUFReader(first), GGUFReader(again)
    assert {name: field.contents() for name, field in ours.fields.items()} == {
        name: field.contents() for name, field in theirs.fields.items()
    }
    found = {tensor.name: tensor.data.tobytes() for tensor in ours.tensors}
    assert found == {tensor.name: tensor.data.tobytes() for tensor in theirs.tensors}


def test_a_float_file_runs_in_llama_cpp(tiny: Path, tmp_path: Path) -> None:
    """F32 tensors: what is left is float32's own noise, of another order of sums."""
    model = load(tiny)
    path = written(model, tmp_path)
    tokens = [(7 * n) % 200 for n in range(40)]
    runtime = open_runtime("llama.cpp", path, threads=1)
    found = runtime.logits(tokens).double()
    module = build(model)
    ids = torch.tensor([tokens])
    single = module(input_ids=ids).logits[0].detach()
    double = module.double()(input_ids=ids).logits[0].detach()
    noise = float((single.double() - double).abs().max())
    # ggml looks exp and rope up in float32 and sums in blocks: up to 16 times torch's noise was never reached
    assert float((found - double).abs().max()) <= 16 * noise
    assert runtime.generate(tokens[:5], 8) == open_runtime("torch", model).generate(tokens[:5], 8)
    runtime.close()


def test_llama_cpp_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FormatError, match=r"llama\.cpp does not load it"):
        open_runtime("llama.cpp", tmp_path / "a.gguf")


@pytest.mark.slow
def test_smollm2_comes_back_byte_for_byte(smollm2: Path, tmp_path: Path) -> None:
    """All 272 tensors, and all metadata."""
    model = load(smollm2)
    assert len(model.tensors) == 272
    assert filecmp.cmp(written(model, tmp_path), smollm2, shallow=False)


@pytest.mark.slow
def test_smollm2_by_way_of_gptq(smollm2: Path, tmp_path: Path) -> None:
    """GGUF -> GPTQ -> our reader -> GGUF, without its tokenizer: 210 layers bit for bit, their blocks byte for byte."""
    model = replace(load(smollm2), gguf=None)
    export(model, "gptq", tmp_path)
    again = load(tmp_path / "gptq")
    for name in model.linears:
        assert_same_tensor(again.tensors[name].load_quantized(), model.tensors[name].load_quantized())
    assert torch.equal(again.tensors[EMBEDDING].load_float(), model.tensors[EMBEDDING].load_float())
    theirs, ours = read_header(smollm2), read_header(written(again, tmp_path / "again"))
    layers = [name for name, info in theirs.tensors.items() if name.startswith("blk.") and info.type == "Q4_1"]
    assert len(layers) == len(model.linears) == 210
    for name in layers:
        assert ours.tensors[name].type == "Q4_1"
        assert blocks(ours, name) == blocks(theirs, name), name


def test_quantized_here_and_read_there(tiny: Path, tmp_path: Path) -> None:
    """From floats by rounding, to GGUF, and back."""
    model = quantize(load(tiny), bits=4, group_size=32)
    again = load(written(model, tmp_path))
    for name in model.linears:
        assert torch.equal(again.tensors[name].load_float(), model.tensors[name].load_float())
