"""What `import qalora` offers: an export with an adapter has the fine-tune in it; every name of the docs is there."""

import re
from pathlib import Path

import pytest

import qalora
from qalora.adapter import write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.errors import InputError
from qalora.folding import fold
from qalora.quantization import quantize
from qalora.testing import assert_same_model, random_adapter

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tiny: Path) -> Checkpoint:
    return quantize(load(tiny), bits=4, group_size=32)


@pytest.mark.parametrize("minima", [None, "float16", "float32"])
def test_an_export_with_an_adapter_has_the_fine_tune_in_it(base: Checkpoint, tmp_path: Path, minima) -> None:
    """The adapter as it is, and as a folder; in the dtype that is asked for."""
    adapter = random_adapter(base, seed=3, minima="float16")
    write_adapter(adapter, tmp_path / "adapter")
    for name, given in (("record", adapter), ("folder", tmp_path / "adapter")):
        qalora.export(base, ["qalora", "mlx"], tmp_path / name, adapter=given, minima=minima)
        for form in ("qalora", "mlx"):
            assert_same_model(load(tmp_path / name / form), fold(base, adapter, minima=minima or "float16"))
    qalora.export(base, "qalora", tmp_path / "plain")
    assert_same_model(load(tmp_path / "plain" / "qalora"), base)


def test_minima_without_an_adapter_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="minima are rounded by a fold: expected an adapter to fold, got none"):
        qalora.export(base, "qalora", tmp_path / "out", minima="float32")


def test_every_name_of_the_docs_is_there() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    texts += [str(getattr(qalora, name).__doc__) for name in qalora.__all__ if name != "__version__"]
    named = {name for text in texts for name in re.findall(r"`qalora\.([A-Za-z_]+)(?:\(|`)", text)}
    assert {"TrainOptions", "verify"} <= named
    modules = {path.stem for path in (ROOT / "qalora").iterdir()}
    keys = {"tensors", "adapter", "end_tokens"}  # of files, not of Python
    assert {name for name in named if not hasattr(qalora, name)} <= modules | keys
