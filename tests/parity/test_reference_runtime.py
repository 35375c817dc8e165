"""The reference in its own runtime: whether what the readers made of a file is what its owner makes of it."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from other_keys import with_another_rope_key
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.parity import ParityReport, verify
from qalora.testing import random_model
from targets import skip_without_mnn

OWN = {
    "huggingface": ("transformers", "logits"),
    "gptq": ("gptqmodel", "kernel rounding"),
    "gguf": ("llama.cpp", "activation rounding"),
    "onnx": ("onnxruntime", "logits"),
    "mlx": ("mlx", "logits"),
    "hqq": ("hqq", "logits"),
    "torchao": ("torchao", "logits"),
    "mnn": ("mnn", "logits"),
}
"""The runtime that owns a format, and the gate that its logits are judged by."""

Write = Callable[[str, Checkpoint, Path], Path]


@pytest.fixture(scope="module")
def places(tiny: Path, base: Checkpoint, write: Write, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in each format; with the middle zero points, so that a GPTQ folder has no residual beside it."""
    root = tmp_path_factory.mktemp("references")
    model = random_model(load(tiny), zeros="symmetric")
    made = {kind: write(kind, model, root) for kind in OWN if kind != "huggingface"}
    (made["gguf"],) = made["gguf"].glob("*.gguf")
    return {"huggingface": tiny, "qalora": write("qalora", model, root), **made}


def compare(reference: Checkpoint | Path, artifact: Path) -> ParityReport:
    return verify(reference, [artifact], level="logits", max_tokens=40)


def failures(report: ParityReport) -> set[tuple[str, str]]:
    return {(where, result.gate) for where, result in report.results() if result.status != "pass"}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.filterwarnings("ignore")
def test_a_reference_is_run_in_the_runtime_that_owns_its_format(kind: str, places: dict[str, Path]) -> None:
    if kind == "mnn":
        skip_without_mnn()
    runtime, gate = OWN[kind]
    report = compare(places[kind], places["qalora" if kind != "huggingface" else kind])
    (run,) = report.reference_runs
    assert run.kind == runtime
    assert gate in {result.gate for result in run.gates}
    other = {result.gate: result.status for result in run.gates if result.status != "pass"}
    assert other == ({"end": "ambiguous"} if kind == "gguf" else {})  # llama.cpp ends at <|endoftext|> by its name
    assert report.passed()


def other_rope(read: Checkpoint) -> Checkpoint:
    """What a reader gives that misses a rope key."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    wrong = replace(read, config={**read.config, "rope_parameters": rope})
    return replace(wrong, stored=wrong)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.filterwarnings("ignore")
def test_a_fault_of_the_reader_fails_the_reference_and_no_artefact(
    kind: str, places: dict[str, Path], write: Write, tmp_path: Path
) -> None:
    """The artefact is made of the same wrong reading, and agrees with it."""
    if kind == "mnn":
        skip_without_mnn()
    runtime, gate = OWN[kind]
    wrong = other_rope(load(places[kind]))
    report = compare(wrong, write("qalora", wrong, tmp_path) if kind != "huggingface" else places["qalora"])
    found = failures(report)
    assert (f"reference in {runtime}", gate) in found
    if kind != "huggingface":
        assert {where for where, _ in found} == {f"reference in {runtime}"}
    assert not report.passed()
    assert report.failure().startswith(f"reference in {runtime}: {gate}")


@pytest.mark.parametrize("kind", [kind for kind in OWN if kind not in ("onnx", "mnn")])
@pytest.mark.filterwarnings("ignore")
def test_rope_keys_that_disagree_are_read_as_the_owner_reads_them(
    kind: str, places: dict[str, Path], write: Write, tmp_path: Path
) -> None:
    """A reader that missed the second key would fail the reference, and nothing else."""
    if kind == "mnn":
        skip_without_mnn()
    runtime, gate = OWN[kind]
    place = with_another_rope_key(places[kind], tmp_path / "edited")
    model = load(place)
    artifact = write("qalora", model, tmp_path / "right") if kind != "huggingface" else place
    report = compare(place, artifact)
    assert gate in {result.gate for result in report.reference_runs[0].gates}
    assert report.passed()
    missed = replace(model, config=load(places[kind]).config)
    missed = replace(missed, stored=missed)
    found = failures(compare(missed, write("qalora", missed, tmp_path / "wrong") if kind != "huggingface" else place))
    assert (f"reference in {runtime}", gate) in found
    if kind != "huggingface":
        assert {where for where, _ in found} == {f"reference in {runtime}"}


def test_what_no_file_holds_has_no_runtime_of_its_own(
    places: dict[str, Path], base: Checkpoint, folded: Checkpoint, write: Write, tmp_path: Path
) -> None:
    """Models that were quantized or folded in memory, and our own folder, which no other library reads by itself."""
    artifact = write("qalora", folded, tmp_path)
    for reference in (folded, replace(folded, stored=base.stored), artifact):
        report = compare(reference, artifact)
        assert report.reference_runs == ()
        assert report.passed()


def test_a_runtime_that_is_missing_leaves_the_reference_unproven(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = {"xllamacpp", "llama_cpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    report = compare(places["gguf"], places["qalora"])
    assert failures(report) == {("reference in llama.cpp", "runtime")}
    assert not report.passed()
    assert report.passed(allow_unproven=True)
