"""How a person runs an MLX folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_MLX = """```sh
python -m mlx_lm generate --model mlx --prompt "Once upon a time" --max-tokens 20
```

```python
# pip install mlx-lm
from mlx_lm import generate, load

model, tokenizer = load("mlx")
print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=20))
```"""


def usage(released: Released) -> str:
    """A line for a shell and a block of Python for mlx-lm."""
    return _MLX


def openings(pushed: Pushed) -> Sequence[str]:
    """mlx_lm opens folders, and knows no sub-folder of a repository."""
    return [f"{pushed.fetch} && mlx_lm.generate --model {pushed.local}/mlx --prompt Hello"]
