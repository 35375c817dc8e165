"""The tokenizer of a folder, as whoever loads the folder gets it: from its own files, by a class of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora.converters.tokenizer import TOKENIZER_FILES
from qalora.errors import FormatError, QaloraError, first_line
from qalora.parity.runtimes.settings import quiet

__all__ = ["FolderTokenizer", "folder_tokenizer"]


class FolderTokenizer:
    """A tokenizer of transformers' class."""

    follows = frozenset({"text", "chat", "token", "around", "spaces"})

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; special ones are always parsed."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=around)["input_ids"]
        return ids


def folder_tokenizer(folder: Path, load: Callable[[Path], Any] | None = None) -> FolderTokenizer | None:
    """The folder's tokenizer by `load`, AutoTokenizer by default; None where it has no such file.

    FormatError where it is not taken.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet():
            tokenizer = _auto(folder) if load is None else load(folder)
    except QaloraError:
        raise
    except Exception as error:  # whatever damaged files make a foreign loader raise
        reason = first_line(error)
        raise FormatError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error
    tokenizer.model_max_length = 1 << 30  # or it warns of a text that no model is to see
    return FolderTokenizer(tokenizer)


def _auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
