"""Read an adapter's folder: PEFT's, the official repository's once its pickle is converted, and our own.

All three are PEFT folders (see `qalora.adapter.writing`); ours has `qalora_adapter.json` beside, which says convention,
minima, and each layer's pool size and factor. Without it PEFT's `use_qalora` stands for PEFT's convention, and anything
else has to be told: a factor of 32 between two conventions cannot be seen in the tensors.

The pool size is in / (columns of A). PEFT ignores `use_qalora` silently on layers that are not GPTQ's, so that A's
shape decides: a column of A for each column of the weight is an ordinary LoRA, whose factor is s whatever the flag
says. `read_adapter` reads such an adapter; `qalora.folding` refuses it.

Tensors are float32, float16 or bfloat16, and are widened exactly. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qalora.adapter.keys import sort_keys
from qalora.adapter.peft_config import CONFIG, PeftConfig, check_work, parse_config, read_json
from qalora.adapter.records import CONVENTIONS, Adapter, AdapterLayer, Convention, convention_factor
from qalora.adapter.saved import SavedTensors
from qalora.adapter.saving import check_names, check_saved, saved_tensors
from qalora.adapter.writing import RECORD, WEIGHTS, AdapterRecord
from qalora.checkpoint import module_of
from qalora.errors import AdapterError, FormatError, InputError, shown
from qalora.formats.around import instead_of_adapter
from qalora.formats.files import InputFile, contained
from qalora.formats.record_json import decode
from qalora.formats.safetensors import Entry, read_header, read_tensor

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint

__all__ = ["AdapterSource", "convention_of", "given_adapter", "open_adapter", "read_adapter"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAME_FACTOR = 2.0**-48
"""How far, relatively, a recorded factor may be from what alpha gives, which is rounded at each of five steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """An adapter's folder before its tensors are read: for each module where its A and B are; what it brings whole."""

    folder: Path
    config: PeftConfig
    record: AdapterRecord | None
    pairs: Mapping[str, tuple[Entry, Entry]]
    saved: SavedTensors | None = None

    def columns(self, module: str) -> int:
        """The columns of the module's A."""
        return self.pairs[module][0].shape[1]


def read_adapter(path: Path | str, model: Checkpoint | None = None, *, convention: Convention | None = None) -> Adapter:
    """Read an adapter's folder; with `model`, check it against the model's weights.

    convention  what the scaling means, where the file does not say; refused where the file says something else

    Without `model` the pool size comes from our record or from PEFT's qalora_group_size. Raises AdapterError where the
    convention or the pool size is not known, for an adapter of another model and for one that is more than a LoRA;
    FormatError for damaged files and for pickles.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise InputError("convention", expected=f"one of {', '.join(CONVENTIONS)}", got=shown(convention))
    source = open_adapter(Path(path))
    if model is not None:
        _check_model(source, model)
    pools = {module: _pool_size(source, module, model) for module in source.pairs}
    adapter_convention = convention_of(source, pools, convention)
    layers = {}
    weights = contained(source.folder, WEIGHTS)
    with InputFile(weights) as file:
        for module, pair in source.pairs.items():
            a = _values(file, pair[0], f"{weights}: lora_A of {module}")
            b = _values(file, pair[1], f"{weights}: lora_B of {module}")
            scaling = source.config.scaling_of(module)
            factor = _factor(source, module, adapter_convention, pools[module])
            layers[module] = AdapterLayer(a=a, b=b, pool_size=pools[module], scaling=scaling, factor=factor)
    minima = source.record.minima if source.record is not None else None
    return Adapter(
        layers=layers, convention=adapter_convention, minima=minima, metadata=source.config.carried, saved=source.saved
    )


def given_adapter(
    adapter: Adapter | Path | str, model: Checkpoint | None = None, *, convention: Convention | None = None
) -> Adapter:
    """An adapter that is given as such, or else as its folder, which `read_adapter` reads.

    InputError for a convention that an adapter in memory does not have.
    """
    if not isinstance(adapter, Adapter):
        return read_adapter(adapter, model, convention=convention)
    if convention not in (None, adapter.convention):
        got = f"{shown(convention)} for an adapter in memory, which is {adapter.convention}"
        raise InputError("convention", expected="none, or the adapter's own", got=got)
    return adapter


def open_adapter(folder: Path) -> AdapterSource:
    """Check an adapter's folder and read config, record and headers, no values; raises as `read_adapter` does."""
    _check_folder(folder)
    config = parse_config(read_json(folder, CONFIG), str(folder / CONFIG))
    weights = contained(folder, WEIGHTS)
    entries, where = read_header(weights).entries, str(folder / WEIGHTS)
    keys = sort_keys(entries, where)
    pairs = {
        module: _pair({part: entries[name] for part, name in parts.items()}, f"{where}: {module}")
        for module, parts in keys.pairs.items()
    }
    check_work(config, {*pairs, *keys.wrapped.values()}, str(folder / CONFIG))
    check_names(config, keys, str(folder / CONFIG))
    for module, (a, _) in pairs.items():
        if a.shape[0] != config.rank_of(module):
            raise AdapterError(
                f"{folder}: lora_A of {module}",
                expected=f"the rank of {CONFIG}, {config.rank_of(module)}",
                got=str(list(a.shape)),
            )
    saved = saved_tensors(folder, weights, config, keys, entries)
    return AdapterSource(folder=folder, config=config, record=_read_record(folder, pairs), pairs=pairs, saved=saved)


def _check_folder(folder: Path) -> None:
    """Refuse what is no adapter's folder, with the name of the tool where it is a pickle."""
    pickles = [folder] if folder.is_file() else [folder / name for name in ("adapter_model.bin", "adapter_model.pt")]
    pickle = next((path for path in pickles if path.is_file() and path.suffix in (".bin", ".pt", ".pth")), None)
    if pickle is not None and not (folder / WEIGHTS).exists():
        raise FormatError(
            f"{pickle}: a pickle, which runs code when it is opened",
            todo=f"convert it in a process of its own: python tools/convert_pickle.py {pickle}",
        )
    if not folder.is_dir():
        got, todo = instead_of_adapter(folder, CONFIG)
        raise InputError(str(folder), expected=f"an adapter's folder with {CONFIG} and {WEIGHTS}", got=got, todo=todo)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            got, todo = instead_of_adapter(folder, name)
            raise FormatError(str(folder), expected=f"an adapter's folder with {name}", got=got, todo=todo)


def _pair(parts: Mapping[str, Entry], where: str) -> tuple[Entry, Entry]:
    if len(parts) != 2:
        raise AdapterError(where, expected="lora_A and lora_B", got=f"lora_{next(iter(parts))} alone")
    a, b = parts["A"], parts["B"]
    for entry, part in ((a, "A"), (b, "B")):
        if entry.dtype not in DTYPES or len(entry.shape) != 2 or 0 in entry.shape:
            raise AdapterError(
                f"{where}: lora_{part}",
                expected="a float32, float16 or bfloat16 matrix",
                got=f"{entry.dtype} {list(entry.shape)}",
            )
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{where}: lora_A [rank, in/pool_size] and lora_B [out, rank]",
            expected="the same rank",
            got=f"{list(a.shape)} and {list(b.shape)}",
        )
    return a, b


def _read_record(folder: Path, pairs: Mapping[str, object]) -> AdapterRecord | None:
    if not (folder / RECORD).exists():
        return None
    where = str(folder / RECORD)
    record = decode(AdapterRecord, read_json(folder, RECORD), where)
    if set(record.layers) != set(pairs):
        differ = sorted(set(record.layers) ^ set(pairs))
        raise FormatError(
            f"{where}: layers",
            expected=f"the layers of {WEIGHTS}",
            got=f"{differ[0]} in only one of the two files",
            todo=f"remove {RECORD}",
        )
    return record


def _check_model(source: AdapterSource, model: Checkpoint) -> None:
    """Modules and shapes against the model's weights."""
    unknown = [module for module in source.pairs if f"{module}.weight" not in model.tensors]
    if unknown:
        raise AdapterError(
            f"{source.folder}: modules",
            expected=f"modules of {model.path}, such as {module_of(model.linears[0]) if model.linears else 'none'}",
            got=f"{unknown[0]} ({len(unknown)} of {len(source.pairs)} are not in the model)",
            todo="the adapter belongs to a different model",
        )
    if source.saved is not None:
        check_saved(source.config, source.saved, model, str(source.folder))
    for module, (a, b) in source.pairs.items():
        shape = model.tensors[f"{module}.weight"].shape
        if len(shape) != 2 or b.shape[0] != shape[0] or shape[1] % a.shape[1]:
            raise AdapterError(
                f"{source.folder}: lora_A and lora_B of {module}",
                expected=f"[rank, a divisor of in] and [out, rank] for [out, in] = {list(shape)}",
                got=f"{list(a.shape)} and {list(b.shape)}",
                todo="the adapter belongs to a different model",
            )


def _pool_size(source: AdapterSource, module: str, model: Checkpoint | None) -> int:
    """in / (columns of A), checked against what the files say; what the files say where there is no model."""
    config, record = source.config, source.record
    pool = record.layers[module].pool_size if record is not None else config.group_size if config.use_qalora else None
    if model is None:
        if pool is None:
            raise AdapterError(
                f"{source.folder} does not say how many columns it pools", todo="give the model that it belongs to"
            )
        return pool
    pool_size = model.tensors[f"{module}.weight"].shape[1] // source.columns(module)
    ignored = record is None and pool_size == 1  # PEFT's flag on a layer that is not GPTQ's
    if pool is not None and pool != pool_size and not ignored:
        raise AdapterError(
            f"{source.folder}: lora_A of {module}",
            expected=f"in/{pool} = {model.tensors[f'{module}.weight'].shape[1] / pool:g} columns, as its files say",
            got=str(source.columns(module)),
            todo="the adapter belongs to a different model, or its config was changed",
        )
    return pool_size


def convention_of(source: AdapterSource, pools: Mapping[str, int], convention: Convention | None) -> Convention:
    """What the files say, else what was asked for; AdapterError if neither, or both and they differ.

    pools  the pool size of each module
    """
    config, record = source.config, source.record
    pooled = [module for module, pool_size in pools.items() if pool_size > 1]
    if record is None and config.use_qalora and config.group_size == 1:
        raise AdapterError(
            f"{source.folder / CONFIG}: use_qalora with qalora_group_size 1 means two factors, a QA-LoRA's over GPTQ "
            "layers and an ordinary LoRA's over others",
            todo="remove use_qalora if it is an ordinary LoRA",
        )
    if record is not None:
        in_files, why = record.convention, RECORD
    elif not pooled:
        return "paper"  # an ordinary LoRA: the factor is s
    elif config.use_qalora:
        in_files, why = "peft", "use_qalora"
    elif convention is not None:
        return convention
    else:
        raise _unknown_convention(source, pooled[0], pools[pooled[0]])
    if convention not in (None, in_files):
        raise AdapterError(
            f"{source.folder}: convention",
            expected=f"{in_files}, as {why} says",
            got=str(convention),
            todo="leave it out",
        )
    return in_files


def _unknown_convention(source: AdapterSource, module: str, pool_size: int) -> AdapterError:
    scaling, columns = source.config.scaling_of(module), source.columns(module) * pool_size
    factors = ", ".join(
        f"{convention_factor(convention, scaling, columns, pool_size):g} ({convention})" for convention in CONVENTIONS
    )
    return AdapterError(
        f"{source.folder} does not say which convention its scaling follows: for {module}, with s = {scaling:g}, "
        f"pool size {pool_size} and in = {columns}, B @ A would be multiplied by {factors}",
        todo="give `convention` with the one that it was trained with",
    )


def _factor(source: AdapterSource, module: str, convention: Convention, pool_size: int) -> float:
    """The record's factor, after a check against what alpha gives; else what alpha gives."""
    scaling = source.config.scaling_of(module)
    factor = scaling
    if pool_size > 1:
        factor = convention_factor(convention, scaling, source.columns(module) * pool_size, pool_size)
    if source.record is None:
        return factor
    recorded = source.record.layers[module].factor
    if abs(recorded - factor) > SAME_FACTOR * abs(factor):
        raise AdapterError(
            f"{source.folder}: the factor of {module}",
            expected=f"{recorded!r}, as {RECORD} says",
            got=f"{factor!r} from {CONFIG}",
            todo=f"undo the change of {CONFIG}, or remove {RECORD}",
        )
    return recorded


def _values(file: InputFile, entry: Entry, where: str) -> Tensor:
    values = read_tensor(file, entry).float()
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(where, expected="finite values", got="NaN or Inf")
    return values
