"""MNN folders of ours: every tensor comes back bit for bit, and MNN computes what the model does."""

import contextlib
import importlib.util
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edges import edges
from qalora.chat_layouts import chat_layout
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.device_load import device_load_of
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.mnn import from_stream, header_bytes, to_stream
from qalora.formats.mnn_graph import graph_bytes, read_graph
from qalora.formats.output import write_json
from qalora.parity.runtimes import open_runtime
from qalora.parity.tokenizer_texts import parts_of
from qalora.tensor import BITS, pack_codes
from qalora.testing import (
    assert_parity,
    assert_same_model,
    assert_same_tensor,
    byte_tokenizer,
    lazily,
    random_model,
    random_tensor,
    small_tokenizer,
    tiny_llama,
    tiny_model,
)

TOKENS = [(7 * n) % 250 for n in range(24)]
LAYER = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens.weight"

in_mnn = pytest.mark.skipif(importlib.util.find_spec("MNN") is None, reason="MNN is not installed")


def written(model: Checkpoint, out: Path, **options: Any) -> Path:
    export(model, ["mnn"], out, ExportOptions(**options))
    return out / "mnn"


def embedded(model: Checkpoint, bits: int, **options: Any) -> Checkpoint:
    """The model with a quantized embedding."""
    rows, columns = model.tensors[EMBEDDING].shape
    tensor = random_tensor(rows, columns, bits=bits, group_size=32, seed=9, zeros="real", **options)
    lazy = lazily(EMBEDDING, tensor, zeros="real", scale_dtype=torch.float16, min_dtype=torch.float16)
    return replace(model, tensors={**model.tensors, EMBEDDING: lazy})


def rows_of(values: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: values[start:stop]


def stored_as(model: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The model with its float matrices in another type."""
    tensors = dict(model.tensors)
    for name, lazy in tensors.items():
        if lazy.dtype is not None and len(lazy.shape) == 2:
            tensors[name] = replace(lazy, dtype=dtype, read=rows_of(lazy.load_float().to(dtype)))
    return replace(model, tensors=tensors)


@pytest.mark.parametrize("bits", BITS)
def test_codes_have_their_highest_bit_first(bits: int) -> None:
    """Against a loop over the bits of a number."""
    codes = torch.randint(0, 1 << bits, (3, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = to_stream(pack_codes(codes, bits), bits)
    for row, found in zip(codes.tolist(), stream.numpy(), strict=True):
        text = "".join(f"{code:0{bits}b}" for code in row)
        assert bytes(found) == int(text, 2).to_bytes(len(text) // 8, "big")
    assert torch.equal(from_stream(stream, bits), pack_codes(codes, bits))


def test_a_header_of_large_sizes_has_32_bits() -> None:
    small, large = header_bytes((65535, 8), 4), header_bytes((65536, 8), 8)
    assert small[:5] == b"\2" + struct.pack("<HH", 65535, 8) and small[5] == 16 and len(small) == 22
    assert large[:9] == b"\2" + struct.pack("<ii", 65536, 8) and large[9] == 0 and len(large) == 9 + 257


@pytest.mark.pairs(bits=BITS, group_size=[8, 16, 32, None], zeros=["real", "integer", "symmetric"])
def test_every_tensor_comes_back(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, zeros: Any
) -> None:
    model = random_model(load(tiny_untied), bits=bits, group_size=group_size, zeros=zeros)
    read = load(written(model, tmp_path))
    assert read.layout == "mnn" and read.linears == model.linears
    assert_same_model(read, model)
    assert {name: lazy.spec for name, lazy in read.tensors.items()} == {n: t.spec for n, t in model.tensors.items()}
    lazy = read.tensors[model.linears[0]]
    assert_same_tensor(lazy.rows(3, 50), lazy.load_quantized().rows(3, 50))  # type: ignore[arg-type]


@in_mnn
@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_groups_at_the_edges_come_back_and_are_computed(bits: int, tiny_untied: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny_untied), bits=bits, change=edges)
    folder = written(model, tmp_path)
    assert_same_model(load(folder), model)
    assert_parity(model, [folder], tokens=TOKENS)


@in_mnn
@pytest.mark.slow
@pytest.mark.pairs(bits=BITS, group_size=[8, 16, 32, 64, None], zeros=["real", "integer", "symmetric"])
def test_mnn_computes_what_the_model_does(bits: int, group_size: int | None, zeros: Any, tmp_path: Path) -> None:
    """Biases too."""
    config = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    base = load(tiny_llama(tmp_path / "m", config=config))
    model = random_model(base, bits=bits, group_size=group_size, zeros=zeros)
    assert_parity(model, [written(model, tmp_path)], tokens=TOKENS)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": False},
    "smollm3": {},
}


@in_mnn
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    model = random_model(load(tiny_model(tmp_path / "m", family, config=FAMILIES[family])), bits=5)
    folder = written(model, tmp_path)
    assert_same_model(load(folder), model)
    assert_parity(model, [folder], tokens=TOKENS)


@in_mnn
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [3, 4, 5, 8, torch.float32, torch.bfloat16, torch.float16])
def test_embeddings(kind: Any, tied: bool, tmp_path: Path) -> None:
    """All of them come back, and MNN looks the same numbers up."""
    base = random_model(load(tiny_llama(tmp_path / "m", config={"tie_word_embeddings": tied})))
    model = embedded(base, kind) if isinstance(kind, int) else stored_as(base, kind)
    folder = written(model, tmp_path)
    read = load(folder)
    assert_same_model(read, replace(model, tensors={**model.tensors, **wide_head(model)}))
    assert (folder / "embeddings_bf16.bin").exists() == (kind is torch.bfloat16)
    assert_parity(model, [folder], tokens=TOKENS)


def wide_head(model: Checkpoint) -> dict[str, Any]:
    """A float output layer of its own, which is float32 in the file."""
    lazy = model.tensors.get("lm_head.weight")
    if lazy is None:
        return {}
    return {
        lazy.name: replace(lazy, dtype=torch.float32, read=lambda start, stop: lazy.load_float()[start:stop].float())
    }


def sentencepiece() -> Any:
    return chat_layout("mistral-v0.1").tokenizer


def sentencepiece_without_a_space() -> Any:
    return chat_layout("ernie4.5").tokenizer


def ignoring_joins() -> Any:
    """Whole words are looked up first, each of which joins make too."""
    tokenizer = small_tokenizer()
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["model"]["ignore_merges"] = True
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer).from_str(json.dumps(said)).model
    assert len(tokenizer("the")["input_ids"]) == 1
    return tokenizer


def in_nfc() -> Any:
    return chat_layout("qwen3").tokenizer


TOKENIZERS = [small_tokenizer, byte_tokenizer, ignoring_joins, in_nfc, sentencepiece, sentencepiece_without_a_space]

TEXTS = [
    "a\u200db",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\ufeffx",
    "a\x0bb",
    "the theme",
    "caf\u00e9",
    " \u2581 <0x0A>",
]
"""Joiners and marks that are no spaces; what falls back to bytes; texts that look like a token's own name."""


@in_mnn
@pytest.mark.slow
def test_texts_of_several_chunks_and_steps(tmp_path: Path) -> None:
    model = random_model(load(tiny_llama(tmp_path / "m")))
    runtime = open_runtime("mnn", written(model, tmp_path), threads=1)
    long, short = [(7 * n * n + n) % 250 for n in range(70)], [5, 6, 7]
    whole = runtime.logits(long)
    runtime.logits(short)
    assert torch.equal(runtime.logits(long), whole)  # from an empty cache
    assert torch.allclose(runtime.steps(long), whole, atol=1e-4)
    assert torch.equal(runtime.batch([long, short])[0], whole)


@in_mnn
@pytest.mark.slow
@pytest.mark.parametrize("make", TOKENIZERS)
def test_the_tokenizer_is_mnns_too(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    model = random_model(load(tiny_llama(tmp_path / "m", tokenizer=tokenizer)))
    runtime = open_runtime("mnn", written(model, tmp_path), threads=1)
    assert runtime.words is not None
    for part in parts_of(tokenizer, len(tokenizer)):
        assert runtime.words.tokenize(part.text, special=True) == list(part.ids), part.name
    for text in TEXTS:
        assert runtime.words.tokenize(text, special=True) == tokenizer(text, add_special_tokens=False)["input_ids"], (
            text
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is Whitespace"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "_"}}, "it replaces by a pattern"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}}, "its decoder strips each token"),
        ({"decoder": {"type": "Replace", "pattern": {"String": ""}, "content": "_"}}, "or an empty text"),
        ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, "its decoder is BPEDecoder"),
    ],
)
def test_a_tokenizer_that_mnn_has_not_is_left_out(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", tokenizer=byte_tokenizer())
    said = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    write_json(folder / "tokenizer.json", {**said, **change})
    (plan,) = export(random_model(load(folder)), ["mnn"], tmp_path)
    assert any("the words of the tokenizer are left out" in note and reason in note for note in plan.notes)
    assert (tmp_path / "mnn" / "tokenizer.mtok").read_bytes().startswith(b"430 4\n0 1 0\n256\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"content": "<foo>", "normalized": True}, "the added token '<foo>' is one in the normalized text alone"),
        ({"content": "</s>", "special": True, "lstrip": True}, "the special token '</s>' takes spaces"),
        ({"content": "\u2581a", "special": True}, "the special token '\u2581a' takes spaces, or is another text"),
        ({"content": "<s>x", "special": True}, "the special token '<s>x' begins like another"),
    ],
)
def test_an_added_token_that_mnn_finds_elsewhere_leaves_the_words_out(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "m", tokenizer=chat_layout("mistral-v0.1").tokenizer)
    said = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = said["model"]["vocab"]
    if change.get("special"):
        words.setdefault(change["content"], len(words))
    number = words.get(change["content"], len(words))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    kept = [token for token in said["added_tokens"] if token["id"] != number]
    said["added_tokens"] = [*kept, {**flags, **change, "id": number}]
    write_json(folder / "tokenizer.json", said)
    (plan,) = export(random_model(load(folder)), ["mnn"], tmp_path)
    assert any(reason in note for note in plan.notes), plan.notes


def test_words_that_are_looked_up_and_no_join_makes_are_left_out(tmp_path: Path) -> None:
    """Llama 3's ignore_merges, which MNN has not: it changes such words alone."""
    folder = tiny_llama(tmp_path / "m", tokenizer=byte_tokenizer())
    said = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = said["model"]["vocab"]
    words["wordless"] = max(words.values()) + 1
    said["model"]["ignore_merges"] = True
    write_json(folder / "tokenizer.json", said)
    (plan,) = export(random_model(load(folder)), ["mnn"], tmp_path)
    assert any("ignore_merges, and its merges do not make the word 'wordless'" in note for note in plan.notes)


def test_the_same_bytes_each_time(tiny: Path, tmp_path: Path) -> None:
    one, other = (written(random_model(load(tiny), bits=3), tmp_path / name) for name in ("one", "other"))
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert all(path.read_bytes() == (other / path.name).read_bytes() for path in one.iterdir())


def test_the_files_are_those_of_the_plan(tiny: Path, tmp_path: Path) -> None:
    for name, model in {"q": embedded(random_model(load(tiny)), 8), "f": random_model(load(tiny))}.items():
        (plan,) = export(model, ["mnn"], tmp_path / name)
        folder = tmp_path / name / "mnn"
        assert {path.name for path in folder.iterdir()} == set(plan.files)
        assert all((folder / name).stat().st_size == size for name, size in plan.files.items() if size is not None)


@in_mnn
@pytest.mark.slow
def test_the_graph_is_what_mnns_converter_reads(tiny: Path, tmp_path: Path) -> None:
    import _tools  # of MNN's package

    folder = written(random_model(load(tiny)), tmp_path)
    place = tmp_path / "graph.json"
    _tools.mnnconvert(["mnnconvert", "-f", "MNN", "--modelFile", str(folder / "llm.mnn"), "--JsonFile", str(place)])
    theirs, ours = json.loads(place.read_text("utf-8")), read_graph((folder / "llm.mnn").read_bytes(), "llm.mnn")
    assert graph_bytes(ours) == (folder / "llm.mnn").read_bytes()
    assert holds(theirs, ours)


def holds(theirs: Any, ours: Any) -> bool:
    """Whether all of ours is in theirs, which has defaults beside, and floats with six digits behind the point."""
    if isinstance(ours, dict):
        return all(key in theirs and holds(theirs[key], value) for key, value in ours.items())
    if isinstance(ours, list):
        return len(theirs) == len(ours) and all(map(holds, theirs, ours))
    return bool(theirs == ours or (isinstance(ours, float) and abs(theirs - ours) <= 1e-6))


def test_what_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    base = load(tiny_untied)
    model = random_model(base)
    lazy = model.tensors[model.linears[0]]
    assert lazy.spec is not None
    ordered = replace(lazy, spec=replace(lazy.spec, act_order=True))
    with pytest.raises(ExactnessError, match="act-order"):
        written(replace(model, tensors={**model.tensors, lazy.name: ordered}), tmp_path)
    assert not (tmp_path / "mnn").exists()


@pytest.mark.parametrize(
    ("family", "config", "sentence"),
    [
        ("gemma2", {}, "model_type: expected one of llama, mistral, qwen2, qwen3, smollm3, got gemma2"),
        ("granite", {}, "got granite; use gguf"),
        ("mistral", {"sliding_window": 16}, "a sliding window: expected a model without"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "a sliding window"),
    ],
)
def test_models_that_are_refused(family: str, config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = random_model(load(tiny_model(tmp_path / "m", family, config=config)))
    with pytest.raises(InputError, match=sentence):
        written(model, tmp_path)


def test_minima_that_float32_sums_round_are_a_loss_by_name(tiny_untied: Path, tmp_path: Path) -> None:
    model = embedded(random_model(load(tiny_untied)), 2)
    with pytest.raises(ExactnessError, match="`allow_loss` minima"):
        written(model, tmp_path)
    read = load(written(model, tmp_path, allow_loss=frozenset({"minima"}))).tensors[EMBEDDING].load_quantized()
    table = model.tensors[EMBEDDING].load_quantized()
    assert torch.equal(read.packed, table.packed) and torch.equal(read.scale, table.scale)
    # half an ULP of the sum, which is no larger than |min| + 128 |scale|, and half an ULP of the difference
    assert bool(((read.min - table.min).abs() <= 2.0**-23 * (table.min.abs() + 128 * table.scale.abs())).all())


def test_values_that_the_table_of_floats_does_not_hold(tiny_untied: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny_untied))
    lazy = model.tensors[EMBEDDING]
    values = lazy.load_float().clone()
    values[3, 4] = 2.0**-145
    small = replace(lazy, read=lambda start, stop: values[start:stop])
    with pytest.raises(ExactnessError, match="below 2"):
        written(replace(model, tensors={**model.tensors, EMBEDDING: small}), tmp_path)


def test_a_folder_that_is_not_ours(tiny: Path, tmp_path: Path) -> None:
    folder = written(random_model(load(tiny)), tmp_path)
    said = json.loads((folder / "llm_config.json").read_text("utf-8"))
    write_json(folder / "llm_config.json", {key: value for key, value in said.items() if "qalora" not in key})
    with pytest.raises(FormatError, match=r"qalora\.mnn: expected 1, got null; start from the model"):
        load(folder)


def test_damaged_folders(tiny: Path, tmp_path: Path) -> None:
    folder = written(random_model(load(tiny)), tmp_path)
    file = folder / "llm.mnn"
    graph = file.read_bytes()
    for damaged in (b"", graph[:2], graph[: len(graph) // 2], b"\xff" * len(graph), bytes(len(graph))):
        file.write_bytes(damaged)
        with pytest.raises(FormatError):
            load(folder)
    net = read_graph(graph, "llm.mnn")
    for op in net["oplists"]:
        if op["name"] == LAYER:
            op["main"]["quanParameter"]["aMin"] = 1
    file.write_bytes(graph_bytes(net))
    with pytest.raises(FormatError, match=rf"{LAYER}: expected .*'aMin': -8.* got .*'aMin': 1"):
        load(folder)
    file.write_bytes(graph)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    write_json(folder / "config.json", {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 5e5}})
    with pytest.raises(FormatError, match=r"rotary positions as config\.json says"):
        load(folder)
    write_json(folder / "config.json", config)
    place = load(folder).tensors[f"{LAYER}.weight"]
    weights = bytearray((folder / "llm.mnn.weight").read_bytes())
    start = read_graph(graph, "llm.mnn")
    offset = next(op["main"]["external"][0] for op in start["oplists"] if op["name"] == LAYER)
    weights[offset] = 7
    (folder / "llm.mnn.weight").write_bytes(weights)
    with pytest.raises(FormatError, match="a header of"):
        place.load()


@in_mnn
@pytest.mark.slow
def test_a_folder_that_mnn_does_not_load(tiny: Path, tmp_path: Path) -> None:
    """It says so, where a call of MNN's would end the process."""
    folder = written(random_model(load(tiny)), tmp_path)
    (folder / "llm.mnn").write_bytes(b"\0" * 64)
    with pytest.raises(FormatError, match="MNN does not load it"):
        open_runtime("mnn", folder, threads=1)


@pytest.mark.slow
def test_all_graph_damage_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    folder = written(random_model(load(tiny)), tmp_path)
    graph = (folder / "llm.mnn").read_bytes()
    random = torch.Generator().manual_seed(0)
    for _ in range(1500):
        at, bit = (int(torch.randint(0, most, (1,), generator=random)) for most in (len(graph), 8))
        damaged = bytearray(graph)
        damaged[at] ^= 1 << bit
        (folder / "llm.mnn").write_bytes(damaged)
        with contextlib.suppress(InputError):
            load(folder)


def test_a_device_loads_what_the_plan_says(tiny: Path, tmp_path: Path) -> None:
    """Of the files, and of the plan."""
    for name, model in {"q": embedded(random_model(load(tiny)), 8), "f": random_model(load(tiny))}.items():
        (plan,) = export(model, ["mnn"], tmp_path / name)
        assert plan.device_load is not None
        assert device_load_of(load(tmp_path / name / "mnn")) == plan.device_load


@in_mnn
@pytest.mark.slow
def test_the_engine_prints_nothing(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = open_runtime("mnn", written(random_model(load(tiny)), tmp_path), threads=1)
    runtime.steps(TOKENS)
    capture = capfd.readouterr()
    assert "MNN" not in capture.out and "device" not in capture.out


def test_what_the_engine_is_told_is_checked(tiny: Path, tmp_path: Path) -> None:
    """It reads the embedding by llm_config.json, and what is wrong there would not be seen in the weights."""
    for name, model in {"q": embedded(random_model(load(tiny)), 8), "f": random_model(load(tiny))}.items():
        folder = written(model, tmp_path / name)
        said = json.loads((folder / "llm_config.json").read_text("utf-8"))
        for key, value in (("hidden_size", 128), ("attention_mask", "int"), ("tie_embeddings", [1, 2, 3, 8, 32])):
            write_json(folder / "llm_config.json", {**said, key: value})
            with pytest.raises(FormatError, match=key):
                load(folder)
