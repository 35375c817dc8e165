"""The Modelfile beside a GGUF file, from which `ollama create NAME -f Modelfile` makes a model.

Syntax: ollama/ollama, docs/modelfile.mdx and parser/parser.go: a value in three quotation marks ends at the next three
that white space follows, nothing in it is escaped, and what does not print is dropped. What cannot be said so is left
out. Templates are Go's (text/template), with .System, the system messages, and .Messages, each with .Role and
.Content.

TEMPLATE is written where the chat template is one whose turns `qalora.converters.gguf.chat` finds, by rendering it.
Without TEMPLATE, `ollama create` compares the text of the file's own chat template with those that it knows, and takes
the nearest if it is near (server/model.go, template.Named: fewer than 100 changes); otherwise newer versions have
llama.cpp apply the file's own (server/routes.go, chatModeForModel), and older ones pass the prompt as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qalora.converters.gguf.chat import Turns, turns_of
from qalora.errors import FormatError, shown
from qalora.formats.gguf import Metadata
from qalora.formats.gguf_ends import FILLING, eog_of, marked

__all__ = ["MODELFILE", "modelfile", "turns_in"]

MODELFILE = "Modelfile"
QUOTES = '"""'
LONGEST_STOP = 100
CONTROL = 3

_UNKNOWN = """\
# The chat template of the file is none that could be put into Ollama's language here: there is no TEMPLATE. Ollama then
# takes one of its own, where that is nearly the file's, or has llama.cpp apply the file's; versions before it ran
# llama-server pass the prompt as it is.
"""
_NONE = """\
# The file has no chat template: Ollama passes the prompt as it is.
"""
_NO_SYSTEM = """\
# The chat template takes no system message: this one leaves it out.
"""


def modelfile(metadata: Metadata, names: Sequence[str]) -> str:
    """The text of the Modelfile of a GGUF file with this metadata; `names` are its parts, the first first.

    FormatError for a vocabulary that is no list.
    """
    template, eos = metadata.get("tokenizer.chat_template"), _token(metadata, "tokenizer.ggml.eos_token_id")
    turns = turns_in(metadata)
    turns = turns if turns is not None and all(_sayable(text) for text in turns.texts()) else None
    lines = "".join(f"FROM ./{name}\n" for name in names)
    if turns is not None:
        lines += "" if turns.system is not None else _NO_SYSTEM
        lines += f"TEMPLATE {QUOTES}{go_template(turns)}{QUOTES}\n"
        lines += f"SYSTEM {QUOTES}{turns.default}{QUOTES}\n" if turns.default else ""
    else:
        lines += _NONE if template is None else _UNKNOWN
    stops = [eos, *(_token(metadata, f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))]
    stops += [turns.end] if turns is not None and turns.end in _control_tokens(metadata) else []
    stops += _end_texts(metadata)
    return lines + "".join(f'PARAMETER stop "{stop}"\n' for stop in dict.fromkeys(stops) if _is_stop(stop))


def turns_in(metadata: Metadata) -> Turns | None:
    """The turns of a file's chat template; None where it has none, or another kind than is known here."""
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return None
    bos, eos = (_token(metadata, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    return turns_of(template, bos=bos, eos=eos, adds_bos=_adds_bos(metadata))


def go_template(turns: Turns) -> str:
    """Turns in Ollama's language, without trim markers: every character outside of {{ }} is one of the prompt."""
    before, after = (_text(text) for text in turns.system or ("", ""))
    start, first, inside = "{{ range .Messages }}", "{{ if ", ""
    if turns.system is not None and turns.place == "own":
        first = '{{ if eq .Role "system" }}' + before + "{{ .Content }}" + after + "{{ else if "
    elif turns.system is not None and turns.place == "first":
        start = "{{ $system := .System }}" + start
        inside = "{{ if $system }}" + before + "{{ $system }}" + after + '{{ $system = "" }}{{ end }}'
    elif turns.system is not None:
        start = "{{ range $i, $m := .Messages }}"
        last = "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}"
        inside = last + before + "{{ $.System }}" + after + "{{ end }}"
    user, answer = ([_text(text) for text in pair] for pair in (turns.user, turns.assistant))
    parts = [
        _text(turns.prefix),
        "{{ if not .System }}" + _text(turns.without) + "{{ end }}" if turns.without else "",
        start,
        first + 'eq .Role "user" }}' + user[0] + inside + "{{ .Content }}" + user[1],
        '{{ else if eq .Role "assistant" }}' + answer[0] + "{{ .Content }}" + answer[1],
        "{{ end }}{{ end }}" + _text(turns.generation),
    ]
    return "".join(parts)


def _text(text: str) -> str:
    """A text as a Go template has it."""
    return text.replace("{{", '{{ "{{" }}')


def _sayable(text: str) -> bool:
    """Whether a text comes out of three quotation marks as it went in."""
    return QUOTES not in text and all(char.isprintable() or char in "\n\t" for char in text)


def _is_stop(text: str) -> bool:
    return 0 < len(text) <= LONGEST_STOP and text.isprintable() and '"' not in text


def _end_texts(metadata: Metadata) -> list[str]:
    """The texts of the model's end tokens, but for those that llama.cpp takes from the vocabulary for ends of a file
    that is filled in."""
    mark, eog, tokens = marked(metadata), eog_of(metadata), _listed(metadata, "tokens")
    ids = mark if mark is not None else () if eog is None else (*eog.from_keys, *eog.from_texts)
    filling = {text for texts in FILLING.values() for text in texts} if mark is None else set()
    return [str(tokens[n]) for n in ids if n < len(tokens) and tokens[n] not in filling]


def _listed(metadata: Metadata, key: str) -> tuple[Any, ...]:
    """An array of the vocabulary; FormatError for what is none."""
    value = metadata.get(f"tokenizer.ggml.{key}", ())
    if not isinstance(value, tuple):
        raise FormatError(f"tokenizer.ggml.{key}", expected="a list", got=shown(value), todo="convert it again")
    return value


def _token(metadata: Metadata, key: str) -> str:
    """The text of a token that metadata names by its number; "" where there is none."""
    tokens, number = _listed(metadata, "tokens"), metadata.get(key)
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        return ""
    return str(tokens[number])


def _control_tokens(metadata: Metadata) -> set[str]:
    tokens, kinds = (_listed(metadata, key) for key in ("tokens", "token_type"))
    return {str(token) for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL}


def _adds_bos(metadata: Metadata) -> bool:
    """Whether llama.cpp puts BOS before every prompt: as the file says, or as llama.cpp does by default."""
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))
