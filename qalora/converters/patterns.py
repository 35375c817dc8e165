"""Regular expressions of a model's config, which names modules by them: compiled where they cannot run for ever."""

from __future__ import annotations

import re
from collections.abc import Collection

from qalora.adapter.peft_config import STEPS, is_safe, matching_steps
from qalora.errors import FormatError

__all__ = ["check_steps", "compiled"]


def compiled(text: str, where: str) -> re.Pattern[str]:
    """The expression; FormatError that begins with `where` for one that is none, or could take exponential time."""
    if not is_safe(text):
        raise FormatError(
            f"{where}: an expression with repeated groups or too many repetitions, which could run for ever"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where} is no regular expression: {error}") from error


def check_steps(patterns: Collection[re.Pattern[str]], modules: Collection[str], where: str) -> None:
    """FormatError for expressions that could take long to be matched with the modules of a checkpoint."""
    if matching_steps([pattern.pattern for pattern in patterns], modules) > STEPS:
        raise FormatError(where, expected=f"expressions that match in {STEPS} steps", got="some that could take longer")
