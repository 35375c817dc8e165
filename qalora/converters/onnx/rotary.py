"""Whether the rotary tables of a graph of ours are those of the config.json beside it, which may have been edited.

The row of position 1 tells the frequencies: cos and sin of them, times the kind's attention factor. It is computed here
by the formulas of transformers, modeling_rope_utils.py, which takes seconds to import; the tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qalora.converters.decoder import Decoder, used_ropes
from qalora.converters.onnx.decoder import TABLES
from qalora.converters.rope import LISTS, Rope, llama3_factors, two_tables
from qalora.errors import FormatError
from qalora.formats.onnx import Stored, read_stored

__all__ = ["check_rotary", "second_rows"]

CLOSE = 2.0**-19
"""float32's power, quotient, cosine and sine are off by some ULP of 2^-24 each, of angles of a few radians."""


def check_rotary(file: Path, stored: Mapping[str, Stored], decoder: Decoder) -> None:
    """Refuse a graph whose tables of positions are not those of the config."""
    for kind in used_ropes(decoder) if decoder.positions > 1 else ():
        rope, start = decoder.ropes[kind], 0
        for wanted in second_rows(rope, decoder.head_size, decoder.positions):
            for side, row in zip(("cos", "sin"), wanted, strict=True):
                item = stored.get(f"{TABLES[kind]}.{side}")
                what = f"{file}: {TABLES[kind]}.{side}"
                if item is None or item.dtype != "FLOAT" or len(item.shape) != 2 or item.shape[0] < start + 2:
                    raise FormatError(what, expected="a float table with a row for each position", got=_form(item))
                got = read_stored(item, start + 1, start + 2)[0].double()
                if got.shape != row.shape or not bool(((got - row).abs() <= CLOSE * row.abs().clamp(min=CLOSE)).all()):
                    raise FormatError(
                        what,
                        expected=f"rotary positions as config.json says, {rope.parameters()!s:.120}",
                        got="different positions",
                        todo="the graph counts: put back the config.json that was written with it",
                    )
            start = rope.original if two_tables(rope, decoder.positions) else 0


def _form(item: Stored | None) -> str:
    return "no table" if item is None else f"{item.dtype} {list(item.shape)}"


def second_rows(rope: Rope, head_size: int, positions: int) -> list[tuple[Tensor, Tensor]]:
    """cos and sin at position 1 in each of the tables of `rotary_table`, float64 [rotated elements / 2]."""
    size = rope.size(head_size)
    plain = rope.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    numbers, times = rope.numbers, 1.0
    if rope.kind == "longrope":
        times = rope.attention_factor(positions)
        lists = LISTS if two_tables(rope, positions) else LISTS[:1]
        frequencies = [plain / torch.tensor(numbers[key], dtype=torch.float64) for key in lists]
    elif rope.kind == "yarn":
        times, frequencies = _yarn_attention(rope), [_yarn(rope, plain)]
    elif rope.kind == "llama3":
        frequencies = [plain / llama3_factors(rope, size)]
    else:
        frequencies = [plain / numbers.get("factor", 1.0)]
    return [(angles.cos() * times, angles.sin() * times) for angles in frequencies]


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """Frequencies that turn often in the original context stay, slow ones are divided by the factor."""
    numbers, size = rope.numbers, 2 * len(plain)
    ends = [
        size * math.log(rope.original / (numbers[key] * 2 * math.pi)) / (2 * math.log(rope.theta))
        for key in ("beta_fast", "beta_slow")
    ]
    if numbers.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], size - 1)
    high += 0.001 if low == high else 0
    slow = ((torch.arange(len(plain), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    frequencies: Tensor = plain / numbers["factor"] * slow + plain * (1 - slow)
    return frequencies


def _yarn_attention(rope: Rope) -> float:
    numbers, step = rope.numbers, 0.1 * math.log(max(1.0, rope.numbers["factor"]))
    if "attention_factor" in numbers:
        return float(numbers["attention_factor"])
    top, bottom = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return (1 + step * top) / (1 + step * bottom) if top and bottom else 1 + step
