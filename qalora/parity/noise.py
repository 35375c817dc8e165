"""Float32's own noise on logits: the measure of what two right computations may differ by."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NOISE_FACTOR", "NOISE_FLOOR", "Noise"]

NOISE_FACTOR = 4.0
NOISE_FLOOR = 8 * 2.0**-24
"""What eight float32 roundings make of a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Float32's own noise on logits: of the reference summed in another order, and never below float32's last places.

    max, rms  |permuted - reference| over tokens x vocabulary
    floor     8 * 2^-24 * max|logit|: what eight roundings of the largest logit make
    """

    max: float
    rms: float
    floor: float

    @property
    def bound(self) -> float:
        """What two right float32 computations may differ by: NOISE_FACTOR times the noise, not below the floor."""
        return max(NOISE_FACTOR * self.max, self.floor)

    def scaled(self, times: float) -> Noise:
        """That of a runtime whose sums have `times` the usual noise."""
        return Noise(max=times * self.max, rms=times * self.rms, floor=times * self.floor)

    @property
    def rms_bound(self) -> float:
        """The same for the RMS."""
        return max(NOISE_FACTOR * self.rms, self.floor)
