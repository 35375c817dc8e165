"""A weight as constants of the graph, and the chain of layers that makes floats of a quantized one.

    <module>.codes  [out, groups, group size]  u2 for 2 bits, u4 for 3 and 4, u8 for 5, 6 and 8
    <module>.scale  [out, groups, 1]           f16, or f32 where the base's scales are
    <module>.min    [out, groups, 1]           f16 or f32, where zero points are real
    <module>.zero   [out, groups, 1]           integer zero points: u4 beside u4, else u8; [1, 1, 1] if all are the same
    <module>.order  [in]                       i64, for act-order: see `qalora.converters.column_order`

    weight = Reshape((Convert(codes) - zero) * scale, [out, in])       zero = -min / scale where it is real

The CPU plugin of OpenVINO knows the chain by its shape: it folds what needs no codes, keeps these packed, and widens
them within the product. `Convert(codes) * scale + min` would be a dense float weight. Beside u2 it computes wrong
products from u2 zero points, and right ones from u8.

A group with scale 0 holds its min alone, whatever its codes are: -min / scale is no number then, so that the chain
takes 2^-80 for the scale. -min * 2^80 + 255 rounds to -min * 2^80 for every float16 min, and the product to min.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qalora.checkpoint import LazyTensor
from qalora.converters.column_order import natural, ordered
from qalora.converters.openvino.graph import Graph
from qalora.converters.specs import narrowed
from qalora.errors import FormatError
from qalora.formats.fields import from_nibbles, nibbles
from qalora.formats.openvino import DTYPES, Constant, Stored, element_of, read_stored
from qalora.tensor import GroupQuantTensor, QuantSpec, check_finite, integer_zeros, pack_codes, unpack_codes

__all__ = [
    "CONTAINERS",
    "ORDER",
    "Fetch",
    "constants",
    "decode",
    "encode",
    "float_constant",
    "is_part",
    "order_constant",
    "weight",
]

CONTAINERS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
"""Bits that a code is stored in. OpenVINO has types of 3 and 6 bits, which its CPU plugin has no product for."""

ORDER = ".order"
PARTS = ("codes", "scale", "min", "zero")
TINY = 2.0**-80


def constants(module: str, shape: tuple[int, int], spec: QuantSpec) -> list[Constant]:
    """The constants of a weight, without its order."""
    (rows, columns), container = shape, CONTAINERS[spec.bits]
    groups = columns // spec.group_size
    made = [
        Constant(name=f"{module}.codes", element=f"u{container}", shape=(rows, groups, spec.group_size)),
        Constant(name=f"{module}.scale", element=element_of(spec.scale_dtype), shape=(rows, groups, 1)),
    ]
    if spec.zeros == "real":
        return [*made, Constant(name=f"{module}.min", element=element_of(spec.min_dtype), shape=(rows, groups, 1))]
    element, zeros = ("u8", (1, 1, 1)) if spec.zero is not None else (_zero_element(spec), (rows, groups, 1))
    return [*made, Constant(name=f"{module}.zero", element=element, shape=zeros)]


def _zero_element(spec: QuantSpec) -> str:
    return "u4" if CONTAINERS[spec.bits] == 4 else "u8"


def order_constant(module: str, columns: int) -> Constant:
    """The constant of a module's order."""
    return Constant(name=f"{module}{ORDER}", element="i64", shape=(columns,))


def is_part(name: str, module: str) -> bool:
    """Whether a constant is one of a module's."""
    prefix, _, part = name.rpartition(".")
    return prefix == module and part in PARTS


def weight(graph: Graph, module: str, lazy: LazyTensor) -> str:
    """The layer that gives a weight in float32, [out, in], its columns in the order of their groups."""
    spec, name = lazy.spec, f"{module}.weight"
    if spec is None:
        return graph.wide(name, kept=True)
    codes, scale = graph.wide(f"{module}.codes"), graph.wide(f"{module}.scale")
    if spec.zeros == "integer":
        zero = graph.wide(f"{module}.zero")
    else:
        none = graph.add("Equal", [scale, graph.number(0.0)], f"{module}.none", outputs=("boolean",))
        scale = graph.add("Select", [none, graph.number(TINY), scale], f"{module}.step")
        quotient = graph.add("Divide", [graph.wide(f"{module}.min"), scale], f"{module}.quotient")
        zero = graph.add("Negative", [quotient], f"{module}.zero")
    steps = graph.add("Subtract", [codes, zero], f"{module}.steps")
    blocks = graph.add("Multiply", [steps, scale], f"{module}.blocks")
    return graph.add("Reshape", [blocks, graph.sizes(*lazy.shape)], name, special_zero="false")


def encode(module: str, tensor: GroupQuantTensor, spec: QuantSpec, row: int) -> dict[str, Tensor]:
    """The data of `constants`, by name, for rows of a weight from an even one on; what is the same in every row comes
    with the first."""
    tensor, container = ordered(f"openvino: {module}", tensor), CONTAINERS[spec.bits]
    packed = tensor.packed if container == spec.bits else pack_codes(tensor.codes(), container)
    data = {
        f"{module}.codes": packed,
        f"{module}.scale": narrowed(f"{module}: scale", tensor.scale, spec.scale_dtype).contiguous(),
    }
    if spec.zeros == "real":
        return {**data, f"{module}.min": narrowed(f"{module}: min", tensor.min, spec.min_dtype).contiguous()}
    zero = integer_zeros(tensor)
    if zero is None or (spec.zero is not None and not torch.equal(tensor.scale * -spec.zero, tensor.min)):
        raise ValueError(f"{module}: its spec promises integer zeros, and it has others")
    if spec.zero is not None:
        return data if row else {**data, f"{module}.zero": torch.tensor([spec.zero], dtype=torch.uint8)}
    return {**data, f"{module}.zero": nibbles(zero.view(1, -1)) if _zero_element(spec) == "u4" else zero.contiguous()}


Fetch = Callable[[str, int, int], Tensor]
"""Gives rows of a constant by its name; bytes where its elements are less than one."""


def decode(
    module: str, fetch: Fetch, spec: QuantSpec, shape: tuple[int, int], start: int, stop: int
) -> GroupQuantTensor:
    """Rows start..stop-1 of the weight that `encode` wrote."""
    (rows, columns), count = shape, stop - start
    groups = columns // spec.group_size
    packed = fetch(f"{module}.codes", start, stop).view(count, -1)
    if CONTAINERS[spec.bits] != spec.bits:
        packed = pack_codes(_checked(module, unpack_codes(packed, CONTAINERS[spec.bits]), spec.bits), spec.bits)
    scale = fetch(f"{module}.scale", start, stop).float().view(count, groups)
    if spec.zeros == "real":
        minimum = fetch(f"{module}.min", start, stop).float().view(count, groups)
    else:
        minimum = -scale * _zeros(module, fetch, spec, (rows, groups))[start:stop]
    tensor = GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=spec.bits, group_size=spec.group_size)
    return natural(f"{module}{ORDER}", tensor, fetch(f"{module}{ORDER}", 0, columns)) if spec.act_order else tensor


def _checked(module: str, codes: Tensor, bits: int) -> Tensor:
    most = int(codes.max()) if codes.numel() else 0
    if most >> bits:
        raise FormatError(f"{module}.codes", expected=f"codes of {bits} bits", got=str(most))
    return codes


def _zeros(module: str, fetch: Fetch, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """uint8 [out, groups], whatever rows are asked for: two zero points may share a byte."""
    rows, groups = shape
    if spec.zero is not None:
        zero = fetch(f"{module}.zero", 0, 1).flatten()
        if int(zero) != spec.zero:
            raise FormatError(f"{module}.zero", expected=str(spec.zero), got=str(int(zero)))
        return zero.expand(rows, groups)
    zero = fetch(f"{module}.zero", 0, rows)
    if _zero_element(spec) == "u4":
        zero = from_nibbles(zero.view(1, -1), rows * groups)
    return zero.view(rows, groups)


def float_constant(name: str, item: Stored, offset: float = 0.0) -> LazyTensor:
    """A float tensor, with an offset that its values are stored with; FormatError where the constant has no floats."""
    if item.element not in DTYPES:
        expected, got = f"floats ({', '.join(DTYPES)}) or codes with a scale", f"{item.element} {list(item.shape)}"
        raise FormatError(name, expected=expected, got=got)

    def read_rows(start: int, stop: int) -> Tensor:
        rows = read_stored(item, start, stop)
        check_finite(name, rows)
        return rows - offset if offset else rows

    return LazyTensor(
        name=name, shape=item.shape, dtype=DTYPES[item.element], nbytes=item.nbytes, by_rows=True, read=read_rows
    )
