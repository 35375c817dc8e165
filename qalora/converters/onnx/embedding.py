"""A quantized embedding in the graph for ONNX Runtime, shared with a tied output: `--onnx-embedding quantized`.

    model.embed_tokens.codes   UINT8 [vocabulary, hidden/block, block/2]  what MatMulNBits multiplies with (`carriers`)
    model.embed_tokens.table   UINT8 [vocabulary, hidden/2]               the same bytes, for GatherBlockQuantized
    model.embed_tokens.scale, .zero                                       of both

At more than 4 bits there are two halves, as everywhere: `.codes_high` and so on. `table` is the same place of the data
file as `codes`, so that nothing is stored twice. Scales are float16's and zero points integers, so that the look-up is
the float32 embedding bit for bit (scale * 8-bit code needs 19 bits), also as a sum of halves.

It is not the default, since it is not faster everywhere. SmolLM2-135M, Q8_0, 49152 x 576, onnxruntime-gpu 1.31.1 on one
thread of a CPU, of the output alone:

                                 MB     1 row   16 rows   128 rows   error
    float32, Gemm               113    6.3 ms   12.7 ms      70 ms    4e-7
    two 4-bit halves             35    4.3 ms   30   ms     149 ms    2e-7..9e-7
    8-bit MatMulNBits, level 1   32    172 ms   180  ms     246 ms    3e-7
    8-bit MatMulNBits, level 4   32    1.8 ms    8.2 ms      52 ms    4e-3..6e-3

and of the whole model, 4 bits in groups of 32 with a residual:

                                 MB    a step, 32 tokens before    16 tokens    128 tokens
    float32                     198                     21.2 ms        78 ms        392 ms
    quantized                   121                     19.0 ms       104 ms        470 ms

so a step is faster, and reading a prompt slower, whose every position has logits here. The look-up takes less than 0.1
ms in all forms. The portable graph has the float32 table always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.carriers import block_size
from qalora.converters.onnx.graph import MS, Graph
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.onnx import Initializer, Stored
from qalora.tensor import QuantSpec

__all__ = ["EMBEDDING", "check_table", "check_tables", "look_up", "tables"]

EMBEDDING = "model.embed_tokens"
OPTION = "`onnx_embedding`"
HALVES = ("", "_high")


def check_table(model: Checkpoint, form: str) -> bool:
    """Whether the fast graph holds the embedding's codes; `form` is one of ExportOptions.onnx_embedding.

    InputError for a float embedding or an untied output; ExactnessError for codes that the look-up cannot
    take as they are.
    """
    if form == "float32":
        return False
    spec, where = model.tensors[f"{EMBEDDING}.weight"].spec, f"{OPTION} {form}: {EMBEDDING}.weight"
    if spec is None:
        raise InputError(where, expected="codes", got="floats", todo=f"leave {OPTION} out", field=OPTION.strip("`"))
    if not model.tied:
        raise InputError(where, expected="an output tied to it", got="lm_head.weight", todo=f"leave {OPTION} out")
    if spec.zeros != "integer" or spec.act_order or spec.scale_dtype is not torch.float16:
        raise ExactnessError(
            where,
            expected="integer zero points, float16 scales and no act-order",
            got=f"{spec.zeros} zero points, {spec.scale_dtype}" + (", act-order" if spec.act_order else ""),
            todo=f"leave {OPTION} out",
        )
    return True


def tables(data: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """The second names of the embedding's codes, with the shape that GatherBlockQuantized wants."""
    found = {}
    for half in HALVES:
        codes = data.get(f"{EMBEDDING}.codes{half}")
        if codes is not None:
            rows, blocks, width = codes.shape
            name = f"{EMBEDDING}.table{half}"
            found[name] = replace(codes, name=name, shape=(rows, blocks * width))
    return found


def look_up(graph: Graph, spec: QuantSpec) -> str:
    """The embeddings of input_ids, [batch, sequence, hidden], from codes."""
    found = [
        graph.add(
            "GatherBlockQuantized",
            [f"{EMBEDDING}.table{half}", "input_ids", f"{EMBEDDING}.scale{half}", f"{EMBEDDING}.zero{half}"],
            f"embedded{half or '_low'}",
            domain=MS,
            bits=4,
            block_size=block_size(EMBEDDING, spec),
            gather_axis=0,
            quantize_axis=1,
        )
        for half in (HALVES if spec.bits > 4 else HALVES[:1])
    ]
    return found[0] if len(found) == 1 else graph.add("Add", found, "embedded")


def check_tables(file: Path, stored: Mapping[str, Stored]) -> None:
    """FormatError for a graph that looks up other bytes than those that it multiplies with."""
    for half in HALVES:
        table, codes = stored.get(f"{EMBEDDING}.table{half}"), stored.get(f"{EMBEDDING}.codes{half}")
        if table is not None and (codes is None or _place(table) != _place(codes)):
            raise FormatError(
                f"{file}: {EMBEDDING}.table{half}",
                expected="the bytes of its codes",
                got="a different place in the file",
            )


def _place(item: Stored) -> tuple[Path, int, int, str]:
    return item.path, item.offset, item.nbytes, item.dtype
