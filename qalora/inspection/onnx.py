"""The warnings of an ONNX decoder."""

from __future__ import annotations

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.files import accuracy_level
from qalora.inspection.records import Finding

__all__ = ["findings"]


def findings(model: Checkpoint) -> list[Finding]:
    """Activations in 8 bits."""
    graph = model.path if model.path.is_file() else model.path / "model.onnx"
    level = accuracy_level(graph)
    if level < 4:
        return []
    return [
        Finding(
            code="runtime",
            message="ONNX Runtime computes it with activations in 8 bits: about 4e-3 to 8e-3 of each product is lost",
            evidence="its MatMulNBits nodes have accuracy_level 4",
            todo="export it again without --accuracy-level, unless the speed was wanted",
        )
    ]
