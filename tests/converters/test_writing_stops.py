"""An export that stops, at a tensor that is read or in a thread that writes: nothing is left, and no thread runs."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.exports import export
from qalora.errors import FormatError
from qalora.tensor import GroupQuantTensor
from qalora.testing import random_model

TARGETS = ("gguf", "gptq", "hqq", "mlx", "openvino", "transformersjs", "qalora")


def _changed(model: Checkpoint, at: int, change: object) -> Checkpoint:
    """The model with a linear weight, by its place in the order of writing, that is changed or raises an error."""
    name = [name for name in model.tensors if name in model.linears][at]
    lazy = model.tensors[name]

    def read(start: int, stop: int) -> object:
        if isinstance(change, BaseException):
            raise change
        return change(lazy.read(start, stop))  # type: ignore[operator]

    made: LazyTensor = replace(lazy, read=read)  # type: ignore[arg-type]
    return replace(model, tensors={**model.tensors, name: made})


def _beyond_float16(tensor: GroupQuantTensor) -> GroupQuantTensor:
    return replace(tensor, scale=tensor.scale + 1e6, min=tensor.min + 1e6)


def _nothing_runs(out: Path) -> bool:
    return not list(out.iterdir()) and not [one for one in threading.enumerate() if "qalora" in one.name]


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupt_leaves_nothing(tiny: Path, tmp_path: Path, target: str) -> None:
    model = _changed(random_model(load(tiny)), 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export(model, [target], tmp_path)
    assert _nothing_runs(tmp_path)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "hqq"])  # which holds it, in float32
def test_what_a_thread_finds_is_told_before_what_is_read_later(tiny: Path, tmp_path: Path, target: str) -> None:
    model = _changed(random_model(load(tiny)), 2, _beyond_float16)
    later = _changed(model, 3, FormatError("read later"))
    for one in (model, later):
        with pytest.raises(ValueError, match=r"65504|promises|float16") as told:
            export(one, [target], tmp_path)
        assert "read later" not in str(told.value)
        assert _nothing_runs(tmp_path)
