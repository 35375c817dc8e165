"""What transformers' conversion of GGUF metadata to tokenizer files leaves out of llama.cpp's rules, put into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qalora.converters.added_tokens import listed_added
from qalora.converters.cutting import Cut, cut_named
from qalora.converters.sentencepiece import normalizer_of
from qalora.formats.gguf import Metadata
from qalora.formats.gguf_ends import KNOWN
from qalora.formats.output import write_json

__all__ = ["cut_of", "is_spm", "tidy"]


def is_spm(metadata: Metadata) -> bool:
    """Whether a GGUF file's tokenizer came from SentencePiece."""
    return bool(metadata.get("tokenizer.ggml.model") == "llama")


def cut_of(metadata: Metadata) -> Cut | None:
    """A GGUF file's rule for cutting text; None for one that is not known here."""
    return cut_named(metadata.get("tokenizer.ggml.pre"))


def tidy(folder: Path, metadata: Metadata, *, stripping: bool) -> None:
    """Write over what transformers' conversion leaves out of llama.cpp's rules."""
    cut, spm = cut_of(metadata), is_spm(metadata)
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", spm or (cut is not None and cut.begins)))
    ends = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    write_json(folder / "tokenizer_config.json", {**config, "add_bos_token": begins, "add_eos_token": ends})
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = listed_added(metadata, KNOWN, stripping=stripping)
    if spm:
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        content["normalizer"], content["pre_tokenizer"] = normalizer_of(prefix=prefix), None
    elif cut is not None:
        content["normalizer"], content["pre_tokenizer"] = None, cut.pre_tokenizer
        content["model"]["ignore_merges"] = cut.ignore_merges
        _name_added(content)
    if begins or ends:
        content["post_processor"] = _around(metadata, spm=spm, begins=begins, ends=ends)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _name_added(content: dict[str, Any]) -> None:
    """Give added tokens their texts in the vocabulary: where they are not ASCII, the conversion wrote their bytes, and
    transformers takes the texts for new tokens.
    """
    vocabulary = content["model"]["vocab"]
    texts = {n: text for text, n in vocabulary.items()}
    for token in content["added_tokens"]:
        number, text = token["id"], token["content"]
        if number in texts and text not in vocabulary:
            del vocabulary[texts[number]]
            vocabulary[text] = number


def _around(metadata: Metadata, *, spm: bool, begins: bool, ends: bool) -> dict[str, Any] | None:
    """tokenizer.json's step that puts BOS before a text, and EOS behind it; those that a file does not name are
    llama.cpp's own. None where they are no tokens.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    defaults = {"bos": 1, "eos": 2} if spm else {"bos": 11, "eos": 11}
    special: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[dict[str, Any]]] = {"bos": [], "eos": []}
    for kind in [kind for kind, present in (("bos", begins), ("eos", ends)) if present]:
        number = metadata.get(f"tokenizer.ggml.{kind}_token_id", defaults[kind])
        if isinstance(tokens, tuple) and type(number) is int and 0 <= number < len(tokens):
            text = str(tokens[number])
            special[text] = {"id": text, "ids": [number], "tokens": [text]}
            parts[kind] = [{"SpecialToken": {"id": text, "type_id": 0}}]
    one, two = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    single = [*parts["bos"], one, *parts["eos"]]
    pair = [*single, *parts["bos"], two, *parts["eos"]]
    return (
        {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special} if special else None
    )
