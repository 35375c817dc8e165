"""A format is one record and one line: a toy in a module outside qalora goes all the way; no other file knows it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import qalora
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.errors import FormatError
from qalora.options.words import TARGETS
from qalora.quantization import quantize
from qalora.releasing.push import openings, plan_push
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama


@pytest.fixture(autouse=True)
def line() -> Iterator[None]:
    """The line of the registry."""
    TARGETS["toy"] = "toy_format"
    yield
    del TARGETS["toy"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours with quantized weights."""
    place = tmp_path_factory.mktemp("model")
    tiny_llama(place / "float", tokenizer=byte_tokenizer())
    qalora.save(quantize(qalora.load(place / "float"), bits=4, group_size=32), place / "base")
    return place / "base"


@pytest.fixture
def exported(model: Path, tmp_path: Path) -> Path:
    """By the command."""
    done = CliRunner().invoke(main, ["export", str(model), "--to", "toy", "-o", str(tmp_path / "dist")])
    assert done.exit_code == 0, done.output
    return tmp_path / "dist" / "toy"


def test_it_is_written_and_recognised(exported: Path, model: Path) -> None:
    found = qalora.load(exported)
    assert found.layout == "toy"
    report = qalora.inspect(exported)
    assert report.layout == "toy"
    assert report.nbytes == (exported / "model.toy").stat().st_size
    assert "model.toy" in report.files
    again = qalora.export(found, ["qalora"], exported.parent)
    assert len(again) == 1
    for file in ("model.safetensors", "config.json"):
        assert (exported.parent / "qalora" / file).read_bytes() == (model / file).read_bytes()


@pytest.mark.parametrize("level", ["weights", "generation"])
def test_it_is_proven(exported: Path, model: Path, level: str) -> None:
    """In its runtime too; then with a code changed, which is seen."""
    report = qalora.verify(model, exported.parent, level=level, max_tokens=40, generate=4)
    assert report.passed(), report.failure()
    assert [artifact.kind for artifact in report.artifacts] == ["toy"]
    assert [run.kind for artifact in report.artifacts for run in artifact.runs] == ["torch"] * (level != "weights")
    data = bytearray((exported / "model.toy").read_bytes())
    data[-1] ^= 1  # the last tensor of the narrowest type is codes
    (exported / "model.toy").write_bytes(data)
    report = qalora.verify(model, exported.parent, level="weights")
    assert report.artifacts[0].weights.total.codes_differ == 1
    assert not report.passed()


def test_it_may_be_the_reference(exported: Path, model: Path) -> None:
    assert qalora.verify(exported, model, level="generation", max_tokens=40, generate=4).passed()


def test_it_is_released(model: Path, tmp_path: Path) -> None:
    base: Checkpoint = qalora.load(model)
    qalora.release(
        base,
        qalora.Export(targets=("toy", "qalora"), name="tiny"),
        qalora.Package(out=tmp_path / "dist"),
        adapter=random_adapter(base, seed=1),
        verify=qalora.Verify(max_tokens=40, generate=4),
    )
    card = (tmp_path / "dist" / "README.md").read_text("utf-8")
    assert "### Toy: a format of the tests" in card
    assert "library_name: toybox" in card
    assert 'qalora.load("toy")' in card
    checked = qalora.check(tmp_path / "dist", base=base, open_artifacts=False)
    assert not checked.findings
    opened = dict(openings(plan_push(tmp_path / "dist", "owner/tiny")))
    assert opened["toy"].endswith('then qalora.load("tiny/toy")')


def test_a_release_is_checked_by_its_metadata(model: Path, tmp_path: Path) -> None:
    """What `told` reads is held against the manifest."""
    base = qalora.load(model)
    package = qalora.Package(out=tmp_path / "dist")
    qalora.release(base, qalora.Export(targets=("toy",)), package, verify=qalora.Verify(level="weights"))
    manifest = json.loads((tmp_path / "dist" / "manifest.json").read_text("utf-8"))
    manifest["versions"]["qalora"] = "9.9"
    (tmp_path / "dist" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    checked = qalora.check(tmp_path / "dist", open_artifacts=False)
    assert any("toy/model.toy: qalora.provenance.version" in finding.where for finding in checked.findings)


def test_without_its_line_it_is_nothing(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "other")
    kept = TARGETS.pop("toy")
    try:
        with pytest.raises(
            FormatError, match=r"quant_method: expected gptq, .*, qalora, .*, or a float model, got 'toy'"
        ):
            qalora.load(tmp_path / "other")
    finally:
        TARGETS["toy"] = kept
