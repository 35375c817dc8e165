"""What a comparison of one tensor, or of several added up, has found; `qalora.parity.differences` makes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["TensorDifference", "add_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """How far one tensor is from the reference's; every count 0 if it is the same.

    rows_moved                rows that are not where they belong, in a tensor that has the reference's rows in another
                              order, such as llama.cpp's rotary one; nothing else is counted of it then
    transposed                1 where the artefact holds the transpose; nothing else is counted then either
    codes, codes_differ       compared, and different
    code_at                   (row, column) of the first code that differs
    groups                    whose scale and min were compared
    scale_differ, scale_ulp   groups whose scale differs; the largest difference in the reference's ULP
    min_differ, min_ulp       the same for the minimum
    min_beyond                groups whose minimum is further off than a residual explains (`compare_tensors`)
    zeros_above, zeros_below  groups whose zero point is one too large or too small (modulo 2^bits), but for rounding
    values, values_differ, values_max   floats compared and different; the largest difference
    values_beyond             further off than rounding explains: see `qalora.parity.differences`
    requantized               values of a float model that the artefact holds in integers, and not as they were
    measured, error_max, error_rms   weights of tensors that differ; their error once dequantized, in float64
    stepped, step_max, step_rms      those of them that have a step, the reference's or, where it holds floats, the
                                     artefact's; the error in steps; groups of scale 0 are left out
    step_beyond               weights of `requantized` that are further off than rounding to the nearest code explains
    """

    name: str
    rows_moved: int = 0
    transposed: int = 0
    codes: int = 0
    codes_differ: int = 0
    code_at: tuple[int, int] | None = None
    groups: int = 0
    scale_differ: int = 0
    scale_ulp: float = 0.0
    min_differ: int = 0
    min_ulp: float = 0.0
    min_beyond: int = 0
    zeros_above: int = 0
    zeros_below: int = 0
    values: int = 0
    values_differ: int = 0
    values_max: float = 0.0
    values_beyond: int = 0
    requantized: int = 0
    measured: int = 0
    error_max: float = 0.0
    error_rms: float = 0.0
    stepped: int = 0
    step_max: float = 0.0
    step_rms: float = 0.0
    step_beyond: int = 0

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        moved = (self.rows_moved, self.transposed)
        return not any((*moved, self.codes_differ, self.scale_differ, self.min_differ, self.values_differ))


def add_up(name: str, parts: Iterable[TensorDifference]) -> TensorDifference:
    """The sums of the counts, the largest of the rest, the RMS over all weights; `code_at` of the first that has it."""
    total = TensorDifference(name=name)
    for part in parts:
        total = _joined(total, part)
    return total


_COUNTS = [field.name for field in fields(TensorDifference) if field.type == "int"]
_LARGEST = [field.name for field in fields(TensorDifference) if field.type == "float"]


def _joined(one: TensorDifference, two: TensorDifference) -> TensorDifference:
    counts: dict[str, Any] = {name: getattr(one, name) + getattr(two, name) for name in _COUNTS}
    counts |= {name: max(getattr(one, name), getattr(two, name)) for name in _LARGEST}
    counts["code_at"] = two.code_at if one.code_at is None else one.code_at
    counts["error_rms"] = _rms((one.measured, one.error_rms), (two.measured, two.error_rms))
    counts["step_rms"] = _rms((one.stepped, one.step_rms), (two.stepped, two.step_rms))
    return TensorDifference(name=one.name, **counts)


def _rms(*parts: tuple[int, float]) -> float:
    return math.sqrt(sum(count * rms**2 for count, rms in parts) / max(1, sum(count for count, _ in parts)))
