"""How a person runs a torchao folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_USAGE = """```python
# pip install transformers torchao accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("torchao", dtype="float32")  # 16 bits would round the zero points
tokenizer = AutoTokenizer.from_pretrained("torchao")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""


def usage(released: Released) -> str:
    """A block for transformers."""
    return _USAGE


def openings(pushed: Pushed) -> Sequence[str]:
    """From the Hub, by transformers."""
    return [f'AutoModelForCausalLM.from_pretrained("{pushed.repo}", subfolder="torchao", dtype="float32")']
