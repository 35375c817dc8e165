"""A quantized embedding in the graphs, shared with a tied output: `--onnx-embedding`.

    model.embed_tokens.codes   what the output multiplies with, as every linear weight (`carriers`)
    model.embed_tokens.table   UINT8 [vocabulary, hidden/2]: the same bytes, as the look-up wants them
    model.embed_tokens.scale, .zero                          of both; .table_zero: the portable graph's look-up's

At more than 4 bits there are two halves, as everywhere: `.codes_high` and so on. A second name is the same place of the
data file, so that nothing is stored twice. Scales are float16's and zero points integers, so that the look-up is the
float32 embedding bit for bit (scale * 8-bit code needs 19 bits), also as a sum of halves.

benchmarks/benchmark_onnx.py compares it with float32: docs/formats.md has the figures. Two other forms were tried on
SmolLM2's table, 49152 x 576 of Q8_0, with ONNX Runtime 1.31. Its 8-bit MatMulNBits takes 172 ms for one row, since it
dequantizes the whole table at each call, where two 4-bit halves take 4.3 ms and a float32 Gemm 6.3 ms. A float32 table
that is made of the codes when the model is loaded is as fast as a stored one, but loading takes six times its size in
memory: each step of what makes it is a constant of its own until the graph is done (6.3 GB for 128256 x 2048).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.carriers import BLOCKS, block_size, halves
from qalora.converters.onnx.graph import MS, Graph
from qalora.converters.onnx.products import coded, scale_of, zero_bytes
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.onnx import Initializer, Stored
from qalora.tensor import QuantSpec

__all__ = ["EMBEDDING", "check_table", "check_tables", "look_up", "tables", "unpack"]

EMBEDDING = "model.embed_tokens"
OPTION = "`onnx_embedding`"
TABLES = {"codes": "table", "zero": "table_zero"}


def check_table(model: Checkpoint, form: str) -> bool:
    """Whether the graphs hold the embedding's codes; `form` is one of ExportOptions.onnx_embedding.

    "auto" takes them where they can be. "quantized" raises where not: InputError for a float embedding or an untied
    output, ExactnessError for codes that the look-up cannot take as they are.
    """
    if form == "float32":
        return False
    spec, where = model.tensors[f"{EMBEDDING}.weight"].spec, f"{OPTION} {form}: {EMBEDDING}.weight"
    if form == "auto":
        return spec is not None and model.tied and not _beyond(spec) and spec.group_size % BLOCKS[-1] == 0
    if spec is None:
        raise InputError(where, expected="codes", got="floats", todo=f"leave {OPTION} out", field=OPTION.strip("`"))
    if not model.tied:
        raise InputError(where, expected="an output tied to it", got="lm_head.weight", todo=f"leave {OPTION} out")
    if _beyond(spec):
        raise ExactnessError(
            where,
            expected="integer zero points, float16 scales and no act-order",
            got=f"{spec.zeros} zero points, {spec.scale_dtype}" + (", act-order" if spec.act_order else ""),
            todo=f"leave {OPTION} out",
        )
    return True


def _beyond(spec: QuantSpec) -> bool:
    return spec.zeros != "integer" or spec.act_order or spec.scale_dtype is not torch.float16


def tables(parts: Iterable[Initializer], kinds: Collection[str]) -> list[Initializer]:
    """The second names of the embedding's codes and zeros, [vocabulary, bytes], as a look-up wants them."""
    names = _tables(kinds)
    return [replace(part, name=names[part.name]) for part in parts if part.name in names]


def _tables(kinds: Collection[str]) -> dict[str, str]:
    """{initializer: its second name}"""
    return {f"{EMBEDDING}.{kind}{half}": f"{EMBEDDING}.{TABLES[kind]}{half}" for kind in kinds for half in halves(8)}


def look_up(graph: Graph, model: Checkpoint) -> str | None:
    """The embeddings of input_ids, [batch, sequence, hidden], from codes; None where the graph holds floats."""
    lazy = model.tensors[f"{EMBEDDING}.weight"]
    if f"{EMBEDDING}.codes" not in graph.data:
        return None
    spec = coded(lazy)
    each = []
    for half in halves(spec.bits):
        scale = scale_of(graph, EMBEDDING, lazy, spec, half)
        inputs = [f"{EMBEDDING}.table{half}", "input_ids", scale, zero_bytes(graph, EMBEDDING, lazy, spec, half)]
        each.append(
            graph.add(
                "GatherBlockQuantized",
                inputs,
                f"embedded{half or '_low'}",
                domain=MS,
                bits=4,
                block_size=block_size(EMBEDDING, spec),
                gather_axis=0,
                quantize_axis=1,
            )
        )
    return each[0] if len(each) == 1 else graph.add("Add", each, "embedded")


def unpack(graph: Graph, model: Checkpoint) -> str | None:
    """The same in standard operators: rows of bytes are gathered, and only these are unpacked."""
    lazy = model.tensors[f"{EMBEDDING}.weight"]
    if f"{EMBEDDING}.codes" not in graph.data:
        return None
    spec = coded(lazy)
    block, size = block_size(EMBEDDING, spec), lazy.shape[1]
    blocks = size // block
    shape = graph.constant(f"groups_{blocks}x{block}", [0, 0, blocks, block])
    codes, zero = (_joined(graph, spec.bits, kind) for kind in TABLES.values())
    codes = graph.add("Reshape", [codes, shape], "embedded.codes_by_block")
    if blocks % 2:
        limits = [graph.constant(f"number_{value}", [value]) for value in (0, blocks, 2)]
        zero = graph.add("Slice", [zero, *limits], "embedded.zero_cut")
    scale = graph.add("Gather", [scale_of(graph, EMBEDDING, lazy, spec), "input_ids"], "embedded.scale")
    last = graph.constant("last_axis", [-1])
    zero, scale = (graph.add("Unsqueeze", [x, last], f"{x}.by_block") for x in (zero, scale))
    steps = graph.add("Sub", [codes, zero], "embedded.steps")
    values = graph.add("Mul", [steps, scale], "embedded.blocks")
    flat = graph.constant(f"flat_{size}", [0, 0, size])
    return graph.add("Reshape", [values, flat], "embedded")


def _joined(graph: Graph, bits: int, kind: str) -> str:
    """float32 [batch, sequence, n]: the values of the rows of input_ids, of both halves where there are two."""
    low, *high = (_nibbles(graph, f"{EMBEDDING}.{kind}{half}", f"embedded.{kind}{half}") for half in halves(bits))
    if not high:
        return low
    times = graph.add("Mul", [high[0], graph.number(16.0)], f"embedded.{kind}_times")
    return graph.add("Add", [low, times], f"embedded.{kind}_joined")


def _nibbles(graph: Graph, name: str, out: str) -> str:
    """float32 [batch, sequence, 2n] of the rows of UINT8 [vocabulary, n] that input_ids names, low half first."""
    from onnx import TensorProto

    row = graph.add("Gather", [name, "input_ids"], f"{out}.bytes")
    low = graph.add("BitwiseAnd", [row, graph.constant("low_half", 15, "UINT8")], f"{out}.low")
    high = graph.add("BitShift", [row, graph.constant("half_byte", 4, "UINT8")], f"{out}.high", direction="RIGHT")
    last = graph.constant("last_axis", [-1])
    each = [graph.add("Unsqueeze", [x, last], f"{x}.one") for x in (low, high)]
    pairs = graph.add("Concat", each, f"{out}.pairs", axis=-1)
    flat = graph.add("Reshape", [pairs, graph.constant("join_last", [0, 0, -1])], f"{out}.codes")
    return graph.add("Cast", [flat], f"{out}.values", to=TensorProto.FLOAT)


def check_tables(file: Path, stored: Mapping[str, Stored]) -> None:
    """FormatError for a graph that looks up other bytes than those that it multiplies with, or other rows of them."""
    for name, second in _tables(TABLES).items():
        table, own = stored.get(second), stored.get(name)
        if table is not None and (own is None or _place(table) != _place(own) or not _same_rows(table, own)):
            raise FormatError(f"{file}: {second}", expected="the bytes of its codes", got="another place or shape")


def _place(item: Stored) -> tuple[Path, int, int, bytes | None]:
    return item.path, item.offset, item.nbytes, item.inline


def _same_rows(table: Stored, own: Stored) -> bool:
    return table.dtype == "UINT8" and len(table.shape) == 2 and table.shape[:1] == own.shape[:1]
