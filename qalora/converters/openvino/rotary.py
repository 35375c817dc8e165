"""Whether the rotary frequencies of a graph are those of the config.json beside it, which may have been edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qalora.converters.decoder import Decoder, used_ropes
from qalora.converters.openvino.decoder import FREQUENCIES
from qalora.converters.rope import wide_frequencies
from qalora.errors import FormatError
from qalora.formats.openvino import Stored, read_stored

__all__ = ["check_rotary", "is_frequencies"]

CLOSE = 2.0**-19


def check_rotary(file: Path, stored: Mapping[str, Stored], decoder: Decoder) -> None:
    """Refuse a graph of ours whose frequencies are not those of the config."""
    for kind in used_ropes(decoder):
        rope = decoder.ropes[kind]
        wanted, _ = wide_frequencies(rope, decoder.head_size, decoder.positions)
        for n, table in enumerate(wanted):
            name = FREQUENCIES.format(kind, "_beyond" * n)
            item = stored.get(name)
            if item is None or not _are(item, table):
                raise FormatError(
                    f"{file}: {name}",
                    expected=f"rotary positions as config.json says, {rope.parameters()!s:.120}",
                    got="no such constant" if item is None else "different positions",
                    todo="the graph counts: put back the config.json that was written with it",
                )


def is_frequencies(item: Stored, decoder: Decoder) -> bool:
    """Whether a constant holds the frequencies of some kind of layer."""
    kinds = [decoder.ropes[kind] for kind in used_ropes(decoder)]
    tables = [table for rope in kinds for table in wide_frequencies(rope, decoder.head_size, decoder.positions)[0]]
    return any(_are(item, table) for table in tables)


def _are(item: Stored, table: Tensor) -> bool:
    """Whether float32 frequencies are those of a float64 table; powers and quotients are off by some ULP of 2^-24."""
    if item.element != "f32":
        return False
    got = read_stored(item).flatten().double()
    return got.shape == table.shape and bool(((got - table).abs() <= CLOSE * table).all())
