"""The model card of a release: front matter that hubs read, what each artefact is, how to load it, and the proof.

The front matter is made by huggingface_hub. Everything in the text comes from the plans and the report; nothing depends
on time or place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters.plan import Plan
from qalora.release.checksums import SUMS

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = ["write_card"]

_LOADING = {
    "gptq": """```python
from transformers import AutoModelForCausalLM, GPTQConfig  # and: pip install optimum gptqmodel peft

quantization = GPTQConfig(bits={bits}, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained("gptq", dtype="float32", quantization_config=quantization)
```

What lies beside the weights is part of the model: see `gptq/README.md`.""",
    "gguf": """```sh
llama-cli -m gguf/{gguf}
```""",
    "onnx": """```python
import onnxruntime_genai

model = onnxruntime_genai.Model("onnx")
```

`onnx/portable/model.onnx` is the same model in standard operators; it needs no operator of a vendor's.""",
    "mlx": """```python
from mlx_lm import generate, load

model, tokenizer = load("mlx")
print(generate(model, tokenizer, prompt="Hello"))
```""",
    "hqq": """```python
import qalora

model = qalora.load("hqq")  # hqq's layers load its tensors as they are; transformers 5.23 loads no HQQ model yet
```""",
    "qalora": """```python
import qalora

model = qalora.load("qalora")  # to be exported again, or to be fine-tuned further
```""",
}

_CARD = """
# {name}

{what} The integer codes are the base model's: fine-tuning changed the minima of the groups, and nothing else.

{artefacts}

{loading}
## Proof

Every artefact was read back and run in its own runtime over the same {tokens} tokens; `report.json` has every figure
and the derivation of every bound.

{proof}
`sha256sum --check {sums}` checks the files.
"""


def write_card(
    path: Path, *, model: Checkpoint, adapter: Adapter | None, plans: Sequence[Plan], report: ParityReport
) -> None:
    """Write the card. Folders are named as they lie beside it."""
    from huggingface_hub import ModelCardData

    name = _name(model)
    front = ModelCardData(
        base_model=str(model.config.get("_name_or_path") or name),
        library_name="transformers" if any(plan.target == "gptq" for plan in plans) else None,
        license=_license(model),
        pipeline_tag="text-generation",
        tags=["qa-lora", "quantized", *sorted(plan.target for plan in plans)],
    )
    text = _CARD.format(
        name=f"{name}, fine-tuned" if adapter is not None else name,
        what=_what(model, adapter),
        artefacts=_artefacts(plans),
        loading="\n".join(f"{_loading(plan, model)}\n" for plan in plans),
        tokens=report.tokens,
        proof=_proof(report),
        sums=SUMS,
    )
    path.write_text(f"---\n{front.to_yaml()}\n---\n{text}", encoding="utf-8")


def _name(model: Checkpoint) -> str:
    """As GGUF metadata says, or as the folder is called; one line of plain text."""
    given = None if model.gguf is None else model.gguf.get("general.name")
    text = given if isinstance(given, str) else model.path.stem if model.path.is_file() else model.path.name
    return "".join(char for char in text if char.isalnum() or char in " -_.+")[:100] or "model"


def _license(model: Checkpoint) -> str | None:
    given = None if model.gguf is None else model.gguf.get("general.license")
    return given if isinstance(given, str) and given.replace("-", "").replace(".", "").isalnum() else None


def _what(model: Checkpoint, adapter: Adapter | None) -> str:
    specs = [lazy.spec for name in model.linears if (lazy := model.tensors[name]).spec is not None]
    kinds = sorted({(spec.bits, spec.group_size) for spec in specs if spec is not None})
    held = " and ".join(f"{bits}-bit codes in groups of {size}" for bits, size in kinds[:3]) or "floats"
    if adapter is None:
        return f"{_name(model)} in {held}."
    rank = max(layer.rank for layer in adapter.layers.values())
    return (
        f"{_name(model)} in {held}, with a QA-LoRA adapter of rank {rank} on {len(adapter.layers)} layers that was "
        "folded exactly."
    )


def _artefacts(plans: Sequence[Plan]) -> str:
    rows = ["| folder | bytes | holds the weights |", "|---|---:|---|"]
    for plan in plans:
        losses = sorted({tensor.loss.size for tensor in plan.tensors if tensor.loss is not None})
        rows.append(f"| `{plan.target}/` | {plan.nbytes:,} | {'; '.join(losses) or 'exactly'} |")
    return "\n".join(rows)


def _loading(plan: Plan, model: Checkpoint) -> str:
    facts: Mapping[str, Any] = {
        "bits": next((spec.bits for name in model.linears if (spec := model.tensors[name].spec) is not None), 4),
        "gguf": next((name for name in plan.files if name.endswith(".gguf")), ""),
    }
    return _LOADING[plan.target].format(**facts)


def _proof(report: ParityReport) -> str:
    from qalora.parity.gates import worst
    from qalora.parity.report import percent

    rows = [
        "| artefact | codes that differ | runtime | adapter lost | largest logit difference | top-1 | gates |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for artefact in report.artifacts:
        for run in artefact.runs:
            runtime = run.kind if run.runtime is None else f"{run.runtime.name} {run.runtime.version}"
            cells = [artefact.name, f"{artefact.weights.total.codes_differ}", runtime]
            cells.append(percent(run.lost))
            cells += ["", ""] if run.logits is None else [f"{run.logits.max:.3g}", f"{run.logits.top1:.4f}"]
            rows.append(f"| {' | '.join([*cells, worst((*artefact.gates, *run.gates))])} |")
    return "\n".join(rows) + "\n"
