"""What a user may choose for a verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora.options.fields import Options, option
from qalora.options.words import Level

__all__ = ["Verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Options):
    """What artefacts are compared on, and how far; raises InputError for an option out of range."""

    text: Path | None = option(None, "A text file to compute on; else a built-in one.", place="input", metavar="FILE")
    max_tokens: int = option(256, "Tokens of the text.", low=1)
    prompt: tuple[str, ...] = option((), "What to continue greedily.", example="Once upon a time")
    threads: int | None = option(
        None, "Threads of each runtime; those of torch (OMP_NUM_THREADS) otherwise.", low=1, expert=True
    )
    memory: float | None = option(
        None,
        "What a runtime may take, in GB; by default what the system has to give.",
        above=0,
        metavar="GB",
        expert=True,
    )
    allow_unproven: bool = option(False, "Exit 0 even where a runtime is not installed.")
    level: Level = option("generation", "How far to go; each level includes those before it.", expert=True)
    prompts: Path | None = option(
        None, "A text file with a prompt on each line.", place="input", metavar="FILE", expert=True
    )
    generate: int = option(24, "Tokens to continue by.", low=1, expert=True)
    dynamic_int8: bool = option(
        False, "Compare with PyTorch's dynamic INT8 of the same model too, unjudged.", expert=True
    )

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else int(self.memory * 1e9)
