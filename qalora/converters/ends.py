"""Where generation ends: the one record of a model's end tokens, whatever files name them.

Each kind of model is asked as its own runtime asks it, see `Layout.ends`:

    a float, GPTQ or HQQ folder, our own   generation_config.json where there is that file, though it name none, else
                                           config.json: transformers' generate
    an MLX folder                          generation_config.json where it names any, else config.json; and the
                                           tokenizer's own end token: mlx-lm
    a GGUF file                            llama.cpp's set, see `qalora.formats.gguf_ends`
    an ONNX graph                          genai_config.json where there is that file, else as for a float folder

What a runtime ends at by a rule of its own, whatever an artefact says, is `added`. Every writer makes its artefact say
this set, or refuses; files that disagree are spoken of in notes, and in what is written they agree.

Sources: transformers, generation/utils.py, adjust_generation_fn, and tokenization_utils_base.py, _from_pretrained;
mlx-lm, utils.py, load_config, and tokenizer_utils.py, TokenizerWrapper; onnxruntime-genai, src/config.cpp. The tests
hold each rule against its library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters import layout
from qalora.converters.families import family_of
from qalora.errors import FormatError, InputError, json_kind, shown
from qalora.formats.files import contained
from qalora.formats.gguf_ends import MARK, eog_of, marked
from qalora.formats.json_text import parse_json, read_json_object
from qalora.formats.output import json_bytes
from qalora.formats.safetensors import read_header, shards

__all__ = [
    "GENERATION",
    "MARK",
    "Ends",
    "config_for_transformers",
    "config_with_ends",
    "end_notes",
    "ends_of",
    "generation_bytes",
    "in_words",
    "mark_text",
    "special_token",
    "token_texts",
    "tokenizer_end",
    "write_generation",
]

GENERATION = "generation_config.json"
GENAI = "genai_config.json"
KEY = "eos_token_id"
LIMIT = 16 << 20
TOKENIZER_LIMIT = 256 << 20
SHOWN = 8
"""Tokens that a sentence names; it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """A model's end tokens.

    ids     in the order in which they are named, each once; none where generation ends at no token
    source  what names them
    added   those of them that the model's own runtime adds by a rule of its own, whatever the files say
    """

    ids: tuple[int, ...]
    source: str
    added: frozenset[int] = frozenset()


def ends_of(model: Checkpoint) -> Ends:
    """The record of a model. FormatError for what is no token id of it, and no list of such."""
    rule = layout(model.layout).ends
    if model.gguf is not None and (rule == "llama.cpp" or GENERATION not in model.files):
        return _of_gguf(model)
    if rule == "onnxruntime-genai" and (path := _genai(model)) is not None:
        return _of_genai(model, path)
    if rule == "mlx-lm":
        return _of_mlx(model)
    value, source = _end_setting(model)
    return Ends(ids=_ids(model, value, _where(model, source)), source=source)


def _end_setting(model: Checkpoint) -> tuple[Any, str]:
    """eos_token_id as transformers' generate finds it, and the file that has it."""
    if GENERATION in model.files:
        return _generation(model).get(KEY), GENERATION
    return model.config.get(KEY), "config.json"


def _of_mlx(model: Checkpoint) -> Ends:
    value, source = _generation(model).get(KEY), GENERATION
    if not value:
        value, source = model.config.get(KEY), "config.json"
    ids, own = _ids(model, value, _where(model, source)), tokenizer_end(model)
    if own is None or own in ids or _mark(model) == ids:
        return Ends(ids=ids, source=source)
    return Ends(ids=(*ids, own), source=f"{source} and the tokenizer", added=frozenset({own}))


def _of_gguf(model: Checkpoint) -> Ends:
    metadata = model.gguf
    if metadata is None:
        raise TypeError("a model without GGUF metadata")
    mark, eog = marked(metadata), eog_of(metadata)
    if mark is not None:
        return Ends(ids=_ids(model, list(mark), f"{model.path}: {MARK}"), source="the file's metadata")
    if eog is None:
        return Ends(ids=(), source="the file's metadata")
    rows = _rows(model)
    ids = tuple(n for n in eog.ids if n < rows)
    return Ends(ids=ids, source="the file's metadata, as llama.cpp reads it", added=frozenset(eog.from_texts) & {*ids})


def _of_genai(model: Checkpoint, path: Path) -> Ends:
    settings = read_json_object(path, LIMIT).get("model")
    if not isinstance(settings, dict):
        raise FormatError(f"{path}: model", expected="an object", got=json_kind(settings))
    value = settings.get(KEY)
    if value is None or value == []:
        value = settings.get("pad_token_id", 0)  # as the library does
    return Ends(ids=_ids(model, value, f"{path}: model"), source=GENAI)


def _genai(model: Checkpoint) -> Path | None:
    path = contained(model.path.parent if model.path.is_file() else model.path, GENAI)
    return path if path.is_file() else None


def _where(model: Checkpoint, source: str) -> str:
    return f"{model.path}/{source}" if model.path.is_dir() else f"{model.path}: {source}"


def _rows(model: Checkpoint) -> int:
    """The tokens that the model can say."""
    embedding = model.tensors.get("model.embed_tokens.weight")
    return int(model.config.get("vocab_size") or 0) if embedding is None else embedding.shape[0]


def _ids(model: Checkpoint, value: Any, where: str) -> tuple[int, ...]:
    """A value of eos_token_id as token ids, each once; FormatError for another value, or a token without a row."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    rows = _rows(model)
    if not all(type(n) is int and 0 <= n < rows for n in listed):
        expected = f"a token from 0 to {rows - 1}, or a list of such"
        raise FormatError(f"{where}: {KEY}", expected=expected, got=shown(value), todo="mend it there")
    return tuple(dict.fromkeys(listed))


def _generation(model: Checkpoint) -> dict[str, Any]:
    path = model.files.get(GENERATION)
    return {} if path is None else read_json_object(path, LIMIT)


def mark_text(model: Checkpoint, ends: Ends) -> dict[str, str]:
    """The metadata of safetensors that says, where mlx-lm adds the tokenizer's own end token, what the model's are."""
    own = tokenizer_end(model)
    return {} if own is None or own in ends.ids else {MARK: str(list(ends.ids))}


def _mark(model: Checkpoint) -> tuple[int, ...] | None:
    for path in sorted(set(shards(model.path).values())):
        text = read_header(path).metadata.get(MARK)
        if text is not None:
            content = parse_json(text, f"{path}: {MARK}")
            return tuple(content) if isinstance(content, list) else None
    return None


def tokenizer_end(model: Checkpoint) -> int | None:
    """The tokenizer's own end token, None where it has none, or one that the model has no row for."""
    if model.gguf is not None:
        own = model.gguf.get(f"tokenizer.ggml.{KEY}")
        return own if type(own) is int and 0 <= own < _rows(model) else None
    maps = [_settings(model, name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    for settings in maps[1:] if "added_tokens_decoder" in maps[1] else maps:  # beside that, no map is read
        token = settings.get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            rows = _rows(model)
            return next((n for n, known in token_texts(model).items() if known == text and n < rows), None)
    return None


def _settings(model: Checkpoint, name: str) -> dict[str, Any]:
    """A JSON file of the tokenizer; nothing of one that is not there, or damaged: whoever loads it says so."""
    try:
        return read_json_object(model.files[name], LIMIT) if name in model.files else {}
    except InputError:
        return {}


def token_texts(model: Checkpoint) -> dict[int, str]:
    """The texts of tokens by their ids, as the tokenizer's file has them; nothing where there is none, or a damaged
    one."""
    if model.gguf is not None:
        tokens = model.gguf.get("tokenizer.ggml.tokens")
        return dict(enumerate(tokens)) if isinstance(tokens, tuple) else {}
    names = ("tokenizer.json",) if "tokenizer.json" in model.files else ("vocab.json", "added_tokens.json")
    texts: dict[int, str] = {}
    for path in (model.files[name] for name in names if name in model.files):
        state = path.stat()
        texts |= _texts_in(path, state.st_size, state.st_mtime_ns)
    return texts


@lru_cache(maxsize=2)
def _texts_in(path: Path, size: int, changed: int) -> dict[int, str]:
    """The tokens of one file, read once as long as it has its size and time of change; callers do not change them."""
    try:
        content: Any = read_json_object(path, TOKENIZER_LIMIT)
        if path.name == "tokenizer.json":
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            content = {**content["model"]["vocab"], **added}
        return {n: text for text, n in content.items() if type(n) is int}
    except (InputError, KeyError, TypeError, AttributeError):
        return {}


def in_words(ids: Iterable[int], texts: Mapping[int, str]) -> str:
    """Token ids with their texts, for a sentence."""
    listed = [f"{n} {texts[n]!r:.60}" if n in texts else str(n) for n in ids]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more if listed else "no token"


def end_notes(model: Checkpoint) -> tuple[str, ...]:
    """What a user should know where the files of a model name other end tokens than those that count."""
    if layout(model.layout).ends == "llama.cpp":
        return ()
    ends, texts, notes, name = ends_of(model), token_texts(model), [], model.path.name
    for source, value in (("config.json", model.config.get(KEY)), (GENERATION, _generation(model).get(KEY))):
        try:
            other = _ids(model, value, source)
        except InputError:
            notes.append(f"{name}: {source} names an {KEY} that is no token, {value!r:.60}: it is passed over")
            continue
        if other and set(other) != set(ends.ids) and not ends.source.startswith(source):
            notes.append(
                f"{name}: generation ends at {in_words(ends.ids, texts)}, as {ends.source} says; {source} says "
                f"{in_words(other, texts)}"
            )
    own = tokenizer_end(model)
    if own is not None and own not in ends.ids:
        notes.append(
            f"{name}: generation ends at {in_words(ends.ids, texts)}, as {ends.source} says; the tokenizer's own end "
            f"token, {in_words([own], texts)}, is not among them"
        )
    if _generation(model).get("stop_strings"):
        notes.append(f"{name}: {GENERATION} has stop_strings, which only transformers' generate ends at")
    return tuple(notes)


def special_token(model: Checkpoint, kind: str) -> int | None:
    """The "bos" or "pad" token that generation takes, None where neither config names one that the model has."""
    for settings in (_generation(model), model.config):
        value = settings.get(f"{kind}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if type(first) is int and 0 <= first < _rows(model):
            return first
    return None


def _as_value(ids: Sequence[int]) -> Any:
    """As configs write it."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def config_with_ends(model: Checkpoint) -> dict[str, Any]:
    """config.json for an artefact: the model's, with the model's end tokens in it."""
    ends = ends_of(model).ids
    return dict(model.config) if _says(model.config, ends) else {**model.config, KEY: _as_value(ends)}


def config_for_transformers(model: Checkpoint) -> dict[str, Any]:
    """`config_with_ends`, with the class that transformers opens the artefact with, where the model's names none."""
    architecture = family_of(model.config, model.path).architecture
    return {"architectures": [architecture], **config_with_ends(model)}


def _says(settings: Mapping[str, Any], ends: Sequence[int]) -> bool:
    value = settings.get(KEY)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(n) is int for n in listed) and set(listed) == set(ends)


def generation_bytes(model: Checkpoint) -> bytes:
    """generation_config.json for an artefact: the model's own, byte for byte, where it says the same; else with the
    model's end tokens in it, or made of config.json's tokens where there is none.
    """
    ends, content = ends_of(model).ids, _generation(model)
    if GENERATION in model.files:
        if _says(content, ends):
            return model.files[GENERATION].read_bytes()
    else:
        known = {f"{kind}_token_id": model.config.get(f"{kind}_token_id") for kind in ("bos", "pad")}
        content = {"_from_model_config": True, **{key: value for key, value in known.items() if value is not None}}
    value = _as_value(ends)
    others = {key: part for key, part in content.items() if key != KEY}
    return json_bytes(others if value is None else {**others, KEY: value})


def write_generation(model: Checkpoint, folder: Path) -> None:
    """Write generation_config.json into an artefact's folder."""
    (folder / GENERATION).write_bytes(generation_bytes(model))
