"""How a person runs an MNN folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_USAGE = """```python
# pip install MNN transformers
import MNN.llm
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("mnn")
model = MNN.llm.create("mnn/config.json")
model.load()
ids = tokenizer("Once upon a time")["input_ids"]
new = ids
for _ in range(20):
    logits = model.forward(new).read()
    new = [int(logits.reshape(-1, logits.shape[-1])[-1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids))
```"""


def usage(released: Released) -> str:
    """A block for MNN's Python package."""
    return _USAGE


def openings(pushed: Pushed) -> Sequence[str]:
    """MNN opens folders, and knows no repository."""
    return [f'{pushed.fetch}, then MNN.llm.create("{pushed.local}/mnn/config.json")']
