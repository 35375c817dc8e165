"""What a device loads of an artefact: bytes, and bits per weight, with the embedding apart.

The one place of these figures: plan, card, manifest, bill of materials and `inspect` take them from here. They count
the model's tensors as they are stored, with all that a carrier holds beside the codes: scales, minima or zero points,
what integer zero points leave over. Headers, graphs, tables of positions and tokenizers are not counted.

A folder may hold the model in two graphs, and a device loads one of them: the one whose files are in the folder of the
plan's first row. Bytes that two rows have in common count once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Annotated, TypeVar

from qalora.checkpoint import Checkpoint
from qalora.converters.huggingface import EMBEDDING, HEAD
from qalora.converters.plan import Plan, PlannedTensor
from qalora.formats.record_json import Key
from qalora.options.fields import readable

__all__ = ["DeviceLoad", "Share", "device_load_of", "with_device_load"]

AnyPlan = TypeVar("AnyPlan", bound=Plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Some of the tensors: how many weights, and the bytes that hold them."""

    weights: int
    nbytes: Annotated[int, Key("bytes")]

    @property
    def bits(self) -> float:
        """Bits per weight; 0 of nothing."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoad:
    """What a device loads.

    linear     the weights of the decoder's linear layers
    embedding  the embedding, and an output layer of its own
    other      norms and biases, and what a model of text and images has beside its decoder
    """

    linear: Share
    embedding: Share
    other: Share

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.linear.nbytes + self.embedding.nbytes + self.other.nbytes

    def __str__(self) -> str:
        """In words."""
        embedding = f"{self.embedding.bits:.2f} ({readable(self.embedding.nbytes)})"
        return f"linear layers {self.linear.bits:.2f} bits per weight, embedding {embedding}"


def with_device_load(plan: AnyPlan, model: Checkpoint) -> AnyPlan:
    """The plan with what a device loads of it; `model` is what it was made for."""
    return replace(plan, device_load=_device_load(_sizes(plan.tensors), model))


def device_load_of(model: Checkpoint) -> DeviceLoad | None:
    """What a device loads of the files that a model was read from; None where its reader does not tell."""
    sizes = {name: lazy.nbytes for name, lazy in model.everything.items() if lazy.nbytes is not None}
    return _device_load(sizes, model) if len(sizes) == len(model.everything) else None


def _sizes(rows: Collection[PlannedTensor]) -> dict[str, int]:
    """Bytes of each tensor in the graph that a device loads."""
    ranges = {(row.file, row.offset): row for row in rows}
    folders = [PurePosixPath(row.file).parent for row in rows]
    sizes: Counter[str] = Counter()
    for (file, _), row in ranges.items():
        if PurePosixPath(file).parent == folders[0]:
            sizes[row.name] += row.nbytes
    return dict(sizes)


def _device_load(sizes: Mapping[str, int], model: Checkpoint) -> DeviceLoad:
    linears, everything = {*model.linears}, model.everything
    outer = {EMBEDDING, HEAD}

    def share(names: Collection[str]) -> Share:
        weights = sum(math.prod(everything[name].shape) for name in names)
        return Share(weights=weights, nbytes=sum(sizes[name] for name in names))

    return DeviceLoad(
        linear=share([name for name in sizes if name in linears]),
        embedding=share([name for name in sizes if name in outer]),
        other=share([name for name in sizes if name not in linears | outer]),
    )
