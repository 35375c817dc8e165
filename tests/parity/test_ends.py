"""The gate on end tokens, in files and in runtimes; and generations that do end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora import export
from qalora.converters import load
from qalora.converters.ends import GENERATION, ends_of
from qalora.parity import ParityReport, verify
from qalora.parity.ends import EndDifferences, EndsCheck, RuntimeEnds
from qalora.parity.evidence import Evidence
from qalora.parity.gates import judge
from qalora.parity.runtimes import open_runtime
from qalora.testing import CHAT_LAYOUTS, chat_layout, chat_model, random_model

pytestmark = pytest.mark.filterwarnings("ignore")
RUNS = {"gptq": "gptqmodel", "gguf": "llama.cpp", "onnx": "onnxruntime-genai", "mlx": "mlx", "qalora": "torch"}
PROMPT = "The Python language is"


def artifact(form: str, folder: Path) -> Path:
    return next((folder / form).glob("*.gguf")) if form == "gguf" else folder / form


def end_gates(report: ParityReport) -> dict[str, tuple[str, str]]:
    return {where: (result.status, result.detail) for where, result in report.results() if result.gate == "end"}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (EndDifferences(), "pass"),
        (EndDifferences(own=("5",)), "ambiguous"),
        (EndDifferences(own=("5",), extra=("6",)), "fail"),
        (EndDifferences(missing=("2",)), "fail"),
        (EndDifferences(missing=("2",), own=("5",)), "fail"),
    ],
)
def test_only_a_runtimes_own_ends_are_ambiguous(found: EndDifferences, status: str) -> None:
    (result,) = judge(Evidence(ends=found))
    assert (result.gate, result.status) == ("end", status)


def test_tokens_are_named_with_their_texts(tmp_path: Path) -> None:
    check = EndsCheck(load(chat_model(tmp_path, "llama3")))
    found = check.compare_runtime(RuntimeEnds(ids=frozenset({385, 390, 3}), own=frozenset({390})))
    assert str(found) == (
        "it does not end at 391 '<|eot_id|>'; it ends at 3 '$' too; the runtime ends at 390 '<|eom_id|>' too, "
        "whatever a file says"
    )


@pytest.mark.parametrize("form", ["gguf", "onnx", "mlx", "gptq"])
def test_a_file_that_lost_its_end_of_turn_fails(form: str, tmp_path: Path) -> None:
    """By other means than ours: the artefact is edited after it was written."""
    from qalora.formats.gguf import Value, parse_metadata

    layout = chat_layout("phi3")
    model = random_model(load(chat_model(tmp_path / "model", layout)))
    export(model, form, tmp_path)
    place = artifact(form, tmp_path)
    assert {status for status, _ in end_gates(verify(model, [place], level="weights")).values()} == {"pass"}
    lost = layout.token("<|assistant|>")
    if form == "gguf":
        eot = parse_metadata(place).get("tokenizer.ggml.eot_token_id")
        assert eot == lost, "the one that llama.cpp has no name for"
        data = place.read_bytes()
        before = (
            b"tokenizer.ggml.eot_token_id" + Value.uint32(eot).type.to_bytes(4, "little") + eot.to_bytes(4, "little")
        )
        assert data.count(before) == 1
        place.write_bytes(data.replace(before, before[:-4] + (7).to_bytes(4, "little")))
    else:
        path = place / ("genai_config.json" if form == "onnx" else GENERATION)
        content = json.loads(path.read_text("utf-8"))
        owner = content["model"] if form == "onnx" else content
        owner["eos_token_id"].remove(lost)
        path.write_text(json.dumps(content), encoding="utf-8")
    found = end_gates(verify(model, [place], level="weights"))
    assert [detail for status, detail in found.values() if status == "fail" and f"not end at {lost}" in detail], found


@pytest.mark.slow
@pytest.mark.parametrize("form", RUNS)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "phi3", "qwen2.5", "mistral"])
def test_each_runtime_says_its_own_end_tokens(form: str, name: str, tmp_path: Path) -> None:
    """Nothing is missing in any; llama.cpp alone has more, and says which."""
    model = random_model(load(chat_model(tmp_path / "model", name)))
    export(model, form, tmp_path)
    runtime = open_runtime(RUNS[form], artifact(form, tmp_path))
    found = runtime.ends()
    runtime.close()
    assert found is not None
    assert found.ids - found.own <= set(ends_of(model).ids) <= found.ids
    assert form == "gguf" or found.ids == set(ends_of(model).ids)


def says(layout: Any) -> str:
    """The text of the end token that config.json and the tokenizer are the likeliest to forget: the last one."""
    ends = layout.generation["eos_token_id"]
    token: str = layout.tokenizer.convert_ids_to_tokens(ends[-1] if isinstance(ends, list) else ends)
    return token


def generated(form: str, place: Path, prompt: list[int]) -> list[int]:
    """What the library's own generation makes of a prompt, at most six tokens."""
    if form == "onnx":
        runtime = open_runtime("onnxruntime-genai", place)
        made = runtime.generate(prompt, 6)
        runtime.close()
        return made
    if form == "mlx":
        import mlx.core
        from mlx_lm import load as load_mlx
        from mlx_lm.generate import stream_generate

        with mlx.core.stream(mlx.core.cpu):
            model, tokenizer = load_mlx(str(place))
            return [step.token for step in stream_generate(model, tokenizer, prompt, max_tokens=6)]
    if form == "gguf":
        runtime = open_runtime("llama.cpp", place)
        ends, made = runtime.ends(), runtime.generate(prompt, 6)
        runtime.close()
        assert ends is not None
        stop = next((n for n, token in enumerate(made) if token in ends.ids), len(made) - 1)
        return made[: stop + 1]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("form", ["source", "qalora", "gguf", "onnx", "mlx"])
@pytest.mark.parametrize("name", CHAT_LAYOUTS)
def test_a_generation_ends_at_the_end_of_a_turn(form: str, name: str, tmp_path: Path) -> None:
    """A model that says one token for ever, unless its runtime knows that it is an end."""
    from qalora.quantization import quantize

    layout = chat_layout(name)
    folder = chat_model(tmp_path / "model", layout, says=says(layout))
    place = folder
    if form != "source":
        export(quantize(load(folder), bits=4, group_size=32), form, tmp_path)
        place = artifact(form, tmp_path)
    prompt = layout.tokenizer(PROMPT)["input_ids"]
    assert generated(form, place, prompt) == [layout.token(says(layout))]
