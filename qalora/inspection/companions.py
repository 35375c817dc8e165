"""What should lie beside the weights, or in their metadata: tokenizer, chat template, a runtime's settings."""

from __future__ import annotations

from pathlib import Path

import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.ends import end_notes, ends_of, token_texts
from qalora.converters.huggingface import stored_tensors
from qalora.converters.tokenizer import has_tokenizer
from qalora.errors import InputError
from qalora.formats.json_text import read_json
from qalora.inspection.records import EndTokens, Finding

__all__ = ["companion_findings", "end_tokens"]

LIMIT = 64 << 20
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def companion_findings(model: Checkpoint) -> list[Finding]:
    """The warnings of a model's companions."""
    where = "its GGUF metadata" if model.layout == "gguf" else "its folder"
    if not has_tokenizer(model) and _is_portable_graph(model):
        tokenizer = []
    elif not has_tokenizer(model):
        tokenizer = [
            Finding(
                code="no-tokenizer",
                message="no tokenizer: runtimes that take text do not load it, or cannot read a prompt",
                evidence=f"neither tokenizer.json nor tokenizer.model in {where}"
                if model.layout != "gguf"
                else f"tokenizer.ggml.model in {where} is {_said(model)}",
                todo="put the base model's tokenizer there and write it again",
            )
        ]
    else:
        tokenizer = [*_template(model, where), *_pre_tokenizer(model)]
    more = {"onnx": _int8_activations, "mlx": _bfloat16_biases}.get(model.layout)
    return tokenizer + (more(model) if more is not None else [])


def end_tokens(model: Checkpoint) -> tuple[EndTokens | None, tuple[str, ...], list[Finding]]:
    """What ends a generation, notes where files disagree about it, and a warning where it is no token."""
    try:
        found, texts = ends_of(model), token_texts(model)
    except InputError as error:
        warning = Finding(
            code="end-token",
            message="what ends a generation is no token of the model: a runtime goes on for ever, or does not load it",
            evidence=str(error),
            todo="name the end tokens by their ids in generation_config.json",
        )
        return None, (), [warning]
    return EndTokens(tokens=tuple((n, texts.get(n)) for n in found.ids), source=found.source), end_notes(model), []


def _is_portable_graph(model: Checkpoint) -> bool:
    """Whether it is the second graph of an export, whose tokenizer lies beside the first."""
    folder = model.path.parent if model.path.is_file() else model.path
    return (
        model.layout == "onnx"
        and (folder.parent / "model.onnx").exists()
        and (folder.parent / "tokenizer.json").exists()
    )


def _said(model: Checkpoint) -> str:
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
            if model.layout != "gguf"
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


def _pre_tokenizer(model: Checkpoint) -> list[Finding]:
    """A byte-level BPE without the name of the rule that cuts text: llama.cpp falls back to a default."""
    if model.layout != "gguf" or model.gguf is None or model.gguf.get("tokenizer.ggml.model") != "gpt2":
        return []
    if isinstance(model.gguf.get("tokenizer.ggml.pre"), str):
        return []
    return [
        Finding(
            code="runtime",
            message="llama.cpp cuts text by its default rule, which gives other tokens than the model was trained on",
            evidence="tokenizer.ggml.pre is absent, and tokenizer.ggml.model is gpt2",
            todo="convert it again from a folder with tokenizer.json",
        )
    ]


def _bfloat16_biases(model: Checkpoint) -> list[Finding]:
    """MLX's biases are the minima; it also computes in the dtype that they have."""
    biases = [entry.dtype for name, (_, entry) in stored_tensors(model.path).items() if name.endswith(".biases")]
    coarse = biases.count(torch.bfloat16)
    if not coarse:
        return []
    return [
        Finding(
            code="runtime",
            message="MLX holds its minima in bfloat16, and computes in it: an adapter that is folded into them "
            "loses about 3 %, where float16 loses 0.3 %",
            evidence=f"{coarse} of {len(biases)} layers have biases in bfloat16, with 8 significant bits",
            todo="export it again from the model that it was made of: qalora export --to mlx",
        )
    ]


def _int8_activations(model: Checkpoint) -> list[Finding]:
    from qalora.converters.onnx.files import accuracy_level

    graph = model.path if model.path.is_file() else model.path / "model.onnx"
    level = accuracy_level(graph)
    if level < 4:
        return []
    return [
        Finding(
            code="runtime",
            message="ONNX Runtime computes it with activations in 8 bits: about 4e-3 to 8e-3 of each product is lost",
            evidence="its MatMulNBits nodes have accuracy_level 4",
            todo="export it again without --accuracy-level, unless the speed was wanted",
        )
    ]
