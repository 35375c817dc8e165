"""tokenizer.json as onnxruntime-genai has to be given it, where its tokenizer would make other tokens of a chat.

Its tokenizer takes from the decoder whether a space stands before each part of a text between added tokens: it does
where the decoder strips one (`Strip`). A tokenizer that puts one before the first part alone, as Mistral's does, needs
none in a chat, which begins with an added token: its decoder is written as one that does the same and is not called so.

Source: onnxruntime-extensions, operators/tokenizer/bpe_kernels.cc, LoadSpmModelParams and SpmTokenize.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.sentencepiece import spaces_of
from qalora.converters.tokenizer import has_template
from qalora.formats.json_text import read_json_object
from qalora.formats.output import text_bytes

__all__ = ["NOTE", "genai_tokenizer"]

LIMIT = 256 << 20
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CUT = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": ""}
"""What STRIP does to a whole text, to whoever knows expressions."""

NOTE = (
    "onnx: tokenizer.json has its decoder in other words, or onnxruntime-genai would put spaces into a chat: what that "
    "decodes may begin with one"
)


def genai_tokenizer(model: Checkpoint) -> bytes | None:
    """tokenizer.json for the folder; None where the model's own will do."""
    path = model.files.get("tokenizer.json")
    if path is None or not has_template(model):
        return None
    content = read_json_object(path, LIMIT)
    decoder = content.get("decoder")
    if not isinstance(decoder, dict) or not isinstance(decoder.get("decoders"), list) or not _first(content):
        return None
    steps = decoder["decoders"]
    if steps[-2:] != [{"type": "Fuse"}, STRIP]:
        return None
    changed = {**content, "decoder": {**decoder, "decoders": [*steps[:-1], CUT]}}
    return text_bytes(json.dumps(changed, ensure_ascii=False, indent=2) + "\n")


def _first(content: Mapping[str, Any]) -> bool:
    """Whether spaces stand before the first part of a text alone; False for a damaged file, of which others say so."""
    try:
        return spaces_of(content) == "first"
    except (KeyError, TypeError, AttributeError):
        return False
