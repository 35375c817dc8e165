"""A model's tokenizer: Hugging Face's files, as they are or converted from the metadata of a GGUF file.

What a model's files mean is asked of transformers, whose classes follow tokenizer_config.json where it differs from
tokenizer.json. Chat templates are carried as text and never rendered here.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.added_tokens import strips
from qalora.converters.cutting import CUTS
from qalora.converters.huggingface import LICENCES, TEMPLATES, TWO_FILES, has_tokenizer_files
from qalora.converters.tokenizer_tidy import cut_of, is_spm, tidy
from qalora.errors import FormatError, InputError, json_kind, shown
from qalora.formats.gguf import Metadata, Value, metadata_bytes
from qalora.formats.json_text import read_json_object
from qalora.formats.output import write_json
from qalora.formats.text import check_text, read_utf8

__all__ = [
    "DEFAULT_TEMPLATE",
    "TEMPLATE_KEY",
    "UnknownCutError",
    "chat_templates",
    "converted_files",
    "has_tokenizer",
    "load_tokenizer",
    "read_json",
    "template_name",
    "tokenizer_part",
    "with_line_ends",
    "write_tokenizer",
]

TOKENIZER_LIMIT = 256 << 20
TEXT_ENDS = (".json", ".jinja", ".txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", TWO_FILES[0])
"""A folder with a tokenizer has one of these."""

KEPT = 2
"""Conversions of GGUF metadata that are kept, the latest: that of a reference, and that of another artefact."""

DEFAULT_TEMPLATE = "chat_template.jinja"
TEMPLATE_KEY = "tokenizer.chat_template"


class UnknownCutError(FormatError):
    """A GGUF file whose rule for cutting text is not known here: its tokenizer is carried, and never converted."""


def has_tokenizer(model: Checkpoint) -> bool:
    """Whether the model brings a tokenizer."""
    if _has_files(model):
        return True
    return model.gguf is not None and model.gguf.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def _has_files(model: Checkpoint) -> bool:
    return has_tokenizer_files(model.files)


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
            got=shown(model.gguf.get("tokenizer.ggml.pre")),
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
    lines = str(error).replace(place, str(model.path)).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


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
    start, templates = f"{TEMPLATE_KEY}.", {"default": metadata.get(TEMPLATE_KEY)}
    for key in metadata.entries:
        name = key.removeprefix(start)
        if key.startswith(start) and name == template_name(name) != "default":
            templates[name] = metadata.get(key)
    return {name: text for name, text in templates.items() if name and isinstance(text, str)}


def chat_templates(model: Checkpoint) -> dict[str, str]:
    """The chat templates of a model's files by name as transformers takes them, the default one as "default": those in
    files, or else those in tokenizer_config.json; FormatError for one that is none.
    """
    settings = read_json(model, "tokenizer_config.json") if "tokenizer_config.json" in model.files else {}
    files = {"default": DEFAULT_TEMPLATE} | {
        name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja"): name
        for name in model.files
        if name.startswith(f"{TEMPLATES}/")
    }
    value: Any = {
        name: with_line_ends(read_utf8(model.files[file], TOKENIZER_LIMIT, mark=True))
        for name, file in files.items()
        if file in model.files
    }
    if value:
        return dict(value)
    value = settings.get("chat_template")
    if isinstance(value, str | None):
        return {} if value is None else {"default": value}
    pairs = list(value.items()) if isinstance(value, dict) else [_template_entry(entry) for entry in _listed(value)]
    wrong = [part for pair in pairs for part in pair if not isinstance(part, str)]
    if wrong:
        raise FormatError(
            f"{model.files['tokenizer_config.json']}: chat_template",
            expected="a text, or texts by name",
            got=json_kind(wrong[0]),
        )
    return dict(pairs)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _template_entry(entry: object) -> tuple[Any, Any]:
    return (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (entry, entry)


def read_json(model: Checkpoint, name: str) -> dict[str, Any]:
    """One of the model's files as a JSON object; FormatError for what is none."""
    return read_json_object(model.files[name], TOKENIZER_LIMIT)
