"""The reference's side of every comparison, computed once: logits, float32's noise, the adapter's effect, speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qalora.parity.job import Job
from qalora.parity.noise import Noise
from qalora.parity.reference import Forward, Reference
from qalora.parity.spool import Spool
from qalora.parity.text import Work

__all__ = ["Bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """work: tokens and prompts; spool: the reference's logits over them.

    effect       |adapted - base|^2 over tokens x vocabulary, 0 without an adapter; side_effect: of the side branch
    speed        tokens a second of the reference
    """

    work: Work
    spool: Spool
    noise: Noise
    effect: float
    side_effect: float
    speed: float

    @classmethod
    def of(cls, job: Job, work: Work, folder: Path, *, memory: int, tick: Callable[[], None] = lambda: None) -> Bench:
        """Compute it; `folder` is the caller's, and temporary; `tick` is called after each window of each forward.

        memory  bytes that there are: weights that would take half of them are read anew at every pass
        """
        spool = Spool(Reference(job.base, job.adapter, memory=memory), work.windows, folder, tick)
        base, side = Forward(weights="base"), Forward(weights="side")
        began = time.perf_counter()
        spool.logits(job.usual, 0)
        speed = sum(len(work.windows[n]) for n in spool.together(0)) / (time.perf_counter() - began)
        noise = spool.noise(job.usual)
        if job.adapter is None:
            return cls(work=work, spool=spool, noise=noise, effect=0.0, side_effect=0.0, speed=speed)
        return cls(
            work=work,
            spool=spool,
            noise=noise,
            effect=spool.distance(job.adapted, base),
            side_effect=spool.distance(side, base),
            speed=speed,
        )

    def alone(self) -> Bench:
        """The reference's side of a comparison with the base, without the adapter."""
        if not self.effect:
            return self
        return replace(self, noise=self.spool.noise(Forward(weights="base")), effect=0.0, side_effect=0.0)
