"""The product of an activation with a linear weight, and what its kernels ask for: what both graphs build alike.

    y = Q(x; codes, scale, zero) + pool(x) @ residual [+ bias]

Each graph has its own operator for Q. `scale_of`, `zero_bytes` and `residual_of` make its inputs of constants of the
data file (see `carriers`), so that a runtime that folds constants makes them once, when it loads the model.
"""

from __future__ import annotations

from collections.abc import Callable

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.onnx.carriers import block_size, halves, middles
from qalora.converters.onnx.graph import Graph
from qalora.tensor import QuantSpec

__all__ = ["Product", "add_linear", "coded", "residual_of", "scale_of", "zero_bytes"]

Product = Callable[[str, str, str, LazyTensor, str], str]
"""Adds Q of an activation, a module, a half of it (`carriers.halves`) and its weight; gives the output's name."""


def add_linear(graph: Graph, model: Checkpoint, x: str, module: str, product: Product) -> str:
    """A linear layer of either kind, with its bias."""
    lazy, y = model.tensors[f"{module}.weight"], f"{module}.out"
    if lazy.spec is None:
        made = graph.add("MatMul", [x, f"{module}.weight"], y)
    else:
        made = _quantized(graph, x, module, lazy, lazy.spec, product)
    if f"{module}.bias" in model.tensors:
        made = graph.add("Add", [made, f"{module}.bias"], f"{y}.biased")
    return made


def _quantized(graph: Graph, x: str, module: str, lazy: LazyTensor, spec: QuantSpec, product: Product) -> str:
    y, x = f"{module}.out", graph.ordered(x, module)
    each = [product(x, module, half, lazy, f"{y}{half}") for half in halves(spec.bits)]
    made = each[0] if len(each) == 1 else graph.add("Add", each, f"{y}.halves")
    if spec.zeros == "integer":
        return made
    pooled = graph.pooled(x, spec.group_size, lazy.shape[1] // spec.group_size)
    branch = graph.add("MatMul", [pooled, residual_of(graph, module, spec)], f"{y}.branch")
    return graph.add("Add", [made, branch], f"{y}.sum")


def coded(lazy: LazyTensor) -> QuantSpec:
    """The spec of a weight that has one."""
    if lazy.spec is None:
        raise TypeError(f"{lazy.name} has no spec")
    return lazy.spec


def scale_of(graph: Graph, module: str, lazy: LazyTensor, spec: QuantSpec, half: str = "") -> str:
    """float32 [out, in/block]: the scale, repeated where blocks are smaller than groups; 16 times it for `_high`."""
    name, times = _wide(graph, f"{module}.scale"), spec.group_size // block_size(module, spec)
    if times > 1:
        rows, groups = lazy.shape[0], lazy.shape[1] // spec.group_size
        one = graph.once("Unsqueeze", [name, graph.constant("last_axis", [-1])], f"{module}.scale_group")
        whole = graph.constant(f"repeated_{rows}x{groups}x{times}", [rows, groups, times])
        each = graph.once("Expand", [one, whole], f"{module}.scale_repeated")
        flat = graph.constant(f"blocks_{rows}x{groups * times}", [rows, groups * times])
        name = graph.once("Reshape", [each, flat], f"{module}.scale_blocks")
    return name if half == "" else graph.once("Mul", [name, graph.number(16.0)], f"{module}.scale{half}")


def _wide(graph: Graph, name: str) -> str:
    from onnx import TensorProto

    if graph.data[name].dtype == "FLOAT":
        return name
    return graph.once("Cast", [name], f"{name}32", to=TensorProto.FLOAT)


def zero_bytes(graph: Graph, module: str, lazy: LazyTensor, spec: QuantSpec, half: str) -> str:
    """UINT8 [out, ceil(in/block / 2)]: integer zero points, or the middle one everywhere, low half first."""
    if spec.zeros == "integer":
        return f"{module}.zero{half}"
    from onnx import TensorProto, helper

    middle = middles(spec.bits)[half]
    rows, width = lazy.shape[0], (lazy.shape[1] // block_size(module, spec) + 1) // 2
    shape = graph.constant(f"bytes_{rows}x{width}", [rows, width])
    value = helper.make_tensor("value", TensorProto.UINT8, [1], [middle * 17])
    return graph.once("ConstantOfShape", [shape], f"middle_{middle}.{rows}x{width}", value=value)


def residual_of(graph: Graph, module: str, spec: QuantSpec) -> str:
    """float32 [groups, out]: C = min + 2^(bits-1) * scale, transposed, where zero points are real."""
    scale, minimum = (_wide(graph, f"{module}.{part}") for part in ("scale", "min"))
    times = graph.once("Mul", [scale, graph.number(float(1 << (spec.bits - 1)))], f"{module}.middle")
    whole = graph.once("Add", [minimum, times], f"{module}.residual")
    return graph.once("Transpose", [whole], f"{module}.residual_by_group", perm=[1, 0])
