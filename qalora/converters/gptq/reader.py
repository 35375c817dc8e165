"""Read a GPTQ folder: 2, 3, 4 and 8 bits, both versions of the zero points, act-order, sharded or not.

The label checkpoint_format is often wrong, so it is believed only where the values say nothing. Symmetric zero points
are all 2**(bits-1): stored as that they are gptq_v2, stored as one less they are gptq, whatever the label says. The
first layers' qzeros are looked at when the folder is opened, as many as are needed to find one that is not symmetric
and `words.SAMPLE` at most (some 100 KB each in a 7B model); where all of those are symmetric, every other layer is held
against that when it is read, and one that differs is refused rather than guessed. Asymmetric zero points are read as
the label says, with a note, or as the caller says.

Beside that, opening reads config, headers and g_idx. A layer is read whole, or by rows.

Not read: 5 to 7 bits (planar words), Marlin and BitBLAS words, other methods (AWQ, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.gptq.beside import ADAPTER_CONFIG, find_residual
from qalora.converters.gptq.dynamic import Rule, check_rules, parse_rules, rule_of
from qalora.converters.gptq.words import PARTS, Words, lazy_words, symmetric_version, words_of
from qalora.converters.huggingface import float_tensor, model_of, read_config, stored_tensors
from qalora.converters.settings import linear_names
from qalora.converters.wrapping import in_transformers, opened
from qalora.errors import FormatError, InputError, json_kind, shown
from qalora.formats.gptq import BITS, Version, unpack_qzeros

__all__ = ["MAKER", "read"]

MAKER = "qalora"
"""Our name in meta.quantizer; a label of ours is right, and is believed."""

SETTINGS = "quantize_config.json"
"""Where older tools keep what config.json has as quantization_config."""


def _same(module: str) -> str:
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What quantization_config says. group_size -1: whole rows. rules: of layers that differ; where: it was read;
    on_disk: what rules and files call a module.
    """

    bits: int
    group_size: int
    label: Version
    symmetric: bool
    ours: bool
    minima: torch.dtype
    rules: tuple[Rule, ...]
    where: str
    on_disk: Callable[[str], str] = _same


def read(folder: Path, *, checkpoint_format: str | None = None) -> Checkpoint:
    """Open a GPTQ folder; reads config, headers, g_idx and the zero points of a few layers.

    checkpoint_format overrides label and values: "gptq" (zero points stored minus one) or "gptq_v2".
    A residual beside the checkpoint (`beside`) is folded into the minima; another adapter there is only noted.
    Raises FormatError for what is no such folder, InputError for another checkpoint_format.
    """
    config = read_config(folder)
    said = config.pop("quantization_config", None)
    found = opened(folder, config, stored_tensors(folder), end=".qweight")
    config, stored, wrapper = found.config, found.stored, found.wrapper
    settings = replace(_settings(folder, said), on_disk=_same if wrapper is None else wrapper.on_disk)
    modules = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    if not modules:
        raise FormatError(f"{folder}", expected="tensors named <layer>.qweight", got="none")
    check_rules(settings.rules, list(map(settings.on_disk, modules)), settings.where)
    layers = {module: words_of(folder, module, stored, *_sizes(module, settings)) for module in modules}
    version, symmetric, notes = _version(folder, settings, list(layers.values()), checkpoint_format)
    linears = linear_names(config, folder)
    decoder = [layers[name.removesuffix(".weight")] for name in linears if name.removesuffix(".weight") in layers]
    shapes = {layer.module: (layer.rows, layer.columns, layer.group_size, layer.g_idx) for layer in decoder}
    place = partial(in_transformers, wrapper)
    residuals, other = find_residual(folder, shapes, place) if shapes else ({}, False)
    taken = {f"{module}.{part}" for module in modules for part in PARTS}
    tensors = {name: float_tensor(name, *where) for name, where in stored.items() if name not in taken}
    for module, layer in layers.items():
        tensors[f"{module}.weight"] = lazy_words(
            layer,
            partial(unpack_qzeros, version=version),
            symmetric=symmetric,
            residual=residuals.get(module),
            minima=settings.minima,
        )
    if other:
        own = f"{folder / ADAPTER_CONFIG} is an adapter of its own; it is not part of the model as it is read here"
        notes = (*notes, own)
    notes = (*found.notes, *notes, *_said_twice(folder, said))
    silent = _zero_biases(tensors, modules)
    model = model_of(folder, "gptq", config, tensors, notes=notes, silent=silent, wrapper=wrapper)
    return replace(model, beside=folder if other else None)


def _settings(folder: Path, config: object) -> _Settings:
    where = f"{folder}: quantization_config"
    if config is None:
        config = read_config(folder, SETTINGS)
        where = f"{folder}/{SETTINGS}"
    if not isinstance(config, dict):
        raise FormatError(where, expected="an object", got=json_kind(config))
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise FormatError(f"{where}: quant_method", expected="gptq", got=shown(method))
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    if type(bits) is not int or bits not in BITS:
        raise FormatError(f"{where}: bits", expected=f"one of {', '.join(map(str, BITS))}", got=shown(bits))
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise FormatError(f"{where}: group_size", expected="-1 or a whole number from 1", got=shown(group_size))
    label: Any = config.get("checkpoint_format") or config.get("format") or "gptq"
    if label not in ("gptq", "gptq_v2"):
        raise FormatError(f"{where}: checkpoint_format", expected="gptq or gptq_v2", got=shown(label))
    meta = config.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    ours = MAKER in str(meta.get("quantizer"))
    return _Settings(
        bits=bits,
        group_size=group_size,
        label=label,
        symmetric=config.get("sym") is True,
        ours=ours,
        minima=torch.float16 if ours and meta.get("minima") == "float16" else torch.float32,
        rules=parse_rules(config.get("dynamic"), where),
        where=where,
    )


def _said_twice(folder: Path, counts: object) -> tuple[str, ...]:
    """A note of what quantize_config.json has otherwise than the config.json that counts, as in transformers."""
    if not isinstance(counts, dict) or not (folder / SETTINGS).exists():
        return ()
    try:
        other = read_config(folder, SETTINGS)
    except FormatError:
        return ()
    keys = ("bits", "group_size", "sym", "checkpoint_format", "dynamic")
    differ = [key for key in keys if key in counts and key in other and counts[key] != other[key]]
    if not differ:
        return ()
    listed = ", ".join(f"{key} {other[key]!r:.60}, not {counts[key]!r:.60}" for key in differ)
    return (f"{folder.name}: config.json counts beside {SETTINGS}, which has {listed}",)


def _sizes(module: str, settings: _Settings) -> tuple[int, int, str]:
    """Width and group size of one layer by the rules, and a word about the rule; FormatError if one leaves it out."""
    rule = rule_of(settings.rules, settings.on_disk(module))
    if rule is None:
        return settings.bits, settings.group_size, ""
    told = f"the rule {rule.text[:120]!r} of dynamic"
    if rule.out:
        raise FormatError(
            f"{settings.where}: {told} leaves out {module}", expected="floats there", got="tensors named qweight"
        )
    size = settings.group_size if rule.group_size is None else rule.group_size
    return rule.bits or settings.bits, size, f" at {rule.bits or settings.bits} bits, by {told}"


def _version(
    folder: Path, settings: _Settings, layers: list[Words], override: str | None
) -> tuple[Version, bool, tuple[str, ...]]:
    """How zero points are stored, whether every layer must be symmetric, and notes."""
    if override is not None:
        if override not in ("gptq", "gptq_v2"):
            raise InputError("checkpoint_format", expected="gptq or gptq_v2", got=shown(override))
        return ("gptq" if override == "gptq" else "gptq_v2"), False, ()
    if settings.ours:
        return settings.label, settings.symmetric, ()
    version = symmetric_version(layers)
    if version is not None:
        wrong = f"{folder} is labelled {settings.label}, but its zero points, all symmetric, are those of {version}"
        return version, True, () if version == settings.label else (f"{wrong}; read as {version}",)
    note = (
        f"{folder} has asymmetric zero points, stored as its label says: {settings.label}; labels are often wrong, and "
        "then every weight is off by one scale: `checkpoint_format` gptq or gptq_v2 overrides it"
    )
    return settings.label, False, (note,)


def _zero_biases(tensors: Mapping[str, LazyTensor], modules: list[str]) -> set[str]:
    """The biases of zeros, which old AutoGPTQ writes for layers that have none."""
    names = [f"{module}.bias" for module in modules if f"{module}.bias" in tensors]
    return {name for name in names if not bool(tensors[name].load_float().any())}
