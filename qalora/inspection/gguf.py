"""The warnings of a GGUF file."""

from __future__ import annotations

from qalora.checkpoint import Checkpoint
from qalora.converters.tokenizer import has_tokenizer
from qalora.inspection.records import Finding

__all__ = ["findings"]


def findings(model: Checkpoint) -> list[Finding]:
    """A byte-level BPE without the name of the rule that cuts text: llama.cpp falls back to a default."""
    if model.gguf is None or not has_tokenizer(model) or model.gguf.get("tokenizer.ggml.model") != "gpt2":
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
