"""What whole runs are tried on: a tiny base of integers, and a short text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.demo import demo_text
from qalora.quantization.model import quantize
from qalora.training import StepReport, TrainOptions, train


@pytest.fixture(scope="module")
def base(tiny: Path) -> Checkpoint:
    return quantize(load(tiny), bits=4, group_size=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo_text()[:12_000], encoding="utf-8")
    return path


@pytest.fixture
def leave() -> Callable[[Checkpoint, TrainOptions, int], None]:
    """Train, and leave the run after a step, as Ctrl-C would: a checkpoint of an earlier step stays."""

    def left(base: Checkpoint, chosen: TrainOptions, step: int) -> None:
        def interrupt(report: StepReport) -> None:
            if report.step == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(base, chosen, interrupt)

    return left
