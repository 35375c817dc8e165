"""What an artefact holds is read from a field of its checkpoint; no sentence for people decides it."""

from dataclasses import replace
from pathlib import Path

import pytest

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export_jobs, run_jobs
from qalora.converters.plan import ExportOptions
from qalora.parity.artifacts import recognize
from qalora.parity.models import holds
from qalora.quantization import quantize
from qalora.testing import random_adapter


@pytest.fixture(scope="module")
def whole(tiny: Path) -> tuple[Checkpoint, Adapter]:
    """A base of integer zero points, over which an adapter travels beside, and the adapter."""
    base = quantize(load(tiny), bits=4, group_size=32, zeros="integer")
    return base, random_adapter(base, seed=1)


@pytest.fixture(scope="module")
def beside(whole: tuple[Checkpoint, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder with the adapter beside the base's words."""
    base, adapter = whole
    out = tmp_path_factory.mktemp("beside")
    run_jobs(export_jobs(base, ["gptq"], ExportOptions(), adapter=adapter), out)
    return out / "gptq"


def test_a_reader_says_what_lies_beside(beside: Path) -> None:
    found = load(beside)
    assert found.beside == beside
    assert any("an adapter of its own" in note for note in found.notes)


@pytest.mark.parametrize("notes", [(), ("something else",), ("Un adaptateur se trouve à côté.",)])
def test_other_notes_change_nothing(beside: Path, whole: tuple[Checkpoint, Adapter], notes: tuple[str, ...]) -> None:
    (artifact,) = recognize([beside])
    found = replace(load(beside), notes=notes)
    assert holds(whole[1], artifact, found) == "base and adapter"
    assert holds(None, artifact, found) == "folded"


def test_a_note_that_begins_alike_makes_no_adapter(beside: Path, whole: tuple[Checkpoint, Adapter]) -> None:
    (artifact,) = recognize([beside])
    found = replace(load(beside), beside=None)
    assert found.notes
    assert holds(whole[1], artifact, found) == "folded"


def test_a_residual_is_no_adapter_beside(tiny: Path, tmp_path: Path) -> None:
    """What real zero points leave over lies in the same files, and is part of the weights."""
    base = quantize(load(tiny), bits=4, group_size=32)
    run_jobs(export_jobs(base, ["gptq"], ExportOptions()), tmp_path)
    assert (tmp_path / "gptq" / "adapter_config.json").is_file()
    assert load(tmp_path / "gptq").beside is None
