"""What a user may choose for a training run, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qalora.errors import InputError
from qalora.options.fields import Options, option
from qalora.options.words import Convention, Minima

__all__ = ["TrainOptions"]


BUDGET_RANK = 16
"""The rank everywhere whose parameters are the budget of rank "auto", if none is given."""


SEEDS = 2**32 - 1
"""The highest seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(Options):
    """Options of `qalora.training.train`; raises InputError for one out of range.

    s = alpha/rank scales the adapter as in the paper (sum pooling), whichever convention it is written in, so that the
    learning rate means the same. batch_size * gradient_accumulation_steps sequences make a step, which the processes
    share, where there are several: the step is the same for any number of them. The rate rises over `warmup` of the
    steps and falls linearly to 0. Adapter, AdamW and held-out losses are in float32, whatever layers multiply. Weights
    "packed" and gradient_checkpointing give the same adapter, to the bit, in less memory and more time.
    """

    data: str = option(
        help="A text file; rows in JSON with text, prompt and completion, instruction and output, messages or "
        "conversations; or a dataset of the Hub.",
        place="hub",
        metavar="FILE",
        example="text.jsonl",
    )
    out: Path = option(
        help="The folder of the adapter; PEFT's files and qalora's record.",
        spelled="output",
        metavar="DIR",
        place="output",
        call=True,
        matters=False,
    )
    rank: int | Literal["auto"] = option(16, "Rank of the adapter; auto finds each layer's own, by `budget`.", low=1)
    max_steps: int | None = option(None, "Optimizer steps; one pass over the data by default.", low=1)
    batch_size: int = option(4, "Sequences of a forward, at most.", low=1)
    gradient_accumulation_steps: int = option(1, "Forwards that make a step.", low=1)
    max_length: int = option(128, "Tokens of a sequence.", low=2)
    learning_rate: float = option(3e-3, "AdamW's highest.", above=0, high=1)
    target_modules: tuple[str, ...] = option(
        (), "q_proj, mlp.up_proj, ...; every linear layer by default.", metavar="NAME", example="q_proj"
    )
    seed: int = option(0, "Decides the adapter's start and the order of the data.", low=0, high=SEEDS)
    device: str = option("auto", "Where to compute: cpu, cuda; auto takes a GPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "float32", "What layers multiply; auto is bfloat16 where the device is faster with it."
    )
    resume: bool = option(
        False, "Continue from the checkpoint beside the output, to the same weights.", call=True, matters=False
    )
    force: bool = option(False, "Replace an earlier output.", call=True, matters=False)
    alpha: float | None = option(
        None,
        "alpha/rank scales the adapter, in the paper's sense; rank by default.",
        above=0,
        high=1e6,
        example=16.0,
        expert=True,
    )
    budget: int | None = option(
        None,
        "Rank auto: numbers in A and B of all layers at most; what a rank of 16 takes by default.",
        low=1,
        metavar="N",
        expert=True,
    )
    start: Literal["gradient", "uniform"] = option(
        "gradient", "A's first rows: main directions of the first sequences' gradient, or LoRA's.", expert=True
    )
    convention: Convention = option("paper", "What the files are written in; the training is the same.", expert=True)
    pool_size: int | None = option(None, "Columns that share an input; the group size by default.", low=1, expert=True)
    minima: Minima = option(
        "float16", "What the folded minima are rounded to, in training and in the fold.", expert=True
    )
    warmup: float = option(0.05, "Share of the steps over which the rate rises.", low=0, high=0.999, expert=True)
    weight_decay: float = option(0.0, "AdamW's.", low=0, high=0.999, expert=True)
    max_gradient_norm: float = option(1.0, "A longer gradient is cut to it.", above=0, high=1e9, expert=True)
    held_out: float = option(0.05, "Share of the data, its end, kept for evaluation.", above=0, high=0.9, expert=True)
    strength: float | Literal["auto"] = option(
        1.0,
        "A factor of what was learned, applied at the end; auto takes 1, 0.85, 0.7 or 0.55 by the held-out loss.",
        above=0,
        high=1,
        metavar="FACTOR|auto",
        expert=True,
    )
    evaluate_every: int = option(
        0, "Steps between held-out losses, beside the first and last; 0 is never.", low=0, expert=True
    )
    save_every: int = option(
        100, "Steps between checkpoints, in <output>.checkpoint; 0 is never.", low=0, matters=False, expert=True
    )
    weights: Literal["kept", "packed"] = option(
        "kept",
        "The base's weights kept in what layers multiply, or unpacked at each use: slower, in less memory. In float32 "
        "packed multiplies the folded weights themselves.",
        matters=False,
        expert=True,
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep only what goes into each layer: less memory, a third more work, the same adapter.",
        matters=False,
        expert=True,
    )

    def check(self) -> None:
        """InputError for options that do not go together."""
        if self.rank == "auto" and self.alpha is not None:
            raise InputError("`alpha` goes with one rank, not with `rank` auto, whose scaling is 1", field="alpha")
        if self.rank != "auto" and self.budget is not None:
            raise InputError(field="budget", expected="`rank` auto beside it", got=f"rank {self.rank}")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return 1.0 if self.alpha is None or self.rank == "auto" else self.alpha / self.rank

    @property
    def first_rank(self) -> int:
        """The rank of every layer, before `auto` has found its own."""
        return BUDGET_RANK if self.rank == "auto" else self.rank
