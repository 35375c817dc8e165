"""GPTQ folders: what label, `sym` and values say of the zero points, and which loaders go wrong over it.

Only qzeros are read, which are small: 4 bits in each group. Symmetric zero points are all 2**(bits-1); a checkpoint
that stores them as that is version 2, one that stores one less is version 1, whatever its label says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.auto_round.scheme import DEFAULT, GPTQ_WORDS
from qalora.converters.gptq.beside import ADAPTER_CONFIG
from qalora.converters.gptq.head import HEAD, is_read_by_transformers
from qalora.converters.huggingface import read_config, stored_tensors
from qalora.formats.gptq import unpack_qzeros
from qalora.formats.safetensors import load_tensor
from qalora.inspection.records import Finding

__all__ = ["auto_round_findings", "findings"]

LABELS = ("config.json", "quantize_config.json")

WELL_LABELLED = ("auto_round", "auto_round:auto_gptq")
"""auto-round's labels of zero points as they are, and of those minus one."""

_OFFSETS = {"gptq_v2": 0, "gptq": -1}
"""What symmetric zero points are stored as, less 2**(bits-1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Zeros:
    """The stored zero points of one layer: what all of them are, if they are alike, and the highest.

    offset  all of them less 2**(bits-1); None if they differ
    """

    bits: int
    offset: int | None
    highest: int


def findings(model: Checkpoint) -> list[Finding]:
    """The warnings of a GPTQ folder. A layer whose qzeros cannot be read is left to the look at its values."""
    settings = _settings(model)
    label = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    zeros = _stored_zeros(model)
    offsets = {layer.offset for layer in zeros.values()}
    findings = [*_residual(model), *_mixed(zeros), *_label(zeros, offsets, str(label))]
    symmetric = offsets <= {0, -1}
    version = "gptq_v2" if offsets == {0} else "gptq" if offsets == {-1} else str(label)
    findings += _symmetry(settings, zeros, symmetric, version)
    return [*findings, *_runtimes(settings, zeros, symmetric, version, str(label)), *_head(settings, zeros)]


def auto_round_findings(model: Checkpoint) -> list[Finding]:
    """The warnings of an auto-round folder in GPTQ's words: what packing_format and values say of its zero points."""
    settings = read_config(model.path).get("quantization_config")
    label = str(settings.get("packing_format", DEFAULT)) if isinstance(settings, dict) else DEFAULT
    if label not in GPTQ_WORDS:
        return []
    zeros = _stored_zeros(model)
    offsets = {layer.offset for layer in zeros.values()}
    wanted = next((one for one in WELL_LABELLED if offsets == {_OFFSETS[GPTQ_WORDS[one]]}), label)
    if GPTQ_WORDS[wanted] == GPTQ_WORDS[label]:
        return _mixed(zeros)
    return [_wrong_label(zeros, label, wanted, "auto-round", f'set "packing_format": "{wanted}" in config.json')]


def _settings(model: Checkpoint) -> Mapping[str, Any]:
    config = read_config(model.path).get("quantization_config")
    return config if isinstance(config, dict) else read_config(model.path, "quantize_config.json")


def _stored_zeros(model: Checkpoint) -> dict[str, _Zeros]:
    zeros = {}
    for name, (path, entry) in stored_tensors(model.path).items():
        lazy = model.tensors.get(f"{name.removesuffix('.qzeros')}.weight")
        if not name.endswith(".qzeros") or lazy is None or lazy.spec is None:
            continue
        stored = unpack_qzeros(load_tensor(path, entry), lazy.spec.bits, "gptq_v2")
        first = int(stored[0, 0])
        alike = bool((stored == first).all())
        zeros[name.removesuffix(".qzeros")] = _Zeros(
            bits=lazy.spec.bits,
            offset=first - (1 << (lazy.spec.bits - 1)) if alike else None,
            highest=int(stored.max()),
        )
    return zeros


def _label(zeros: Mapping[str, _Zeros], offsets: set[int | None], label: str) -> list[Finding]:
    if len(offsets) != 1 or offsets == {_OFFSETS.get(label)} or offsets not in ({0}, {-1}):
        return []
    true = "gptq_v2" if offsets == {0} else "gptq"
    todo = f'set "checkpoint_format": "{true}" in {" and ".join(LABELS)}'
    return [_wrong_label(zeros, label, true, "transformers, GPTQModel, vLLM", todo)]


def _wrong_label(zeros: Mapping[str, _Zeros], label: str, true: str, loaders: str, todo: str) -> Finding:
    layer = next(iter(zeros.values()))
    middle = 1 << (layer.bits - 1)
    same, less = ("gptq_v2", "gptq") if true in _OFFSETS else WELL_LABELLED
    return Finding(
        code="zeros-label",
        message=f"labelled {label}, but the zero points are stored as in {true}: a loader that believes the label "
        f"({loaders}) reads every weight one step off",
        evidence=f"in all {len(zeros)} layers every stored zero point is {middle + (layer.offset or 0)}; symmetric "
        f"ones at {layer.bits} bits are {middle}, stored as {middle} in {same} and as {middle - 1} in {less}",
        todo=todo,
    )


def _mixed(zeros: Mapping[str, _Zeros]) -> list[Finding]:
    by_offset = {way: [name for name, layer in zeros.items() if layer.offset == way] for way in (0, -1)}
    if not all(by_offset.values()):
        return []
    first = {way: names[0] for way, names in by_offset.items()}
    return [
        Finding(
            code="zeros-mixed",
            message="some layers store symmetric zero points as they are, others minus one: no label is right for both",
            evidence=f"{len(by_offset[0])} layers as they are (the first is {first[0]}), "
            f"{len(by_offset[-1])} minus one ({first[-1]})",
            todo="quantize it again",
        )
    ]


def _symmetry(settings: Mapping[str, Any], zeros: Mapping[str, _Zeros], symmetric: bool, version: str) -> list[Finding]:
    shift = 1 if version == "gptq" else 0
    others = [name for name, layer in zeros.items() if layer.offset is None or layer.offset + shift]
    if settings.get("sym") is not True or not others or symmetric:
        return []
    return [
        Finding(
            code="symmetry-label",
            message="labelled sym, but its zero points are not the middle: vLLM's Marlin kernels do not read them "
            "then, and compute with the middle",
            evidence=f"sym is true; {len(others)} of {len(zeros)} layers have others, the first is {others[0]}",
            todo=f'set "sym": false in {" and ".join(LABELS)}',
        )
    ]


def _runtimes(
    settings: Mapping[str, Any], zeros: Mapping[str, _Zeros], symmetric: bool, version: str, label: str
) -> list[Finding]:
    findings = []
    if version == "gptq_v2":
        findings.append(
            Finding(
                code="runtime",
                message="onnxruntime-genai's builder misreads it: it adds 1 to the zero points of every GPTQ folder",
                evidence="its zero points are stored as they are (gptq_v2), as "
                + ("the values show" if symmetric else f"its label {label} says"),
                todo="use qalora export --to onnx for onnxruntime-genai",
            )
        )
    quantizer = str((settings.get("meta") or {}).get("quantizer")) if isinstance(settings.get("meta"), dict) else ""
    if version == "gptq" and not symmetric and "gptqmodel" not in quantizer.lower():
        findings.append(
            Finding(
                code="runtime",
                message="GPTQModel, and transformers through it, refuse it: asymmetric zero points in version gptq",
                evidence=f"label {label}, zero points that differ, meta.quantizer {quantizer or 'absent'}",
                todo="write it again as gptq_v2: qalora export --to gptq",
            )
        )
    wrapped = [name for name, layer in zeros.items() if layer.highest == (1 << layer.bits) - 1]
    if version == "gptq" and wrapped:
        layer = zeros[wrapped[0]]
        findings.append(
            Finding(
                code="zeros-wrap",
                message="it stores zero points that version gptq has no place for, and loaders disagree over them: "
                f"GPTQModel reads 0 and carries into the next one, AutoGPTQ 0, ExLlama's kernels {1 << layer.bits}",
                evidence=f"{len(wrapped)} of {len(zeros)} layers store {layer.highest}, which is 0 minus one, at "
                f"{layer.bits} bits; the first is {wrapped[0]}",
                todo="write it again as gptq_v2: qalora export --to gptq",
            )
        )
    return findings


def _head(settings: Mapping[str, Any], zeros: Mapping[str, _Zeros]) -> list[Finding]:
    head = HEAD.removesuffix(".weight")
    if head not in zeros or is_read_by_transformers(settings):
        return []
    return [
        Finding(
            code="runtime",
            message="transformers misreads it: it reads no output layer in words, and fills it with random numbers",
            evidence=f"{head}.qweight is there, and quantization_config has no empty block_name_to_quantize",
            todo='set "block_name_to_quantize": "" in config.json, or load it with GPTQModel',
        )
    ]


def _residual(model: Checkpoint) -> list[Finding]:
    if not any(lazy.spec is not None and lazy.spec.zeros == "real" for lazy in model.tensors.values()):
        return []
    return [
        Finding(
            code="residual-beside",
            message="its real zero points are held by a LoRA beside it: transformers without PEFT, and "
            "GPTQModel.load, load the checkpoint alone without a word, and it then computes noise",
            evidence=f"{ADAPTER_CONFIG} beside config.json holds what the integer zero points leave over",
            todo="install peft, and load the folder with transformers' from_pretrained",
        )
    ]
