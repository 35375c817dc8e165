"""What a user may choose for a verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora.options.fields import Options, device_option, option
from qalora.options.words import Level

__all__ = ["Verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Options):
    """What artefacts are compared on, and how far; raises InputError for an option out of range."""

    text: Path | None = option(
        None, "Text file to compute on. Default: a built-in text.", place="input", metavar="FILE"
    )
    max_tokens: int = option(256, "Tokens of the text to use.", low=1)
    prompt: tuple[str, ...] = option((), "Prompt to continue with greedy decoding.", example="Once upon a time")
    threads: int | None = option(
        None, "Threads of each runtime. Default: as many as torch uses (OMP_NUM_THREADS).", low=1, expert=True
    )
    memory: float | None = option(
        None,
        "Memory that a runtime may use, in GB. Default: what is available.",
        above=0,
        metavar="GB",
        expert=True,
    )
    allow_unproven: bool = option(False, "Exit 0 even if a runtime is not installed.")
    level: Level = option("generation", "What to compare. Each level includes those before it.", expert=True)
    prompts: Path | None = option(
        None, "Text file with one prompt per line.", place="input", metavar="FILE", expert=True
    )
    generate: int = option(24, "Tokens to generate per prompt.", low=1, expert=True)
    device: str = device_option("Device that the reference is computed on", expert=True)
    dynamic_int8: bool = option(
        False, "Also measure PyTorch's dynamic INT8 of the same model. No gate applies to it.", expert=True
    )

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else int(self.memory * 1e9)
