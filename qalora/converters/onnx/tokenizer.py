"""The files of a tokenizer as onnxruntime-genai has to be given them, where it would not do with the model's own.

Its tokenizer takes from the decoder whether a space stands before each part of a text between added tokens: it does
where the decoder strips one (`Strip`). A tokenizer that puts none, or one before the first part alone, as Mistral's
does, which a chat begins with an added token before: its decoder is written as one that does the same and is not called
so.

It knows some expressions for cutting text by their words alone, and takes no others with a number in braces.

It reads one chat template, from tokenizer_config.json, and from chat_template.jinja where there is none; it does not
load several that stand in tokenizer_config.json. transformers reads the files first, so that the files are written.

Source: onnxruntime-extensions, operators/tokenizer/bpe_kernels.cc, LoadSpmModelParams and SpmTokenize, bpe_utils.hpp,
PreTokenizerWithRegEx, and tokenizer_jsconfig.hpp, Load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.cutting import in_known_words
from qalora.converters.huggingface import TEMPLATES
from qalora.converters.sentencepiece import spaces_of
from qalora.converters.tokenizer import DEFAULT_TEMPLATE, chat_templates
from qalora.errors import InputError, shown
from qalora.formats.json_text import read_json_object
from qalora.formats.output import ordered_json_bytes, text_bytes

__all__ = ["genai_files"]

LIMIT = 256 << 20
KEY = "chat_template"
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CUT = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": ""}
"""What STRIP does to a whole text, to whoever knows expressions."""

SPACES_NOTE = (
    "onnx: tokenizer.json has its decoder in other words, or onnxruntime-genai would put spaces into a chat: what that "
    "decodes may begin with one"
)
WORDS_NOTE = (
    "onnx: tokenizer.json has its rule for cutting text in other words, which mean the same, since onnxruntime-genai "
    "does not take the model's own"
)


def genai_files(model: Checkpoint) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """(files for the folder by name, in the place of the model's own or beside them; notes about them); FormatError for
    a chat template that is none, InputError for one whose name is no file's.
    """
    settings, files = _read(model, "tokenizer_config.json"), {}
    templates = chat_templates(model) if KEY in settings or "tokenizer.json" in model.files else {}
    apart = any(name == DEFAULT_TEMPLATE or name.startswith(f"{TEMPLATES}/") for name in model.files)
    if KEY in settings and (apart or not isinstance(settings[KEY], str)):
        files["tokenizer_config.json"] = ordered_json_bytes(
            {key: value for key, value in settings.items() if key != KEY}
        )
        if not apart:
            files |= {_file_name(model, name): text_bytes(text) for name, text in templates.items()}
    content = _read(model, "tokenizer.json")
    decoder = content.get("decoder")
    steps = decoder.get("decoders") if isinstance(decoder, dict) else None
    changed: dict[str, Any] = {}
    if isinstance(steps, list) and steps[-2:] == [{"type": "Fuse"}, STRIP] and _bare(content, chats=bool(templates)):
        changed["decoder"] = {"type": "Sequence", "decoders": [*steps[:-1], CUT]}
    if (rule := _rule(content)) is not None:
        changed["pre_tokenizer"] = rule
    if changed:
        files["tokenizer.json"] = ordered_json_bytes({**content, **changed})
    notes = {"decoder": SPACES_NOTE, "pre_tokenizer": WORDS_NOTE}
    return files, tuple(notes[key] for key in changed)


def _rule(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rule for cutting text in words that the library takes; None for one that needs none, or a damaged file."""
    try:
        return in_known_words(content.get("pre_tokenizer"), ignore_merges=bool(content["model"].get("ignore_merges")))
    except (KeyError, TypeError, AttributeError):
        return None


def _read(model: Checkpoint, name: str) -> dict[str, Any]:
    return read_json_object(model.files[name], LIMIT) if name in model.files else {}


def _file_name(model: Checkpoint, name: str) -> str:
    """Where transformers looks for a chat template of this name."""
    if name == "default":
        return DEFAULT_TEMPLATE
    if not re.fullmatch(r"[\w][\w .-]{0,99}", name):
        where = f"{model.path}/tokenizer_config.json: chat_template"
        raise InputError(where, expected="names of letters, digits, spaces, points, - and _", got=shown(name))
    return f"{TEMPLATES}/{name}.jinja"


def _bare(content: Mapping[str, Any], *, chats: bool) -> bool:
    """Whether no space stands before a part of a chat; False for a damaged file, of which others say so."""
    try:
        return spaces_of(content) in (("never", "first") if chats else ("never",))
    except (KeyError, TypeError, AttributeError):
        return False
