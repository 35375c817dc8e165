"""Whether the rotary tables of a graph of ours are those of the config.json beside it, which may have been edited.

The row of position 1 tells the frequencies: cos and sin of them, times the kind's attention factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qalora.converters.decoder import Decoder, used_ropes
from qalora.converters.onnx.decoder import TABLES
from qalora.converters.rope import Rope, two_tables, wide_frequencies
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
    tables, times = wide_frequencies(rope, head_size, positions)
    return [(angles.cos() * times, angles.sin() * times) for angles in tables]
