"""Tokenizers between the ecosystems: Hugging Face's files, and the metadata of GGUF.

Byte-level BPE here, and what came from SentencePiece in `qalora.converters.sentencepiece`. The rules that cut text are
in `qalora.converters.cutting`, those of added tokens in `qalora.converters.added_tokens`; what is not known there is
refused: a wrong rule gives other tokens without a word. What a model's files mean is asked of transformers, whose
classes follow tokenizer_config.json where it differs from tokenizer.json. Chat templates are carried as text and never
rendered here.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.added_tokens import OtherSpace, check_added, elsewhere, name_in_gguf, strips
from qalora.converters.cutting import CUTS, name_of
from qalora.converters.first_tokens import tokens_around
from qalora.converters.huggingface import LICENCES, TEMPLATES
from qalora.converters.sentencepiece import SPACE, Spaces, sentencepiece_entries, spaces_of
from qalora.converters.tokenizer_tidy import cut_of, is_spm, tidy
from qalora.errors import FormatError, InputError
from qalora.formats.gguf import Metadata, Value, ValueType, metadata_bytes
from qalora.formats.json_text import read_json_object
from qalora.formats.output import write_json
from qalora.formats.text import check_text, read_utf8

__all__ = [
    "DEFAULT_TEMPLATE",
    "UnknownCutError",
    "chat_templates",
    "converted_files",
    "gguf_tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "template_name",
    "tokenizer_part",
    "with_line_ends",
    "write_tokenizer",
]

TOKENIZER_LIMIT = 256 << 20
TEXT_ENDS = (".json", ".jinja", ".txt")
TWO_FILES = ("vocab.json", "merges.txt")
"""A byte-level BPE as transformers' own classes kept it before tokenizer.json."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", TWO_FILES[0])
"""A folder with a tokenizer has one of these."""

KEPT = 2
"""Conversions of GGUF metadata that are kept, the latest: that of a reference, and that of another artefact."""

DEFAULT_TEMPLATE = "chat_template.jinja"
TEMPLATE_KEY = "tokenizer.chat_template"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


class UnknownCutError(FormatError):
    """A GGUF file whose rule for cutting text is not known here: its tokenizer is carried, and never converted."""


def has_tokenizer(model: Checkpoint) -> bool:
    """Whether the model brings a tokenizer."""
    if _has_files(model):
        return True
    return model.gguf is not None and model.gguf.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def _has_files(model: Checkpoint) -> bool:
    return bool({"tokenizer.json", "tokenizer.model"} & set(model.files)) or set(model.files) >= {*TWO_FILES}


def write_tokenizer(model: Checkpoint, folder: Path) -> list[str]:
    """Write the model's companion files into `folder`, the tokenizer made from GGUF metadata if it has no files.

    Gives the names written; none for a model without tokenizer.
    """
    for name, path in model.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    if converted_files(model):
        _write_converted(model, folder)
    return [*model.files, *converted_files(model)]


def converted_files(model: Checkpoint) -> list[str]:
    """The names of the files that `write_tokenizer` makes from GGUF metadata; none where the model has files."""
    if model.gguf is None or not has_tokenizer(model) or _has_files(model):
        return []
    if cut_of(model.gguf) is None and not is_spm(model.gguf):
        raise UnknownCutError(
            f"{model.path}: tokenizer.ggml.pre",
            expected=f"a rule for cutting text that is known here: {', '.join(CUTS)}",
            got=repr(model.gguf.get("tokenizer.ggml.pre"))[:80],
            todo="put the tokenizer.json of the original model beside a folder of it, or export to gguf",
        )
    templates = _templates_of(model.gguf)
    names = [DEFAULT_TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja" for name in templates]
    return ["tokenizer.json", "tokenizer_config.json", *names]


def template_name(name: str) -> str:
    """The name of a chat template as a GGUF key has it. Source: gguf-py, GGUFWriter.add_chat_template."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def with_line_ends(text: str) -> str:
    """A chat template with the line ends that Python makes of a file's, and Jinja of a template's."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_tokenizer(model: Checkpoint) -> Any:
    """The model's tokenizer as transformers' class; InputError if it has none, FormatError if transformers does not
    take it, or its files or chat template are not UTF-8. Code that a tokenizer brings is not run.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(model):
        raise InputError(f"{model.path}: the model has no tokenizer", todo="put tokenizer.json beside its config.json")
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(model, Path(place))
        write_json(Path(place) / "config.json", {"model_type": model.config["model_type"]})
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            tokenizer("a")
        except Exception as error:  # whatever damaged files make transformers raise
            for name, path in model.files.items():
                if path.suffix in TEXT_ENDS and name not in LICENCES:
                    read_utf8(path, TOKENIZER_LIMIT)  # which names the line that is not UTF-8
            reason = _reason(error, place, model)
            raise FormatError(f"{model.path}: its tokenizer cannot be loaded ({reason})") from error
        check_text(tokenizer.chat_template, f"{model.path}: its chat template")
        return tokenizer


def _reason(error: Exception, place: str, model: Checkpoint) -> str:
    """The first line of what transformers says of a tokenizer that it read from `place`."""
    if "trust_remote_code" in str(error):
        return "it is made by code of its own, which is not run here"
    said = str(error).replace(place, str(model.path)).strip().splitlines()
    return ": ".join([type(error).__name__, *said[:1]])


def tokenizer_part(metadata: Metadata) -> Metadata:
    """What a GGUF file says of its tokenizer, and nothing else."""
    return Metadata(entries={key: value for key, value in metadata.entries.items() if key.startswith("tokenizer.")})


_conversions: dict[bytes, dict[str, bytes]] = {}
"""Converted files by the digest of what they were made from, the latest last; the bytes, since tokenizers change."""


def _write_converted(model: Checkpoint, folder: Path) -> None:
    """Write the files that GGUF metadata is converted to; once converted, the same tokenizer is not converted again."""
    if model.gguf is None:
        raise TypeError("a model without GGUF metadata")
    metadata, stripping = tokenizer_part(model.gguf), strips(model.gguf.get("general.name"))
    known = {"general.architecture": Value.text("llama")}  # transformers wants one, and refuses some
    source = metadata_bytes(metadata.with_entries(known))
    key = hashlib.sha256(source + bytes([stripping])).digest()
    files = _conversions.pop(key, None) or _conversion(model, metadata, source, stripping=stripping)
    _conversions[key] = files
    for oldest in list(_conversions)[:-KEPT]:
        _conversions.pop(oldest, None)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _conversion(model: Checkpoint, metadata: Metadata, source: bytes, *, stripping: bool) -> dict[str, bytes]:
    """transformers' conversion of GGUF metadata (`source` as a file), with llama.cpp's rules for cutting text, for what
    stands around it, and for added tokens.

    By the class that AutoTokenizer chooses, which would first read the file in pure Python for a config.
    """
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "tokenizer.gguf").write_bytes(source)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                place, gguf_file="tokenizer.gguf", local_files_only=True
            )
        except Exception as error:  # whatever damaged metadata makes transformers raise
            reason = _reason(error, place, model)
            raise FormatError(f"{model.path}: its tokenizer cannot be converted ({reason})") from error
        templates = _templates_of(metadata)
        tokenizer.chat_template = templates if set(templates) - {"default"} else templates.get("default")
        tokenizer.save_pretrained(place)
        tidy(Path(place), metadata, stripping=stripping)
        return {name: (Path(place) / name).read_bytes() for name in converted_files(model)}


def _templates_of(metadata: Metadata) -> dict[str, str]:
    """The chat templates of a GGUF file by name, "default" that which is used unless another is asked for."""
    start, found = f"{TEMPLATE_KEY}.", {"default": metadata.get(TEMPLATE_KEY)}
    for key in metadata.entries:
        name = key.removeprefix(start)
        if key.startswith(start) and name == template_name(name) != "default":
            found[name] = metadata.get(key)
    return {name: text for name, text in found.items() if name and isinstance(text, str)}


def gguf_tokenizer(
    model: Checkpoint, name: str | None = None, *, kept: Callable[[OtherSpace, Metadata], None] | None = None
) -> dict[str, Value]:
    """GGUF's tokenizer metadata of a model, from what transformers makes of its files; without a tokenizer, model
    "none". general.name is among it: `name`, the model's own by default, or one by which llama.cpp does with white
    space what the tokenizer does.

    kept  is called where llama.cpp does otherwise with white space beside added tokens, with all the metadata, and
          raises where that matters; without it any is refused

    Raises InputError for a tokenizer that is no BPE, whose cutting rule llama.cpp has no name for, or that does to a
    text what llama.cpp does not.
    """
    if not has_tokenizer(model):
        return {"general.name": Value.text(name or model.path.name), "tokenizer.ggml.model": Value.text("none")}
    if "tokenizer.model" in model.files and "tokenizer.json" not in model.files:
        raise InputError(
            f"{model.path}: tokenizer.model", expected="tokenizer.json", todo="save the tokenizer as a fast one"
        )
    settings = _read_json(model, "tokenizer_config.json") if "tokenizer_config.json" in model.files else {}
    templates = _template_entries(model, settings)
    tokenizer = load_tokenizer(model)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    try:
        entries, space = _entries(model, name or model.path.name, tokenizer, content)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"{model.path}: its tokenizer", expected="a BPE", got=f"{error!r:.120}") from error
    entries |= templates
    if space and kept is None:
        raise space.refusal()
    if space and kept is not None:
        kept(space, Metadata(entries=entries))
    return entries


def _entries(
    model: Checkpoint, name: str, tokenizer: Any, content: Mapping[str, Any]
) -> tuple[dict[str, Value], OtherSpace]:
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if content["model"].get(key):
            got = repr(content["model"][key])[:80]
            raise InputError(f"{model.path}: tokenizer.json: {key}", expected="none, as in llama.cpp", got=got)
    if content["model"].get("type") != "BPE":
        got = repr(content["model"].get("type"))[:80]
        raise InputError(
            f"{model.path}: tokenizer.json: model",
            expected="a BPE, as llama.cpp has it here",
            got=got,
            todo=elsewhere(),
        )
    added = _added(model, content)
    spaces = spaces_of(content)
    stripping, space = check_added(str(model.path), added, prefixed=spaces == "each")
    tokens, types = _vocabulary(
        content["model"]["vocab"], added, int(model.config["vocab_size"]), pieces=spaces is not None
    )
    if spaces is None:
        entries = _bpe_entries(model, content, tokens, types)
    else:
        entries = sentencepiece_entries(content["model"], tokens, types)
    for key, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = _special_id(model, tokenizer, ours, tokens)
        if token is not None:
            entries[f"{key}_token_id"] = Value.uint32(token)
    for key, adds in zip(("bos", "eos"), _around(model, tokenizer, entries), strict=True):
        entries[f"add_{key}_token"] = Value(type=ValueType.BOOL, value=adds)
    entries["add_space_prefix"] = Value(type=ValueType.BOOL, value=_prefix(tokenizer, spaces))
    result = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    named = {"general.name": Value.text(name_in_gguf(name, stripping=stripping))}
    return {**named, **result}, space


def _prefix(tokenizer: Any, spaces: Spaces | None) -> bool:
    """llama.cpp's add_space_prefix. A tokenizer that puts a space before a text alone is taken as its chats need it,
    which begin with an added token and have no spaces behind those; or as plain text does, where it has no chats.
    """
    return spaces in ("each", "each without") or (spaces == "first" and not tokenizer.chat_template)


def _added(model: Checkpoint, content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The added tokens that the model's files name, or that it has a row for; transformers' classes add others, which
    they need for themselves, behind the last row.
    """
    rows = int(model.config["vocab_size"])
    own = _read_json(model, "tokenizer.json") if "tokenizer.json" in model.files else {}
    named = {token["content"] for token in own.get("added_tokens") or []}
    return [token for token in content.get("added_tokens") or [] if token["id"] < rows or token["content"] in named]


def _around(model: Checkpoint, tokenizer: Any, entries: Mapping[str, Value]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS behind it; InputError where it puts anything else."""
    before, behind = tokens_around(tokenizer)
    bos, eos = ((entries[key].value,) if key in entries else None for key in ("bos_token_id", "eos_token_id"))
    if before not in ((), bos) or behind not in ((), eos):
        raise InputError(
            f"{model.path}: its tokenizer",
            expected="one that puts nothing around a text but BOS before it and EOS behind it, as llama.cpp does",
            got=f"{list(before)} before and {list(behind)} behind",
            todo=elsewhere(),
        )
    return bool(before), bool(behind)


def _bpe_entries(
    model: Checkpoint, content: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Value]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "model": Value.text("gpt2"),
        "pre": Value.text(_pre_of(model, content)),
        "tokens": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(tokens)),
        "token_type": Value(type=ValueType.ARRAY, element=ValueType.INT32, value=tuple(types)),
        "merges": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(merges)),
    }


def _pre_of(model: Checkpoint, content: Mapping[str, Any]) -> str:
    flag = bool(content["model"].get("ignore_merges"))
    if content["model"].get("type") == "BPE":
        name = name_of(content["pre_tokenizer"], ignore_merges=flag)
        if name is not None:
            _check_normalizer(model, content.get("normalizer"))
            return name
        if name_of(content["pre_tokenizer"], ignore_merges=not flag) is not None:
            raise InputError(
                f"{model.path}: tokenizer.json: ignore_merges",
                expected=f"{not flag}, as llama.cpp has it with this rule for cutting text".lower(),
                got=str(flag).lower(),
                todo=elsewhere(),
            )
    raise InputError(
        f"{model.path}: tokenizer.json: its rule for cutting text is none that llama.cpp is known to have here",
        expected=f"byte-level BPE cut like {', '.join(CUTS)}, or SentencePiece's",
        todo="start from a GGUF file of the base model, whose tokenizer is carried over",
    )


def _check_normalizer(model: Checkpoint, normalizer: Mapping[str, Any] | None) -> None:
    """Refuse a byte-level BPE that changes a text before it is cut. llama.cpp does not; nor does it compose characters
    (NFC), which its own converter passes over, and which most texts have composed.
    """
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer.get("type") == "Sequence":
        steps = list(normalizer["normalizers"])
    kinds = [str(step.get("type")) for step in steps]
    if set(kinds) - {"NFC"}:
        raise InputError(
            f"{model.path}: tokenizer.json: normalizer",
            expected="none, or NFC, since llama.cpp changes no text before it cuts it",
            got=repr(", ".join(kinds))[:120],
            todo=elsewhere(),
        )


def _vocabulary(
    vocab: Mapping[str, int], added: list[Any], vocab_size: int, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """Tokens and their types; pieces: SentencePiece's, which have U+2581 for a space."""
    tokens = [f"[PAD{n}]" for n in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, n in vocab.items():
        if not isinstance(n, int) or not 0 <= n < vocab_size:
            raise _outside(token, n, vocab_size)
        tokens[n], types[n] = token, NORMAL
    for entry in added:
        n = entry["id"]
        if not isinstance(n, int) or not 0 <= n < vocab_size:
            raise _outside(entry["content"], n, vocab_size)
        tokens[n], types[n] = entry["content"], CONTROL if entry.get("special") else USER_DEFINED
        if pieces and SPACE in entry["content"] and types[n] == USER_DEFINED and not entry.get("normalized"):
            types[n] = NORMAL  # no text has that character: such a run of spaces is joined, and not looked for
    return tokens, types


def _outside(token: object, n: object, vocab_size: int) -> InputError:
    return InputError(
        f"tokenizer.json: token {token!r:.80} has id {n!r:.40}",
        expected=f"0..{vocab_size - 1}, the rows that the model has",
        todo="resize the model's embedding for it (resize_token_embeddings), or remove the token",
    )


def _special_id(model: Checkpoint, tokenizer: Any, kind: str, tokens: list[str]) -> int | None:
    name = getattr(tokenizer, f"{kind}_token")
    if isinstance(name, str) and name in tokens:
        return tokens.index(name)
    number = model.config.get(f"{kind}_token_id")
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


def _template_entries(model: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Value]:
    """The chat templates under gguf-py's keys: the default one, the others by their names, and the list of these."""
    templates = _chat_templates(model, settings)
    check_text(templates, f"{model.path}: its chat template")
    entries = {}
    if "default" in templates:
        entries[TEMPLATE_KEY] = Value.text(templates.pop("default"))
    names = sorted(template_name(name) for name in templates)
    twice = [name for name, following in pairwise(names) if name == following]
    if twice or "" in names:
        got = f"two that are {twice[0]} there" if twice else "one without"
        raise InputError(
            f"{model.path}/tokenizer_config.json: chat_template", expected="names that GGUF can tell apart", got=got
        )
    for name, text in templates.items():
        entries[f"{TEMPLATE_KEY}.{template_name(name)}"] = Value.text(text)
    if names:
        listed = Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tuple(names))
        entries["tokenizer.chat_templates"] = listed
    return entries


def _chat_templates(model: Checkpoint, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name as transformers takes them: those in files, or else those in tokenizer_config.json."""
    files = {"default": DEFAULT_TEMPLATE} | {
        name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja"): name
        for name in model.files
        if name.startswith(f"{TEMPLATES}/")
    }
    found: Any = {
        name: with_line_ends(read_utf8(model.files[file], TOKENIZER_LIMIT, mark=True))
        for name, file in files.items()
        if file in model.files
    }
    if found:
        return dict(found)
    found = settings.get("chat_template")
    if isinstance(found, str | None):
        return {} if found is None else {"default": found}
    pairs = list(found.items()) if isinstance(found, dict) else [_named(entry) for entry in _listed(found)]
    wrong = [part for pair in pairs for part in pair if not isinstance(part, str)]
    if wrong:
        raise FormatError(
            f"{model.files['tokenizer_config.json']}: chat_template",
            expected="a text, or texts by name",
            got=type(wrong[0]).__name__,
        )
    return dict(pairs)


def chat_templates(model: Checkpoint) -> dict[str, str]:
    """The chat templates of a model's files by name, the default one as "default"; FormatError for one that is none."""
    settings = _read_json(model, "tokenizer_config.json") if "tokenizer_config.json" in model.files else {}
    return _chat_templates(model, settings)


def _listed(found: object) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _named(entry: object) -> tuple[Any, Any]:
    return (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (entry, entry)


def _read_json(model: Checkpoint, name: str) -> dict[str, Any]:
    return read_json_object(model.files[name], TOKENIZER_LIMIT)
