"""Folders for transformers.js: what they hold, what the library makes of them in Node, and what is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from embeddings import EMBEDDING, with_coded_embedding
from in_float64 import float64
from in_node import IN_NODE, missing_in_node
from qalora.checkpoint import Checkpoint
from qalora.converters import exports, load
from qalora.converters.format import Released
from qalora.converters.plan import ExportOptions
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.transformersjs import FORMAT, planner
from qalora.errors import FormatError, InputError, MissingLibraryError
from qalora.parity import verify
from qalora.parity.runtimes import open_runtime
from qalora.parity.runtimes.onnxruntime import OnnxRuntime
from qalora.pipeline.cached import proof_versions
from qalora.quantization import quantize
from qalora.tensor import BITS
from qalora.testing import (
    assert_same_model,
    byte_tokenizer,
    random_model,
    small_tokenizer,
    tiny_llama,
)

GRAPH = "onnx/model_q4.onnx"
TOKENS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(7))
KEY = "transformers.js_config"


def written(model: Checkpoint, out: Path, **options: Any) -> Path:
    exports.export(model, ["transformersjs"], out, ExportOptions(**options))
    return out / "transformersjs"


def parsed(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.pairs(bits=BITS, zeros=["real", "integer", "symmetric"], group_size=[16, 32, 64, None])
def test_it_holds_what_the_onnx_folder_does(
    bits: int,
    zeros: Literal["real", "integer", "symmetric"],
    group_size: int | None,
    untied: Checkpoint,
    tmp_path: Path,
) -> None:
    """The same bytes, and the same graph but for the name of the file that it reads."""
    model = random_model(untied, bits=bits, zeros=zeros, group_size=group_size)
    folder = written(model, tmp_path)
    assert_same_model(load(folder), model)
    exports.export(model, ["onnx"], tmp_path, ExportOptions(onnx_graphs="fast"))
    data = (tmp_path / "onnx" / "model.onnx.data").read_bytes()
    assert (folder / f"{GRAPH}_data").read_bytes() == data
    mine, other = (onnx.load(path, load_external_data=False) for path in (folder / GRAPH, tmp_path / "onnx/model.onnx"))
    for proto in mine.graph.initializer:
        for entry in proto.external_data:
            entry.value = entry.value.replace("model_q4.onnx_data", "model.onnx.data")
    assert mine == other


def test_an_embedding_of_codes_stays_one(tiny: Path, tmp_path: Path) -> None:
    """Whatever is asked for the ONNX folder."""
    model = with_coded_embedding(random_model(load(tiny)))
    folder = written(model, tmp_path, onnx_embedding="float32")
    assert_same_model(load(folder), model)
    assert load(folder).tensors[EMBEDDING].spec is not None


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose tokenizer has a token of a space and the first byte of one half, as SmolLM2's has."""
    root = tmp_path_factory.mktemp("numbers")
    tokenizer = small_tokenizer(size=300)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    vocabulary["\u0120\u00c2"] = vocabulary.pop("".join(merges.pop()))
    merges.append(["\u0120", "\u00c2"])
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>")
    return quantize(load(tiny_llama(root / "float", tokenizer=made)), group_size=32)


NUMBERS = "x \u00bd \u00b2 12 \u2167 \u0663\u0664 a1b \u00bd\u00bd"


def test_digits_are_in_words_that_the_library_takes(numbers: Checkpoint, tmp_path: Path) -> None:
    """The same tokens in transformers; and the folder goes on to GGUF, where the rule has a name."""
    folder = written(numbers, tmp_path)
    steps = parsed(folder / "tokenizer.json")["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Split", "ByteLevel"]
    again = load(folder)
    for text in (NUMBERS, "a1 23", "none"):
        assert load_tokenizer(again)(text)["input_ids"] == load_tokenizer(numbers)(text)["input_ids"]
    assert planner.WORDS in planner.plan(numbers, ExportOptions()).notes
    exports.export(again, ["gguf"], tmp_path)
    assert load_tokenizer(load(next((tmp_path / "gguf").glob("*.gguf"))))(NUMBERS) == load_tokenizer(numbers)(NUMBERS)


def test_data_in_several_files(untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each below the limit, named as the library looks for them; ONNX Runtime makes the same of it as of one."""
    model = quantize(untied, group_size=32)
    whole = written(model, tmp_path / "whole")
    size = (whole / f"{GRAPH}_data").stat().st_size
    monkeypatch.setattr(planner, "LIMIT", size // 3)
    folder = written(model, tmp_path / "parts")
    count = parsed(folder / "config.json")[KEY]["use_external_data_format"]
    names = [f"{GRAPH}_data", *(f"{GRAPH}_data_{n}" for n in range(1, count))]
    assert count > 3
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == sorted(
        ["model_q4.onnx", *(Path(name).name for name in names)]
    )
    assert all(0 < (folder / name).stat().st_size <= size // 3 for name in names)
    assert_same_model(load(folder), model)
    logits = [OnnxRuntime(place / GRAPH, 1).logits(TOKENS.tolist()) for place in (whole, folder)]
    assert torch.equal(*logits)
    (folder / names[-1]).unlink()
    with pytest.raises(FormatError, match="got no such file"):
        load(folder)


def test_a_tensor_that_no_file_holds_is_refused(
    untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "LIMIT", 20_000)
    with pytest.raises(InputError, match=r"lm_head.weight: expected at most 20,000 bytes, which is one file, got"):
        written(untied, tmp_path)
    assert not (tmp_path / "transformersjs").exists()


def test_the_config_has_what_the_library_has_no_default_for(tmp_path: Path) -> None:
    """And is as it was when it is read back."""
    model = tiny_llama(tmp_path / "float", config={"num_key_value_heads": 4, "num_attention_heads": 4})
    config = {key: value for key, value in parsed(model / "config.json").items() if key != "head_dim"}
    (model / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None}), encoding="utf-8")
    folder = written(load(model), tmp_path)
    found = parsed(folder / "config.json")
    assert (found["head_dim"], found["num_key_value_heads"]) == (config["hidden_size"] // 4, 4)
    assert found[KEY] == {"dtype": "q4", "use_external_data_format": 1}
    assert KEY not in load(folder).config


@pytest.mark.parametrize("several", [False, True])
def test_chat_templates_are_where_the_library_looks(several: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool use": "{{ 2 }}"} if several else "{{ 1 }}"
    source = tiny_llama(tmp_path / "float", tokenizer=tokenizer)
    assert "chat_template" not in parsed(source / "tokenizer_config.json")
    folder = written(load(source), tmp_path)
    listed = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool use", "template": "{{ 2 }}"}]
    assert parsed(folder / "tokenizer_config.json")["chat_template"] == (listed if several else "{{ 1 }}")


def test_a_graph_of_another_project_is_refused(untied: Checkpoint, tmp_path: Path) -> None:
    folder = written(untied, tmp_path)
    graph = onnx.load(folder / GRAPH, load_external_data=False)
    del graph.metadata_props[:]
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    with pytest.raises(FormatError, match="expected a graph that qalora wrote, got another one"):
        load(folder)


def test_a_model_without_a_tokenizer_json_is_told(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())
    content = parsed(source / "tokenizer.json")["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    jobs = exports.export_jobs(load(source), ["transformersjs"], ExportOptions())
    assert planner.TEXTLESS in jobs[0].plan.notes


# ---- without Node


@pytest.mark.parametrize("kind", IN_NODE)
def test_what_is_missing_is_named(
    kind: str, untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node itself, or the package; an artefact is not proven then."""
    folder = written(untied, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingLibraryError, match=r"a transformers\.js artefact needs Node, which is not .*; install"):
        open_runtime(kind, folder)
    report = verify(untied, [folder], level="logits", tokens=TOKENS.tolist(), threads=1)
    assert not report.passed() and "needs Node, which is not installed" in report.failure()


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node")
@pytest.mark.parametrize("kind", IN_NODE)
def test_packages_come_from_node_path_alone(
    kind: str, untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies where a proof is started is not run."""
    package = tmp_path / "node_modules" / "@huggingface" / "transformers"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"name": "@huggingface/transformers", "version": "9", "main": "a.js"}')
    (package / "a.js").write_text(f"require('fs').writeFileSync({json.dumps(str(tmp_path / 'ran'))}, '')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(MissingLibraryError, match="npm install @huggingface/transformers, and let NODE_PATH name"):
        open_runtime(kind, written(untied, tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


def test_a_proof_depends_on_the_packages_of_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_PATH", str(tmp_path))
    assert "onnxruntime-node" not in proof_versions(["transformersjs"])
    (tmp_path / "onnxruntime-node").mkdir()
    (tmp_path / "onnxruntime-node" / "package.json").write_text('{"version": "1.30.0"}', encoding="utf-8")
    assert proof_versions(["transformersjs"])["onnxruntime-node"] == "1.30.0"


# ---- in Node

in_node = pytest.mark.skipif(bool(missing_in_node()), reason=missing_in_node())


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("speaking")
    return quantize(load(tiny_llama(root / "float", tokenizer=small_tokenizer(size=300))), group_size=32)


@in_node
@pytest.mark.slow
@pytest.mark.parametrize(("embedding", "limit"), [("floats", planner.LIMIT), ("floats", 100_000), ("codes", 100_000)])
@pytest.mark.parametrize("kind", IN_NODE)
def test_it_computes_the_same(
    kind: str, embedding: str, limit: int, speaking: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 8 times torch's own float32 error: at once, step by step, in a batch; greedy tokens are the best ones.

    The data are in one file, or in several.
    """
    monkeypatch.setattr(planner, "LIMIT", limit)
    model = with_coded_embedding(speaking) if embedding == "codes" else speaking
    folder, tokens = written(model, tmp_path), TOKENS.tolist()
    assert (parsed(folder / "config.json")[KEY]["use_external_data_format"] > 1) == (limit == 100_000)
    (double,), noise = float64(model, TOKENS[None])
    runtime = open_runtime(kind, folder, threads=1)
    batch = runtime.batch([tokens[:20], tokens[:7], tokens[:12]])
    for got in (runtime.logits(tokens), runtime.steps(tokens), *batch):
        error = float((got.double() - double[: len(got)]).abs().max())
        assert error <= 8 * noise, f"{error:.2g} with torch at {noise:.2g}"
    made = runtime.generate(tokens[:8], 6)
    assert runtime.logits([*tokens[:8], *made]).argmax(1)[7:-1].tolist() == made
    runtime.close()


@in_node
@pytest.mark.slow
def test_digits_are_what_transformers_takes_for_digits(numbers: Checkpoint, tmp_path: Path) -> None:
    """Without the other words transformers.js joins a space and one half's first byte."""
    folder, wanted = written(numbers, tmp_path), load_tokenizer(numbers)(NUMBERS)["input_ids"]
    for rule, same in ((None, True), (parsed(numbers.files["tokenizer.json"])["pre_tokenizer"], False)):
        if rule is not None:
            content = parsed(folder / "tokenizer.json") | {"pre_tokenizer": rule}
            (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        runtime = open_runtime("transformers.js", folder, threads=1)
        assert runtime.words is not None
        assert (runtime.words.tokenize(NUMBERS) == wanted) == same
        runtime.close()


@in_node
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_proof_with_tokenizer_and_ends(speaking: Checkpoint, tmp_path: Path) -> None:
    folder = written(speaking, tmp_path)
    report = verify(speaking, [folder], tokens=TOKENS.tolist() * 2, generate=4, threads=1)
    assert report.passed(), report.failure()
    library, web = report.artifacts[0].runs
    assert (library.kind, web.kind) == IN_NODE
    assert {"end", "tokenizer"} <= {gate.gate for gate in library.gates if gate.status == "pass"}
    content = parsed(folder / "generation_config.json")
    (folder / "generation_config.json").write_text(json.dumps({**content, "eos_token_id": 7}), encoding="utf-8")
    assert "end" in verify(speaking, [folder], tokens=TOKENS.tolist() * 2, threads=1).failure()


@in_node
@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_NODE)
@pytest.mark.parametrize("damage", ["graph", "config"])
def test_what_it_does_not_load_is_one_sentence(damage: str, kind: str, speaking: Checkpoint, tmp_path: Path) -> None:
    folder = written(speaking, tmp_path)
    (folder / (GRAPH if damage == "graph" else "config.json")).write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=f"{kind} does not load it") as caught:
        open_runtime(kind, folder, threads=1)
    assert "\n" not in str(caught.value)


@in_node
@pytest.mark.slow
def test_the_text_of_a_card_runs(speaking: Checkpoint, tmp_path: Path) -> None:
    """As a module beside the folder; what it prints begins with the prompt."""
    written(speaking, tmp_path)
    text = FORMAT.usage(Released(model="m", files=(), carriers=()))
    (tmp_path / "card.mjs").write_text(text.removeprefix("```js\n").removesuffix("```"), encoding="utf-8")
    (tmp_path / "node_modules").symlink_to(os.environ["NODE_PATH"].split(os.pathsep)[0])
    done = subprocess.run(["node", "card.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
