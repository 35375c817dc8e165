"""The reference's side of every comparison, computed once: logits, float32's noise, the adapter's effect, speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qalora.devices import CPU
from qalora.parity.logit_cache import LogitCache
from qalora.parity.models import ReferenceModels
from qalora.parity.noise import Noise
from qalora.parity.reference import Forward, Reference
from qalora.parity.text import EvaluationInputs

__all__ = ["Baseline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """inputs: tokens and prompts; logit_cache: the reference's logits over them.

    effect       |adapted - base|^2 over tokens x vocabulary, 0 without an adapter; side_effect: of the side branch
    speed        tokens a second of the reference
    """

    inputs: EvaluationInputs
    logit_cache: LogitCache
    noise: Noise
    effect: float
    side_effect: float
    speed: float

    @classmethod
    def of(
        cls,
        models: ReferenceModels,
        inputs: EvaluationInputs,
        folder: Path,
        *,
        memory: int,
        device: torch.device = CPU,
        tick: Callable[[], None] = lambda: None,
    ) -> Baseline:
        """Compute it; `folder` is the caller's, and temporary; `tick` is called after each window of each forward.

        memory  bytes that there are: weights that would take half of them are read anew at every pass
        device  where the reference computes
        """
        reference = Reference(models.base, models.adapter, memory=memory, device=device)
        logit_cache = LogitCache(reference, inputs.windows, folder, tick)
        base, side = Forward(weights="base"), Forward(weights="side")
        began = time.perf_counter()
        logit_cache.logits(models.usual, 0)
        speed = sum(len(inputs.windows[n]) for n in logit_cache.together(0)) / (time.perf_counter() - began)
        noise = logit_cache.noise(models.usual)
        if models.adapter is None:
            return cls(inputs=inputs, logit_cache=logit_cache, noise=noise, effect=0.0, side_effect=0.0, speed=speed)
        return cls(
            inputs=inputs,
            logit_cache=logit_cache,
            noise=noise,
            effect=logit_cache.distance(models.adapted, base),
            side_effect=logit_cache.distance(side, base),
            speed=speed,
        )

    def alone(self) -> Baseline:
        """The reference's side of a comparison with the base, without the adapter."""
        if not self.effect:
            return self
        return replace(self, noise=self.logit_cache.noise(Forward(weights="base")), effect=0.0, side_effect=0.0)
