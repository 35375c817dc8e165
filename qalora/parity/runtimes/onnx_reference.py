"""Graphs of standard operators in ONNX's own reference evaluator: slow numpy, and the meaning of each operator."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.files import is_standard
from qalora.errors import FormatError, first_line
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.runtimes.onnxruntime import LAYER, DecoderRuntime

__all__ = ["open_artifact", "takes"]

LARGEST = 64 << 20
"""Bytes of weights up to which it is used: beyond, a single pass takes minutes."""

_TYPES = {1: "tensor(float)", 6: "tensor(int32)", 7: "tensor(int64)", 10: "tensor(float16)"}


def takes(path: Path, nbytes: int) -> bool:
    """Whether a graph with so many bytes of weights is small, and of standard operators."""
    return nbytes <= LARGEST and is_standard(path)


class OnnxReference(DecoderRuntime):
    """A graph in onnx.reference."""

    def __init__(self, file: Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        try:
            model = onnx.load(str(file))
            self._evaluator: Any = ReferenceEvaluator(model)
        except Exception as error:  # whatever a graph that it does not know makes it raise
            reason = first_line(error)
            raise FormatError(f"{file}: onnx.reference does not load it ({reason})") from error
        initialized = {item.name for item in model.graph.initializer}
        inputs = {
            value.name: (
                _TYPES[value.type.tensor_type.elem_type],
                [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim],
            )
            for value in model.graph.input
            if value.name not in initialized
        }
        super().__init__(inputs, [value.name for value in model.graph.output], "left")
        self.info = RuntimeInfo(
            name="onnx.reference", version=version("onnx"), backend="numpy", dtype="float32", threads=1
        )

    def _evaluate(self, outputs: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        values: list[Any] = self._evaluator.run(list(outputs), feed)
        return [np.asarray(value) for value in values]

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer."""
        nodes = self._evaluator.proto_.graph.node
        names = [name for node in nodes for name in node.output if LAYER.fullmatch(name)]
        feed = self._feed(torch.tensor([list(tokens)]), torch.ones(1, len(tokens), dtype=torch.int64), {})
        values: dict[str, Any] = self._evaluator.run(None, feed, intermediate=True)
        return [torch.from_numpy(np.asarray(values[name])[0]).float() for name in names]

    def close(self) -> None:
        """Free the graph."""
        del self._evaluator


def open_artifact(path: Path | Checkpoint, threads: int | None) -> OnnxReference:
    """Open a folder with model.onnx, or the file itself. Threads are numpy's own."""
    if not isinstance(path, Path):
        raise FormatError("onnx.reference", expected="an ONNX file or folder", got="a model in memory")
    return OnnxReference(path / "model.onnx" if path.is_dir() else path)
