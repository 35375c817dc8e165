"""What a user may choose for a training run, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qalora.errors import InputError
from qalora.options.fields import Options, device_option, option
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
    "packed" and gradient_checkpointing give the same adapter, to the bit, in less memory and more time; shard gives
    that of as many processes without it.
    """

    data: str = option(
        help="Data to train on: a text file; JSON rows with text, prompt and completion, instruction and output, "
        "messages or conversations; or a Hub dataset.",
        place="hub",
        metavar="FILE",
        example="text.jsonl",
    )
    out: Path = option(
        help="The adapter folder to write. PEFT can read it.",
        spelled="output",
        metavar="DIR",
        place="output",
        call=True,
        matters=False,
    )
    rank: int | Literal["auto"] = option(
        16, "Rank of the adapter. auto chooses a rank for each layer, within `budget`.", low=1
    )
    max_steps: int | None = option(None, "Optimizer steps. Default: one pass over the data.", low=1)
    batch_size: int = option(4, "Sequences in one forward pass, at most.", low=1)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.", low=1)
    max_length: int = option(128, "Tokens per sequence.", low=2)
    learning_rate: float = option(3e-3, "Peak learning rate of AdamW.", above=0, high=1)
    target_modules: tuple[str, ...] = option(
        (),
        "Train only linear layers of this name, such as q_proj or mlp.up_proj. Default: all.",
        metavar="NAME",
        example="q_proj",
    )
    seed: int = option(0, "Seed of the adapter's initialisation and the order of the data.", low=0, high=SEEDS)
    device: str = device_option("Device to compute on", "auto", devices="cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "float32", "Data type of the matrix products. auto: bfloat16 if the device is faster with it."
    )
    resume: bool = option(
        False,
        "Continue from the checkpoint beside the output. The result is as without the interruption.",
        call=True,
        matters=False,
    )
    force: bool = option(False, "Replace an earlier output.", call=True, matters=False)
    alpha: float | None = option(
        None,
        "The adapter scale is alpha/rank, as in the paper. Default: the rank, so that the scale is 1.",
        above=0,
        high=1e6,
        example=16.0,
        expert=True,
    )
    budget: int | None = option(
        None,
        "With `rank` auto: parameters of A and B in all layers, at most. Default: as many as rank 16 has.",
        low=1,
        metavar="N",
        expert=True,
    )
    start: Literal["gradient", "uniform"] = option(
        "gradient", "Initialisation of A: from the gradient of the first sequences, or uniform as in LoRA.", expert=True
    )
    convention: Convention = option(
        "paper", "Convention of the adapter files. It does not change the training.", expert=True
    )
    pool_size: int | None = option(
        None, "Input columns that the adapter pools into one. Default: the group size.", low=1, expert=True
    )
    minima: Minima = option(
        "float16", "Data type that the folded minima are rounded to, in training and in the fold.", expert=True
    )
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.", low=0, high=0.999, expert=True)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", low=0, high=0.999, expert=True)
    max_gradient_norm: float = option(1.0, "Clip gradients to this norm.", above=0, high=1e9, expert=True)
    held_out: float = option(
        0.05, "Share of the data, from its end, that is held out for evaluation.", above=0, high=0.9, expert=True
    )
    strength: float | Literal["auto"] = option(
        1.0,
        "Factor for the trained adapter, applied at the end. auto: 1, 0.85, 0.7 or 0.55, by the held-out loss.",
        above=0,
        high=1,
        metavar="FACTOR|auto",
        expert=True,
    )
    evaluate_every: int = option(
        0, "Steps between evaluations. 0: only before the first step and after the last.", low=0, expert=True
    )
    save_every: int = option(
        100, "Steps between checkpoints (in <output>.checkpoint). 0: no checkpoints.", low=0, matters=False, expert=True
    )
    weights: Literal["kept", "packed"] = option(
        "kept",
        "kept: hold the base's weights unpacked in memory. packed: unpack them at each use, which is slower and needs "
        "less memory.",
        matters=False,
        expert=True,
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute activations again in the backward pass: less memory, about a third more time, the same adapter.",
        matters=False,
        expert=True,
    )
    shard: bool = option(
        False,
        "Spread the base's weights over the processes (FSDP2): less memory in each, more to send, the same adapter.",
        call=True,
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
