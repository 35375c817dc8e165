"""The gate on end tokens, in files and in runtimes. Generations that do end are in tests/release/test_layouts.py."""

import json
from pathlib import Path

import pytest

from qalora import export
from qalora.converters import load
from qalora.converters.ends import GENERATION
from qalora.parity import ParityReport, verify
from qalora.parity.ends import EndDifferences, EndsCheck, RuntimeEnds
from qalora.parity.evidence import Evidence
from qalora.parity.gates import judge
from qalora.testing import chat_layout, chat_model, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


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
