"""An adapter's folder: shapes against its flags, against each other, and against the base; LoRA files of runtimes.

PEFT ignores `use_qalora`, silently, on layers that are not GPTQ's; the adapter is then an ordinary LoRA, and only A's
shape tells: [rank, in], not [rank, in/pool]. `in` is the base's; without a base it is inferred from the other modules
of the layer, whose rows are its inputs (down_proj reads what up_proj gives), where they have adapters too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qalora.adapter import Convention
from qalora.adapter.reading import AdapterSource, convention_of, open_adapter
from qalora.adapter.writing import WEIGHTS
from qalora.checkpoint import Checkpoint
from qalora.converters.format import LoraFile
from qalora.errors import AdapterError
from qalora.folding import check_pool
from qalora.formats.files import InputFile, contained
from qalora.formats.safetensors import read_tensor
from qalora.inspection.records import AdapterReport, Finding

__all__ = ["inspect_adapter", "inspect_lora"]

READS: dict[str, tuple[str, ...]] = {
    "q_proj": ("o_proj", "down_proj", "q_proj"),
    "k_proj": ("o_proj", "down_proj", "q_proj"),
    "v_proj": ("o_proj", "down_proj", "q_proj"),
    "gate_proj": ("down_proj", "o_proj"),
    "up_proj": ("down_proj", "o_proj"),
    "o_proj": ("q_proj",),
    "down_proj": ("up_proj", "gate_proj"),
}
"""For each module those whose rows are as many as its columns; the last resort of q, k and v is a guess."""


def inspect_adapter(folder: Path, base: str | Path | None, convention: Convention | None) -> AdapterReport:
    """Inspect an adapter's folder; with `base`, a model, against that."""
    source = open_adapter(folder)
    model = None if base is None else _opened(base)
    widths, origin = _widths(source, model)
    pools = {module: _pool(source, module, widths.get(module)) for module in source.pairs}
    findings = _ignored(source, widths, origin)
    if model is not None:
        findings += _against(source, model, pools)
    known = {module: pool for module, pool in pools.items() if pool is not None}
    convention_name, more = _convention(source, known, convention)
    weights = contained(folder, WEIGHTS)
    findings += [*_unknown_pools(source, pools), *more, *_values(source, weights)]
    kinds = Counter((source.pairs[module][0].shape[0], pool) for module, pool in pools.items())
    entries = [entry for pair in source.pairs.values() for entry in pair]
    carried = source.config.carried.get("base_model_name_or_path")
    return AdapterReport(
        path=folder,
        layout="peft",
        convention=convention_name,
        minima=None if source.record is None else source.record.minima,
        use_qalora=source.config.use_qalora,
        base=None if carried is None else str(carried),
        parameters=sum(int(torch.Size(entry.shape).numel()) for entry in entries),
        nbytes=weights.stat().st_size,
        layers=dict(kinds.most_common()),
        notes=(*_saved_note(source), *(() if model is None else _split_groups(source, model, pools))),
        warnings=tuple(findings),
    )


def _saved_note(source: AdapterSource) -> tuple[str, ...]:
    """What takes the place of the base's."""
    saved = source.saved
    if saved is None:
        return ()
    rows = {name: len(rows.indices) for name, rows in saved.rows.items()}
    parts = [*saved.whole, *(f"{count} rows of {name}" for name, count in rows.items())]
    files = "; with a tokenizer of its own" if saved.files else ""
    return (f"it brings {len(parts)} tensors of the base: {', '.join(parts[:4])}{files}",)


def _split_groups(source: AdapterSource, model: Checkpoint, pools: Mapping[str, int | None]) -> tuple[str, ...]:
    """What a fold into finer groups costs."""
    finer: Counter[tuple[int, int]] = Counter()
    for module, pool in pools.items():
        lazy = model.tensors.get(f"{module}.weight")
        size = 0 if lazy is None or lazy.spec is None else lazy.spec.group_size
        if pool is not None and 1 < pool < size and size % pool == 0:
            finer[size, pool] += 1
    return tuple(
        f"a fold splits the groups of {count} of {len(source.pairs)} modules, {size} columns into {pool}: there are "
        f"{size // pool} times as many scales and minima then"
        for (size, pool), count in finer.items()
    )


def _opened(base: str | Path) -> Checkpoint:
    from qalora.converters import load

    return load(base)


def _widths(source: AdapterSource, model: Checkpoint | None) -> tuple[dict[str, int], str]:
    """`in` of each module, where it is known, and where it is known from."""
    if model is not None:
        by_module = {}
        for module in source.pairs:
            lazy = model.tensors.get(f"{module}.weight")
            if lazy is not None and len(lazy.shape) == 2:
                by_module[module] = lazy.shape[1]
        return by_module, f"the weight in {model.path}"
    rows = {module: b.shape[0] for module, (_, b) in source.pairs.items()}
    widths = {}
    for module in source.pairs:
        layer, _, last = module.rpartition(".")
        block = layer.rpartition(".")[0]
        for other in READS.get(last, ()):
            place = "mlp" if other in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            if f"{block}.{place}.{other}" in rows:
                widths[module] = rows[f"{block}.{place}.{other}"]
                break
    return widths, "the rows of the module that it reads from"


def _pool(source: AdapterSource, module: str, width: int | None) -> int | None:
    """in / (columns of A) where `in` is known and a multiple; else what the files say."""
    columns = source.columns(module)
    if width is not None and width % columns == 0:
        return width // columns
    if source.record is not None:
        return source.record.layers[module].pool_size
    return source.config.group_size if source.config.use_qalora else None


def _ignored(source: AdapterSource, widths: Mapping[str, int], origin: str) -> list[Finding]:
    config = source.config
    if source.record is not None or not config.use_qalora or config.group_size == 1:
        return []
    plain = [module for module, width in widths.items() if source.columns(module) == width]
    if not plain:
        return []
    width = widths[plain[0]]
    return [
        Finding(
            code="qalora-ignored",
            message="use_qalora is set, but PEFT ignored it, since it pools over GPTQ layers only: this is an ordinary "
            "LoRA, which cannot be folded into integers",
            evidence=f"in {len(plain)} of {len(source.pairs)} modules A has a column for each input; {plain[0]} has "
            f"{width} (in = {width} by {origin}), where pools of {config.group_size} would give "
            f"{width / config.group_size:g}",
            todo="train it over a GPTQ base, or with qalora train; or remove use_qalora and ship it as a LoRA",
        )
    ]


def _against(source: AdapterSource, model: Checkpoint, pools: Mapping[str, int | None]) -> list[Finding]:
    """What the base says: other shapes, floats, and pools that its groups cannot take up."""
    foreign, floats, refused = [], [], []
    for module, (a, b) in source.pairs.items():
        lazy = model.tensors.get(f"{module}.weight")
        if lazy is None:
            foreign.append(f"{module} is no module of it")
            continue
        if len(lazy.shape) != 2 or b.shape[0] != lazy.shape[0] or lazy.shape[1] % a.shape[1]:
            foreign.append(f"{module} has A {list(a.shape)} and B {list(b.shape)} for a weight {list(lazy.shape)}")
            continue
        if lazy.spec is None:
            floats.append(module)
            continue
        try:
            check_pool(lazy.spec.group_size, pools[module] or 1, module, act_order=lazy.spec.act_order)
        except AdapterError as error:
            code = "act-order" if lazy.spec.act_order else "ordinary-lora" if pools[module] == 1 else "pool-mismatch"
            refused.append((code, str(error)))
    findings = []
    if foreign:
        findings.append(
            Finding(
                code="other-base",
                message=f"it is an adapter of another model than {model.path}",
                evidence=f"{len(foreign)} of {len(source.pairs)} modules do not fit: {foreign[0]}",
                todo="give the model that it was trained on",
            )
        )
    if floats:
        findings.append(
            Finding(
                code="float-base",
                message=f"{model.path} holds floats, and an adapter is folded into integers",
                evidence=f"{len(floats)} of {len(source.pairs)} modules are float there, the first is {floats[0]}",
                todo=f"qalora quantize {model.path} -o DIR",
            )
        )
    for code in dict.fromkeys(code for code, _ in refused):
        sentences = [sentence for refusal, sentence in refused if refusal == code]
        what = "the pooling of its modules does not match the groups of the base"
        findings.append(
            Finding(
                code=code,
                message=f"it cannot be folded into {model.path}" + (f": {what}" if code == "pool-mismatch" else ""),
                evidence=f"{len(sentences)} of {len(source.pairs)} modules: {sentences[0]}",
                todo="ship it beside the model: qalora adapter convert --to plain",
            )
        )
    return findings


def _unknown_pools(source: AdapterSource, pools: Mapping[str, int | None]) -> list[Finding]:
    unknown = [module for module, pool in pools.items() if pool is None]
    if not unknown:
        return []
    return [
        Finding(
            code="pool-unknown",
            message="its files do not say how many columns it pools, which depends on the base",
            evidence=f"A of {unknown[0]} has {source.columns(unknown[0])} columns, and neither qalora_adapter.json nor "
            "use_qalora is there",
            todo="give `base`",
        )
    ]


def _convention(
    source: AdapterSource, pools: Mapping[str, int], convention: Convention | None
) -> tuple[str | None, list[Finding]]:
    if source.record is None and not pools and convention is None:
        return None, []
    try:
        return convention_of(source, pools, convention), []
    except AdapterError as error:
        finding = Finding(
            code="convention-unknown",
            message="what its scaling means is not certain, and the wrong reading is off by a large factor",
            evidence=str(error),
            todo="give `convention`",
        )
        return None, [finding]


def _values(source: AdapterSource, weights: Path) -> list[Finding]:
    with InputFile(weights) as file:
        return _value_findings(
            (f"lora_{part} of {module}", read_tensor(file, entry))
            for module, pair in source.pairs.items()
            for part, entry in zip("AB", pair, strict=True)
        )


def _value_findings(matrices: Iterable[tuple[str, Tensor]]) -> list[Finding]:
    bad, idle, count = [], [], 0
    for name, values in matrices:
        count += 1
        broken = values.numel() - int(torch.isfinite(values).sum())
        if broken:
            bad.append(f"{name}: {broken:,} of {values.numel():,} values")
        elif not bool(values.any()):
            idle.append(name)
    findings = []
    if bad:
        findings.append(
            Finding(
                code="not-finite",
                message="it holds NaN or Inf: its training diverged, or the file is damaged",
                evidence="; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else ""),
                todo="take an earlier checkpoint",
            )
        )
    if idle:
        findings.append(
            Finding(
                code="all-zero",
                message=f"{len(idle)} of {count} matrices are zero everywhere: those modules add "
                "nothing, as before the first step of training",
                evidence="; ".join(idle[:3]) + (f"; and {len(idle) - 3} more" if len(idle) > 3 else ""),
                todo="train it, or leave those modules out",
            )
        )
    return findings


def inspect_lora(path: Path, kind: LoraFile) -> AdapterReport:
    """Inspect a file of an adapter, of a kind that a format has; FormatError for what is none."""
    content = kind.content(path)
    return AdapterReport(
        path=path,
        layout=kind.name,
        convention=None,
        minima=None,
        use_qalora=False,
        base=content.base,
        parameters=content.parameters,
        nbytes=path.stat().st_size,
        layers=dict(Counter((rank, 1) for rank in content.ranks).most_common()),
        notes=content.notes,
        warnings=tuple(_value_findings(content.matrices)),
    )
