"""The README.md of a GPTQ folder: what it holds, how to load it, and which loaders would forget the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["readme"]

_HEAD = """# GPTQ checkpoint

{bits}-bit codes in groups of {group_size}, {zeros}, `checkpoint_format` {label}. Written by qalora.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

model = AutoModelForCausalLM.from_pretrained(
    "{name}", dtype="float32", quantization_config=GPTQConfig(bits={bits}, backend="gptq_torch")
)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`from_pretrained("{name}")` alone works too; GPTQModel then chooses a kernel, and the fastest ones compute in 16 bits.
This needs the packages transformers, optimum and gptqmodel{peft}.
"""

_RESIDUAL = """
## The residual beside it

The zero points of this model are real numbers, and GPTQ stores integers. So the model's own files hold the codes with
integer zero points z, and `adapter_model.safetensors` holds what they leave over, as an ordinary LoRA:

    y = Q(x; codes, scale, z) + B A x,     A: the 0/1 matrix that sums x over each group,  B = min + scale*z (float32)

Both together are the model, exactly. The LoRA's rank is the number of groups in a row (up to {rank} here), its scaling
is 1. It is part of the model: do not drop, merge or retrain it.
"""

_ADAPTER = """
## The adapter beside it

The model's own files are the base with its own integer zero points; `adapter_model.safetensors` is the fine-tune, an
ordinary LoRA of rank {rank} that adds exactly what the QA-LoRA adapter does.
"""

_TRAPS = """
* Without the package peft, and in `GPTQModel.load`, the bare base is loaded without a word. {trap}
* One call holds the LoRA in float16, which is what the words' kernel computes in. In float32, with a warning about a
  second adapter: `model = PeftModel.from_pretrained(model, "{name}")` after it loads the same
  one again, in its place.
* {vllm}.
* `PeftModel.from_pretrained(model, other)` takes the name "default" and so replaces this LoRA; `load_adapter(other,
  adapter_name="q")` deactivates it. To keep both: `model.set_adapter(["default", "q"])`.
* Loaded from a folder, `base_model_name_or_path` in `adapter_config.json` is not looked at. On the Hub it is: write the
  repository's name there before you publish.
"""

_LOUD = "Its answers are then noise, because its zero points are far from the real ones."
_QUIET = "Its answers are then plausible and wrong: the fine-tune, or part of it, is missing."


def readme(
    config: Mapping[str, Any], adapter_config: Mapping[str, Any] | None, *, residual: bool, name: str, vllm: str
) -> str:
    """The text, from config.json and adapter_config.json.

    residual  what lies beside is that, not an adapter
    vllm      whether vLLM opens it, and how
    """
    settings = config["quantization_config"]
    symmetric = settings["sym"]
    group = settings["group_size"]
    text = _HEAD.format(
        bits=settings["bits"],
        group_size="a whole row" if group == -1 else group,
        zeros=f"zero points all {1 << (settings['bits'] - 1)}" if symmetric else "integer zero points",
        label=settings["checkpoint_format"],
        name=name,
        peft="" if adapter_config is None else ", and peft",
    )
    if adapter_config is None:
        return text
    rank = max([adapter_config["r"], *adapter_config["rank_pattern"].values()])
    text += (_RESIDUAL if residual else _ADAPTER).format(rank=rank)
    return text + _TRAPS.format(trap=_LOUD if residual and symmetric else _QUIET, name=name, vllm=vllm)
