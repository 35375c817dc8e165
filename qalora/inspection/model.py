"""A model or artefact: kinds of tensors and sizes, and the warnings that each look gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import layout
from qalora.converters.device_load import device_load_of
from qalora.converters.folder import companions
from qalora.formats.remote import size_of
from qalora.inspection.companions import companion_findings, end_tokens
from qalora.inspection.records import Finding, ModelReport, TensorKind
from qalora.inspection.values import read_values

__all__ = ["inspect_model"]


def inspect_model(
    model: Checkpoint, path: Path, *, quick: bool = False, progress: Callable[[str, int], None] | None = None
) -> ModelReport:
    """Inspect an open model; `path` is what the user called it."""
    findings = _act_order(model)
    found = layout(model.layout)
    findings += found.findings(model)
    histogram = None
    if not quick:
        histogram, more = read_values(model, progress or (lambda name, weights: None))
        findings += more
    findings += companion_findings(model)
    ends, notes, more = end_tokens(model)
    findings += more
    files = [*found.weights(model.path)]
    return ModelReport(
        path=path,
        layout=model.layout,
        family=str(model.config.get("model_type")),
        layers=int(model.config["num_hidden_layers"]),
        tied=model.tied,
        weights=sum(math.prod(lazy.shape) for lazy in model.everything.values()),
        nbytes=sum(size_of(file) for file in files),
        device_load=device_load_of(model),
        tensors=_kinds(model.everything.values()),
        histogram=histogram,
        ends=ends,
        files=tuple(sorted({*(file.name for file in files), *companions(model)})),
        notes=(*model.notes, *notes),
        warnings=tuple(findings),
    )


def _kinds(tensors: Iterable[LazyTensor]) -> tuple[TensorKind, ...]:
    counts: Counter[tuple[object, ...]] = Counter()
    weights: Counter[tuple[object, ...]] = Counter()
    for lazy in tensors:
        spec = lazy.spec
        if spec is None:
            key: tuple[object, ...] = (str(lazy.dtype).removeprefix("torch."), None, None, None, False)
        else:
            key = (None, spec.bits, spec.group_size, spec.zeros, spec.act_order)
        counts[key] += 1
        weights[key] += math.prod(lazy.shape)
    names = ("dtype", "bits", "group_size", "zeros", "act_order")
    return tuple(
        TensorKind(count=count, weights=weights[key], **dict(zip(names, key, strict=True)))  # type: ignore[arg-type]
        for key, count in counts.most_common()
    )


def _act_order(model: Checkpoint) -> list[Finding]:
    ordered = [lazy.name for lazy in model.tensors.values() if lazy.spec is not None and lazy.spec.act_order]
    if not ordered:
        return []
    return [
        Finding(
            code="act-order",
            message="quantized with act-order: no QA-LoRA adapter that pools runs of columns can be folded into it, "
            "and GGUF, MLX and HQQ cannot hold its groups",
            evidence=f"in {len(ordered)} of {len(model.linears)} layers g_idx is not column // group_size; the first "
            f"is {ordered[0]}",
            todo="ship adapters beside it (qalora adapter convert --to plain), or quantize without desc_act",
        )
    ]
