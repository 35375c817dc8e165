"""What should lie beside the weights, or in their metadata: tokenizer, chat template, a runtime's settings."""

from __future__ import annotations

from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters import layout
from qalora.converters.ends import end_notes, ends_of, token_texts
from qalora.converters.tokenizer import has_tokenizer
from qalora.errors import InputError
from qalora.formats.json_text import read_json
from qalora.inspection.records import EndToken, EndTokens, Finding

__all__ = ["companion_findings", "end_tokens"]

LIMIT = 64 << 20
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def companion_findings(model: Checkpoint) -> list[Finding]:
    """The warnings of a model's companions."""
    model_layout = layout(model.layout)
    where = f"its {model_layout.kind} metadata" if model_layout.tokenizer else "its folder"
    if not has_tokenizer(model) and _is_portable_graph(model):
        return []
    if not has_tokenizer(model):
        return [
            Finding(
                code="no-tokenizer",
                message="no tokenizer: runtimes that take text do not load it, or cannot read a prompt",
                evidence=f"neither tokenizer.json nor tokenizer.model in {where}"
                if not model_layout.tokenizer
                else f"tokenizer.ggml.model in {where} is {_tokenizer_model(model)}",
                todo="put the base model's tokenizer there and write it again",
            )
        ]
    return _template(model, where)


def end_tokens(model: Checkpoint) -> tuple[EndTokens | None, tuple[str, ...], list[Finding]]:
    """What ends a generation, notes where files disagree about it, and a warning where it is no token."""
    try:
        ends, texts = ends_of(model), token_texts(model)
    except InputError as error:
        warning = Finding(
            code="end-token",
            message="what ends a generation is no token of the model: a runtime goes on for ever, or does not load it",
            evidence=str(error),
            todo="name the end tokens by their ids in generation_config.json",
        )
        return None, (), [warning]
    tokens = tuple(EndToken(id=n, text=texts.get(n)) for n in ends.ids)
    return EndTokens(tokens=tokens, source=ends.source), end_notes(model), []


def _is_portable_graph(model: Checkpoint) -> bool:
    """Whether it is the second graph of an export, whose tokenizer lies beside the first."""
    folder = model.path.parent if model.path.is_file() else model.path
    second = any(one.parent == folder for one in layout(model.layout).artifacts(folder.parent)[1:])
    return second and (folder.parent / "tokenizer.json").exists()


def _tokenizer_model(model: Checkpoint) -> str:
    return repr(None if model.gguf is None else model.gguf.get("tokenizer.ggml.model"))


def _template(model: Checkpoint, where: str) -> list[Finding]:
    in_metadata = model.gguf is not None and isinstance(model.gguf.get("tokenizer.chat_template"), str)
    if in_metadata or any(name in model.files for name in TEMPLATES) or _in_settings(model):
        return []
    return [
        Finding(
            code="no-chat-template",
            message="no chat template: chat interfaces invent one, and a model that was tuned on another answers worse",
            evidence=f"none of {', '.join(TEMPLATES)} or a chat_template in tokenizer_config.json in {where}"
            if not layout(model.layout).tokenizer
            else f"no tokenizer.chat_template in {where}",
            todo="copy it from the model that this one was tuned from; a base model has none, and needs none",
        )
    ]


def _in_settings(model: Checkpoint) -> bool:
    path = model.files.get("tokenizer_config.json")
    if path is None:
        return False
    try:
        settings = read_json(Path(path), LIMIT)
    except InputError:
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
