"""How a person runs a GPTQ folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released, for_the_whole

__all__ = ["openings", "usage"]

_TRANSFORMERS = """```python
# pip install transformers optimum gptqmodel peft accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

quantization = GPTQConfig(bits={bits}, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(
    "gptq", dtype="float32", device_map="cpu", quantization_config=quantization
)
tokenizer = AutoTokenizer.from_pretrained("gptq")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

What lies beside the weights is part of the model, and is loaded with them: see `gptq/README.md`."""


def usage(released: Released) -> str:
    """A block for transformers, with the words' width that most carriers say."""
    found = [word for carrier in released.carriers if (word := carrier.partition("-bit")[0]).isdigit()]
    bits = int(max(set(found), key=lambda word: (found.count(word), word))) if found else 4
    return for_the_whole(_TRANSFORMERS.format(bits=bits), released.carriers)


def openings(pushed: Pushed) -> Sequence[str]:
    """From the Hub where transformers can; its `subfolder` (5.23) fails with an adapter beside the weights."""
    text = f'AutoModelForCausalLM.from_pretrained("{pushed.repo}", subfolder="gptq")'
    if "adapter_config.json" in pushed.files:
        text = f'{pushed.fetch}, then AutoModelForCausalLM.from_pretrained("{pushed.local}/gptq")'
    return [for_the_whole(text, pushed.files)]
