"""What whole runs are tried on: a tiny base of integers, and a short text."""

from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.demo import demo_text
from qalora.quantization.model import quantize


@pytest.fixture(scope="module")
def base(tiny: Path) -> Checkpoint:
    return quantize(load(tiny), bits=4, group_size=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo_text()[:12_000], encoding="utf-8")
    return path
