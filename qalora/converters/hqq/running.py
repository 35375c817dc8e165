"""How a person runs an HQQ folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_HQQ = """```python
# pip install 'qalora[hqq]': hqq's layers load the tensors as they are, in a model that qalora builds
from pathlib import Path

from qalora.parity.runtimes import open_runtime
from transformers import AutoTokenizer

model = open_runtime("hqq", Path("hqq"))
tokenizer = AutoTokenizer.from_pretrained("hqq")
ids = tokenizer("Once upon a time")["input_ids"]
print(tokenizer.decode(ids + model.generate(ids, 20)))
```"""


def usage(released: Released) -> str:
    """A block for hqq's layers, in a model that qalora builds."""
    return _HQQ


def openings(pushed: Pushed) -> Sequence[str]:
    """No library but qalora puts the layers into a model."""
    return [f'{pushed.fetch}, then qalora.load("{pushed.local}/hqq")']
