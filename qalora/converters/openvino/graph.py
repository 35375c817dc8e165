"""A list of layers that becomes a decoder's graph, and the small constants that it needs beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qalora.formats.openvino import Constant, Layer

__all__ = ["LAST", "Graph"]

LAST = 2**63 - 1
"""The end of a slice that goes to the last element."""

_PAIRWISE = {"auto_broadcast": "numpy"}

_KINDS: dict[str, tuple[str, Mapping[str, str]]] = {
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Power", "Select"), ("opset1", _PAIRWISE)),
    **dict.fromkeys(("Equal", "LessEqual", "Greater", "NotEqual", "LogicalAnd"), ("opset1", _PAIRWISE)),
    "BitwiseAnd": ("opset13", _PAIRWISE),
    "Divide": ("opset1", {**_PAIRWISE, "m_pythondiv": "true"}),
    **dict.fromkeys(("Negative", "Sqrt", "Sin", "Cos", "Tanh", "Log", "Transpose"), ("opset1", {})),
    **dict.fromkeys(("Unsqueeze", "Squeeze", "VariadicSplit", "Concat", "Convert", "Result"), ("opset1", {})),
    "ReduceMean": ("opset1", {"keep_dims": "true"}),
    "ReduceMax": ("opset1", {"keep_dims": "false"}),
    "Reshape": ("opset1", {"special_zero": "true"}),
    "MatMul": ("opset1", {"transpose_a": "false", "transpose_b": "false"}),
    "Parameter": ("opset1", {}),
    "Gather": ("opset8", {"batch_dims": "0"}),
    "ShapeOf": ("opset3", {"output_type": "i64"}),
    "Broadcast": ("opset3", {"mode": "bidirectional"}),
    "Slice": ("opset8", {}),
    "Range": ("opset4", {"output_type": "i64"}),
    "Swish": ("opset4", {}),
    "Gelu": ("opset7", {"approximation_mode": "TANH"}),
    "SoftMax": ("opset8", {"axis": "-1"}),
    "ScaledDotProductAttention": ("opset13", {"causal": "false"}),
    "ReadValue": ("opset6", {}),
    "Assign": ("opset6", {}),
}
"""The operators that are used: the set that has each, and its attributes where nothing else is said."""


@dataclass(slots=True, kw_only=True)
class Graph:
    """Layers one behind the other; each method that adds one gives its name, which stands for its first output.

    data    the weights by name
    small   the other constants, by name, with their values
    orders  what `column_order.shared_orders` gives
    """

    data: Mapping[str, Constant]
    orders: Mapping[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    small: dict[str, tuple[Constant, Tensor]] = field(default_factory=dict)
    _known: dict[str, Layer] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = ("f32",),
        called: str = "",
        decompresses: bool = False,
        **attributes: str,
    ) -> str:
        """Add a layer, unless it is there. outputs: the types; called: the name of the first one's tensor."""
        opset, usual = _KINDS[kind]
        return self._put(
            Layer(
                name=name,
                kind=kind,
                opset=opset,
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                attributes={**usual, **attributes},
                names=called,
                decompresses=decompresses,
            )
        )

    def _put(self, layer: Layer) -> str:
        if layer.name not in self._known:
            self.layers.append(layer)
        if self._known.setdefault(layer.name, layer) != layer:
            raise ValueError(f"two layers are called {layer.name}")
        return layer.name

    def stored(self, name: str) -> str:
        """A constant of the weights, as it is stored."""
        return self._constant(self.data[name])

    def wide(self, name: str, *, kept: bool = False) -> str:
        """A constant of the weights in float32; kept: the runtime may hold the floats as they are stored."""
        item = self.data[name]
        if item.element == "f32":
            return self.stored(name)
        return self.add("Convert", [self.stored(name)], f"{name}/f32", destination_type="f32", decompresses=kept)

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.values(f"number.{value!r}", torch.tensor(value, dtype=torch.float32))

    def whole(self, value: int) -> str:
        """An int64 scalar."""
        return self.values(f"whole.{value}", torch.tensor(value))

    def sizes(self, *values: int) -> str:
        """An int64 vector: a shape, axes, or an index."""
        return self.values(f"sizes.{'_'.join(map(str, values))}", torch.tensor(values))

    def values(self, name: str, tensor: Tensor) -> str:
        """A constant that is no weight: float32 or int64."""
        if name not in self.small:
            element = "i64" if tensor.dtype is torch.int64 else "f32"
            self.small[name] = (Constant(name=name, element=element, shape=tuple(tensor.shape)), tensor)
        return self._constant(self.small[name][0])

    def _constant(self, item: Constant) -> str:
        return self._put(Layer(name=item.name, kind="Const", opset="opset1", outputs=(item.element,)))

    def sliced(self, x: str, start: int, stop: int, step: int, axis: int, name: str) -> str:
        """x[start:stop:step] along an axis."""
        return self.add("Slice", [x, *map(self.sizes, (start, stop, step, axis))], name)

    def turned(self, x: str, name: str) -> str:
        """x with its second and third axes exchanged."""
        return self.add("Transpose", [x, self.sizes(0, 2, 1, 3)], name)

    def ordered(self, x: str, module: str) -> str:
        """What a module's codes are multiplied with: x, gathered once for each order where there is act-order."""
        if module not in self.orders:
            return x
        order = f"{self.orders[module]}.order"
        return self.add("Gather", [x, self.stored(order), self.whole(-1)], f"{x}/by/{order}")
