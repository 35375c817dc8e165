"""A list of MNN's operators that becomes a decoder's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qalora.formats.mnn_graph import graph_bytes

__all__ = ["END", "Graph"]

END = 1 << 30
"""The end of a slice that goes to the last element."""

_TABLES = {
    "BinaryOp": "BinaryOp",
    "Cast": "CastParam",
    "Concat": "Axis",
    "Const": "Blob",
    "Convolution": "Convolution2D",
    "Input": "Input",
    "Reshape": "Reshape",
    "StridedSlice": "StridedSliceParam",
    "UnaryOp": "UnaryOp",
    "ConvertTensor": "TensorConvertInfo",
    "Attention": "AttentionParam",
    "LayerNorm": "LayerNorm",
}


@dataclass(slots=True, kw_only=True)
class Graph:
    """Operators one behind the other, of one output each. The method that adds one gives its name, which is its output.

    version  of MNN, as the graph says it: the one whose schema it has
    """

    version: str
    operators: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, inputs: Sequence[str], name: str, **main: Any) -> str:
        """Add an operator; main: the fields of its table."""
        if name in self.numbers:
            raise ValueError(f"two operators are called {name}")
        made: dict[str, Any] = {"inputIndexes": [self.numbers[each] for each in inputs]} if inputs else {}
        self.numbers[name] = len(self.numbers)
        made |= {"main_type": _TABLES[kind], "main": main, "name": name, "outputIndexes": [self.numbers[name]]}
        self.operators.append({**made, "type": kind, "defaultDimentionFormat": "NHWC"})
        return name

    def input(self, name: str, shape: Sequence[int], kind: str) -> str:
        """An input of the graph; kind: DT_FLOAT or DT_INT32."""
        return self.add("Input", [], name, dims=list(shape), dtype=kind, dformat="NCHW")

    def sizes(self, *values: int) -> str:
        """An int32 vector: a place, or an axis."""
        name = f"sizes.{'_'.join(map(str, values))}"
        if name in self.numbers:
            return name
        shape = [len(values)]
        return self.add("Const", [], name, dims=shape, dataFormat="NCHW", dataType="DT_INT32", int32s=list(values))

    def floats(self, name: str, shape: Sequence[int], values: Sequence[float]) -> str:
        """A float32 constant."""
        return self.add(
            "Const", [], name, dims=list(shape), dataFormat="NCHW", dataType="DT_FLOAT", float32s=list(values)
        )

    def binary(self, kind: str, one: str, other: str, name: str) -> str:
        """ADD or MUL of two."""
        return self.add("BinaryOp", [one, other], name, opType=kind, T="DT_FLOAT", activationType=0)

    def unary(self, kind: str, x: str, name: str) -> str:
        """SIN, COS, NEG or SILU of one."""
        return self.add("UnaryOp", [x], name, opType=kind, T="DT_FLOAT")

    def shaped(self, x: str, name: str, *shape: int) -> str:
        """x in another shape; -1 for the size that is left."""
        return self.add("Reshape", [x], name, dims=list(shape), dimType="NCHW")

    def joined(self, one: str, other: str, name: str) -> str:
        """Both, along the last axis."""
        return self.add("Concat", [one, other], name, axis=-1)

    def sliced(self, x: str, start: str, stop: int, axis: int, name: str) -> str:
        """x[start:stop] along an axis; start: a vector of one number."""
        ends = [self.sizes(stop), self.sizes(axis)]
        masks = dict.fromkeys(("beginMask", "endMask", "ellipsisMask", "newAxisMask", "shrinkAxisMask"), 0)
        types = {"Index": "DT_INVALID", "T": "DT_INVALID"}
        return self.add("StridedSlice", [x, start, *ends], name, **types, **masks, fromType=1)

    def linear(self, x: str, name: str, shape: tuple[int, int], main: Mapping[str, Any], out: str) -> str:
        """x, [1, n, in], times a weight [out, in], as a convolution of one pixel; main: `external`, `quanParameter`."""
        rows, columns = shape
        ones = dict.fromkeys(("kernelX", "kernelY", "strideX", "strideY", "dilateX", "dilateY", "group"), 1)
        flat = self.shaped(x, f"{out}.pixels", -1, columns, 1, 1)
        packed = self.add("ConvertTensor", [flat], f"{out}.packed", source="NCHW", dest="NC4HW4")
        common = {**ones, "padMode": "CAFFE", "outputCount": rows, "inputCount": columns}
        product = self.add("Convolution", [packed], name, common=common, **main)
        plain = self.add("ConvertTensor", [product], f"{out}.plain", source="NC4HW4", dest="NCHW")
        return self.shaped(plain, out, 1, -1, rows)

    def content(self, outputs: Sequence[str]) -> bytes:
        """The bytes of the graph."""
        return graph_bytes(
            {
                "bizCode": "qalora",
                "extraInfo": {"version": self.version},
                "oplists": self.operators,
                "outputName": list(outputs),
                "sourceType": "ONNX",
                "tensorName": list(self.numbers),
                "mnn_uuid": "",
            }
        )
