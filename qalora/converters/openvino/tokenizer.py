"""The tokenizer as two graphs, which openvino-genai reads: made by openvino-tokenizers of transformers' own class."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters.tokenizer import UnknownCutError, has_tokenizer, load_tokenizer
from qalora.errors import first_line

__all__ = ["tokenizer_files"]

NAMES = ("openvino_tokenizer", "openvino_detokenizer")

_NAMES = re.compile(rb'(?<=[ _]name=")[^"]*(?=")|(?<=names=")[^"]*(?=")')
_NUMBERED = re.compile(rb"(?<![^,])([A-Za-z][A-Za-z0-9]*_)(\d+)(?![^.,])")
"""Among the names of a layer or a tensor, one of its kind and a number that counts all layers of the process."""


def tokenizer_files(model: Checkpoint) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files by name, and what a user should know where there are none."""
    if not has_tokenizer(model):
        return {}, ()
    if any(importlib.util.find_spec(name) is None for name in ("openvino", "openvino_tokenizers")):
        return {}, (
            "openvino: the tokenizer's graphs, which openvino-genai needs, are left out, since openvino-tokenizers is "
            'not installed: pip install "qalora[openvino]"',
        )
    try:
        tokenizer = load_tokenizer(model)
    except UnknownCutError:
        return {}, ("openvino: the tokenizer's graphs are left out: its rule for cutting text is not known here",)
    import openvino
    from openvino_tokenizers import convert_tokenizer

    try:
        made = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # the library raises what it likes
        return {}, (f"openvino: openvino-tokenizers does not convert the tokenizer ({first_line(error)})",)
    files = {}
    with tempfile.TemporaryDirectory() as place:
        for name, graph in zip(NAMES, made, strict=True):
            openvino.save_model(graph, Path(place, f"{name}.xml"))
            for end in (".xml", ".bin"):
                content = Path(place, f"{name}{end}").read_bytes()
                files[f"{name}{end}"] = _renumbered(content) if end == ".xml" else content
    return files, ()


def _renumbered(graph: bytes) -> bytes:
    """The graph with its layers counted from its own first one, so that the same tokenizer has the same bytes."""
    numbers: dict[bytes, int] = {}

    def own(match: re.Match[bytes]) -> bytes:
        begin, number = match.groups()
        return begin + b"%d" % numbers.setdefault(number, len(numbers))

    return _NAMES.sub(lambda names: _NUMBERED.sub(own, names.group()), graph)
