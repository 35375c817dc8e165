"""How a person runs a compressed-tensors folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_USAGE = """```python
# pip install transformers compressed-tensors peft accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

quantization = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained("compressed-tensors", dtype="float32", quantization_config=quantization)
tokenizer = AutoTokenizer.from_pretrained("compressed-tensors")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

vLLM opens it too, at 4 bits in groups of 32, 64 or 128. An adapter beside the weights is loaded with them by
transformers; vLLM takes it as a LoRA."""


def usage(released: Released) -> str:
    """A block for transformers."""
    return _USAGE


def openings(pushed: Pushed) -> Sequence[str]:
    """From the Hub where transformers can; its `subfolder` (5.23) fails with an adapter beside the weights."""
    more = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    if "adapter_config.json" in pushed.files:
        return [
            f'{pushed.fetch}, then AutoModelForCausalLM.from_pretrained("{pushed.local}/compressed-tensors", {more})'
        ]
    return [f'AutoModelForCausalLM.from_pretrained("{pushed.repo}", subfolder="compressed-tensors", {more})']
