"""What a user may choose for a training run, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qalora.adapter import CONVENTIONS, Convention
from qalora.errors import InputError

__all__ = ["TrainOptions"]


BUDGET_RANK = 16
"""The rank everywhere whose parameters are the budget of rank "auto", if none is given."""


SEEDS = 2**32 - 1
"""The highest seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of `qalora.training.train`; raises InputError for one out of range.

    data            a text or JSONL file, or a dataset of the Hub; see `qalora.training.data`
    out             the folder to write
    rank, alpha     of the adapter; s = alpha/rank scales it as in the paper (sum pooling), whichever convention it is
                    written in, so that the learning rate means the same; alpha None is rank. Rank "auto" gives each
                    layer its own from what its gradient holds (see `qalora.training.starting`); alpha is not for it
    budget          with rank "auto": parameters of the whole adapter at most; None is what `BUDGET_RANK` takes
    start           rows of A: "gradient" takes the directions of the first sequences' gradient, "uniform" is LoRA's
    convention      what the files are written in: converted exactly at the end
    pool_size       columns that share an input; None is each layer's group size
    minima          what the folded minima are rounded to, in training and in the fold
    target_modules  ends of module paths, such as q_proj or mlp.up_proj; empty means every linear layer
    steps           optimiser steps; None is one pass over the data
    batch_size      sequences of a forward, at most; batch_size * gradient_accumulation sequences make a step, which
                    the processes share, where there are several: the step is the same for any number of them
    sequence_length tokens of a sequence
    learning_rate   AdamW's highest: it rises over `warmup` of the steps and falls linearly to 0
    held_out        share of the data, its end, that is not trained on
    strength        a factor of what was learned, applied to B after the last step; "auto" finds one of
                    `qalora.training.strength.STRENGTHS` by the held-out loss
    evaluate_every  steps between held-out losses, beside the first and last; 0 is never
    save_every      steps between checkpoints, in `<out>.checkpoint`; 0 is never
    device          cpu, cuda, ...; auto is a GPU where torch has one
    compute         what layers multiply, see `qalora.training.layer`; auto is bfloat16 where the device multiplies it
                    faster (see `qalora.training.compute`). The adapter, AdamW and held-out losses stay in float32
    weights         with bfloat16: kept in bfloat16 (2 bytes a weight, beside the packed ones), or made of the packed
                    ones at each use, which takes longer. The adapter comes out the same, to the bit
    gradient_checkpointing
                    keep only what goes into each decoder layer, and compute the layer again in the backward: less
                    memory, a third more work, the same adapter to the bit
    resume          continue from there
    """

    data: str
    out: Path
    rank: int | Literal["auto"] = 16
    alpha: float | None = None
    budget: int | None = None
    start: Literal["gradient", "uniform"] = "gradient"
    convention: Convention = "paper"
    pool_size: int | None = None
    minima: Literal["float16", "float32"] = "float16"
    target_modules: tuple[str, ...] = ()
    steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    sequence_length: int = 128
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    held_out: float = 0.05
    strength: float | Literal["auto"] = 1.0
    evaluate_every: int = 0
    save_every: int = 100
    seed: int = 0
    device: str = "auto"
    compute: Literal["auto", "float32", "bfloat16"] = "float32"
    weights: Literal["kept", "packed"] = "kept"
    gradient_checkpointing: bool = False
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        self._check_rank()
        for name, least in (
            ("batch_size", 1),
            ("gradient_accumulation", 1),
            ("sequence_length", 2),
            ("evaluate_every", 0),
            ("save_every", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(name, expected=f"at least {least}", got=str(getattr(self, name)))
        if not 0 <= self.seed <= SEEDS:
            raise InputError("seed", expected=f"0 to {SEEDS}", got=str(self.seed))
        if self.steps is not None and self.steps < 1:
            raise InputError("steps", expected="at least 1", got=str(self.steps))
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("max_gradient_norm", 0.0, 1e9),
            ("held_out", 0.0, 0.9),
        ):
            if not low < getattr(self, name) <= high:
                raise InputError(name, expected=f"above {low:g}, at most {high:g}", got=str(getattr(self, name)))
        if self.strength != "auto" and not (isinstance(self.strength, int | float) and 0 < self.strength <= 1):
            raise InputError("strength", expected="above 0, at most 1, or auto", got=str(self.strength))
        if not 0 <= self.warmup < 1 or not 0 <= self.weight_decay < 1:
            raise InputError("warmup and weight_decay", expected="0 to 1", got=f"{self.warmup} and {self.weight_decay}")
        if self.alpha is not None and not 0 < self.alpha < 1e6:
            raise InputError("alpha", expected="above 0, below 1e+06", got=str(self.alpha))
        if self.convention not in CONVENTIONS:
            raise InputError("convention", expected=f"one of {', '.join(CONVENTIONS)}", got=repr(self.convention))
        for name, known in (
            ("minima", ("float16", "float32")),
            ("compute", ("auto", "float32", "bfloat16")),
            ("weights", ("kept", "packed")),
            ("start", ("gradient", "uniform")),
        ):
            if getattr(self, name) not in known:
                raise InputError(name, expected=" or ".join(known), got=repr(getattr(self, name)))

        if self.weights == "packed" and self.compute == "float32":
            raise InputError("weights packed is for compute bfloat16, and the computation is in float32")

    def _check_rank(self) -> None:
        if self.rank == "auto":
            if self.alpha is not None:
                raise InputError("alpha goes with one rank, not with rank auto, whose scaling is 1")
            if self.budget is not None and self.budget < 1:
                raise InputError("budget", expected="at least 1 parameter", got=str(self.budget))
            return
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InputError("rank", expected="at least 1, or auto", got=str(self.rank))
        if self.budget is not None:
            raise InputError("budget", expected="--rank auto beside it", got=f"--rank {self.rank}")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return 1.0 if self.alpha is None or self.rank == "auto" else self.alpha / self.rank

    @property
    def first_rank(self) -> int:
        """The rank of every layer, before `auto` has found its own."""
        return BUDGET_RANK if self.rank == "auto" else self.rank

    def to_json(self) -> dict[str, Any]:
        """What decides the weights, for a checkpoint and the log; places, and ways to the same, are left out."""
        left_out = {"out", "data", "resume", "force", "save_every", "weights", "gradient_checkpointing"}
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {**found, "target_modules": list(self.target_modules)}
