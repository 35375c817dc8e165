"""Weights read back and compared, a tensor at a time: codes, scale and minimum in ULP, floats, config.

Two quantized tensors are compared as codes, scale and min, after both are brought to the same groups. A carrier may
store the same weight with shifted codes (Q8_0 centres them on 0): where a group's codes are all `k` above the
reference's and its min is exactly scale * k below, nothing differs. Where one side holds floats, both are compared as
float32 after exact widening or dequantizing.

This module runs no model, and decides nothing: what may differ is `qalora.parity.gates`' matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import FULL, decoder_of
from qalora.converters.families import FAMILIES
from qalora.tensor import GroupQuantTensor

__all__ = ["TensorDifference", "WeightMetrics", "compare_tensors", "compare_weights", "essentials", "ulp"]

_FORMATS = {torch.float16: (-14, 10), torch.bfloat16: (-126, 7), torch.float32: (-126, 23)}  # least exponent, mantissa


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """How far one tensor is from the reference's; every count 0 if it is the same.

    rows_moved                rows that are not where they belong, in a tensor that has the reference's rows in another
                              order, such as llama.cpp's rotary one; nothing else is counted of it then
    codes, codes_differ       compared, and different
    scale_differ, scale_ulp   groups whose scale differs; the largest difference in the reference's ULP
    min_differ, min_ulp       the same for the minimum
    min_beyond                groups whose minimum is further off than a residual explains (`compare_tensors`)
    values, values_differ, values_max   floats compared and different; the largest difference
    """

    name: str
    rows_moved: int = 0
    codes: int = 0
    codes_differ: int = 0
    scale_differ: int = 0
    scale_ulp: float = 0.0
    min_differ: int = 0
    min_ulp: float = 0.0
    min_beyond: int = 0
    values: int = 0
    values_differ: int = 0
    values_max: float = 0.0

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        counts = (self.rows_moved, self.codes_differ, self.scale_differ, self.min_differ, self.values_differ)
        return not any(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMetrics:
    """All tensors of an artefact against the reference's.

    tensors    compared
    missing    the reference has them, the artefact not
    extra      the other way round
    shapes     "name: [shape] instead of [shape]"
    config     "key: value instead of value", for what changes the logits
    total      the sums of the counts and the largest of the rest
    different  the tensors that differ, in the reference's order
    """

    tensors: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    shapes: tuple[str, ...]
    config: tuple[str, ...]
    total: TensorDifference
    different: tuple[TensorDifference, ...]


def compare_weights(
    artifact: Checkpoint,
    reference: Checkpoint,
    *,
    residual: bool = False,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> WeightMetrics:
    """Compare every tensor, streamed; `residual` as in `compare_tensors`.

    An output layer that one side ties to the embedding and the other writes out is compared with that embedding.
    """
    pairs, missing, extra = _pairs(artifact, reference)
    shapes, found, family = [], [], FAMILIES.get(str(reference.config.get("model_type")))
    for name, mine, theirs in pairs:
        if mine.shape != theirs.shape:
            shapes.append(f"{name}: {list(mine.shape)} instead of {list(theirs.shape)}")
            continue
        if family is not None and family.adds_one(name):
            mine, theirs = _plus_one(mine), _plus_one(theirs)
        found.append(_compare_lazy(name, mine, theirs, residual, whole=name in reference.linears))
        progress(name, 4 * math.prod(theirs.shape))
    return WeightMetrics(
        tensors=len(found),
        missing=missing,
        extra=extra,
        shapes=tuple(shapes),
        config=_config_differences(artifact.config, reference.config),
        total=_total("all", found),
        different=tuple(difference for difference in found if not difference.same),
    )


def _plus_one(lazy: LazyTensor) -> LazyTensor:
    """A norm as it is used, where its family multiplies with 1 + weight."""
    return replace(lazy, dtype=torch.float32, read=lambda start, stop: _floats(lazy.read(start, stop)) + 1)


def _pairs(
    artifact: Checkpoint, reference: Checkpoint
) -> tuple[list[tuple[str, LazyTensor, LazyTensor]], tuple[str, ...], tuple[str, ...]]:
    """(name, artefact's, reference's) of what both have; names missing and extra."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    mine, theirs = dict(artifact.tensors), dict(reference.tensors)
    if head in mine and head not in theirs and embedding in theirs:
        theirs[head] = theirs[embedding]
    elif head in theirs and head not in mine and embedding in mine:
        mine[head] = mine[embedding]
    pairs = [(name, mine[name], lazy) for name, lazy in theirs.items() if name in mine]
    missing = tuple(name for name in theirs if name not in mine)
    return pairs, missing, tuple(name for name in mine if name not in theirs)


def _compare_lazy(name: str, mine: LazyTensor, theirs: LazyTensor, residual: bool, *, whole: bool) -> TensorDifference:
    if whole or not theirs.shape:
        return compare_tensors(name, mine.load(), theirs.load(), _dtypes(theirs), residual=residual)
    found = []
    for start, tile in theirs.tiles():
        other = mine.rows(start, start + tile.shape[0])
        found.append(compare_tensors(name, other, tile, _dtypes(theirs), residual=residual))
    return _total(name, found)


def _dtypes(lazy: LazyTensor) -> tuple[torch.dtype, torch.dtype]:
    if lazy.spec is None:
        return torch.float32, torch.float32
    return lazy.spec.scale_dtype, lazy.spec.min_dtype


def _total(name: str, parts: list[TensorDifference]) -> TensorDifference:
    return TensorDifference(
        name=name,
        rows_moved=sum(part.rows_moved for part in parts),
        codes=sum(part.codes for part in parts),
        codes_differ=sum(part.codes_differ for part in parts),
        scale_differ=sum(part.scale_differ for part in parts),
        scale_ulp=max((part.scale_ulp for part in parts), default=0.0),
        min_differ=sum(part.min_differ for part in parts),
        min_ulp=max((part.min_ulp for part in parts), default=0.0),
        min_beyond=sum(part.min_beyond for part in parts),
        values=sum(part.values for part in parts),
        values_differ=sum(part.values_differ for part in parts),
        values_max=max((part.values_max for part in parts), default=0.0),
    )


def compare_tensors(
    name: str,
    mine: Tensor | GroupQuantTensor,
    theirs: Tensor | GroupQuantTensor,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    residual: bool = False,
) -> TensorDifference:
    """Compare two tensors of one shape; `dtypes` are those that the reference's scale and min are counted in ULP of.

    residual  the artefact holds min as C = min + scale * z (`qalora.residual`). Where the reference's min is float32, C
              was rounded (2^-24 |C|, with |C| <= |min| + |scale| 2^bits) and min read back with another rounding
              (2^-24 |min|); `min_beyond` then counts only what is further off than 2^-23 (|min| + |scale| 2^bits).
    """
    if isinstance(mine, GroupQuantTensor) and isinstance(theirs, GroupQuantTensor):
        found = _compare_quantized(name, mine, theirs, dtypes, residual)
        moved = _rows_moved(mine, theirs) if found.codes_differ else 0
        return TensorDifference(name=name, rows_moved=moved, codes=found.codes) if moved else found
    a, b = _floats(mine), _floats(theirs)
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    count = int(differ.sum())
    largest = float((a.double() - b.double()).abs().nan_to_num(math.inf, math.inf).max()) if count else 0.0
    return TensorDifference(name=name, values=b.numel(), values_differ=count, values_max=largest)


def _floats(tensor: Tensor | GroupQuantTensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, GroupQuantTensor) else tensor.float()


def _compare_quantized(
    name: str,
    mine: GroupQuantTensor,
    theirs: GroupQuantTensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    residual: bool,
) -> TensorDifference:
    scale_a, min_a, scale_b, min_b, columns = _aligned(mine, theirs)
    same_codes = mine.bits == theirs.bits and torch.equal(mine.packed, theirs.packed)
    codes_differ = 0
    if not same_codes:
        shape = (theirs.shape[0], scale_b.shape[1], columns)
        offset = mine.codes().view(shape).to(torch.int16) - theirs.codes().view(shape)
        shift = offset.median(dim=2).values
        moved = min_a.double() + scale_b.double() * shift
        whole = (scale_b != 0) | ((offset == shift[..., None]).all(dim=2) & (columns > 1))  # 0 * k proves no shift
        shift = torch.where((moved == min_b.double()) & (scale_a == scale_b) & whole, shift, 0)
        min_a = torch.where(shift != 0, min_b, min_a)
        codes_differ = int((offset != shift[..., None]).sum())
    min_differ = min_a != min_b
    beyond = min_differ
    if residual and dtypes[1] == torch.float32:
        slack = 2.0**-23 * (min_b.double().abs() + scale_b.double().abs() * (1 << theirs.bits))
        beyond = (min_a.double() - min_b.double()).abs() > slack
    return TensorDifference(
        name=name,
        codes=theirs.shape[0] * theirs.shape[1],
        codes_differ=codes_differ,
        scale_differ=int((scale_a != scale_b).sum()),
        scale_ulp=_largest_ulp(scale_a, scale_b, dtypes[0]),
        min_differ=int(min_differ.sum()),
        min_ulp=_largest_ulp(min_a, min_b, dtypes[1]),
        min_beyond=int(beyond.sum()),
    )


def _aligned(mine: GroupQuantTensor, theirs: GroupQuantTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Scale and min of both in common groups, and a group's columns; each column is its own with act-order."""
    ordered = mine.g_idx is not None or theirs.g_idx is not None
    if not ordered:
        fine = math.gcd(mine.group_size, theirs.group_size)
        a, b = mine.regrouped(fine), theirs.regrouped(fine)
        return a.scale, a.min, b.scale, b.min, fine
    index_a, index_b = _group_index(mine), _group_index(theirs)
    return mine.scale[:, index_a], mine.min[:, index_a], theirs.scale[:, index_b], theirs.min[:, index_b], 1


def _group_index(tensor: GroupQuantTensor) -> Tensor:
    return torch.arange(tensor.shape[1]) // tensor.group_size if tensor.g_idx is None else tensor.g_idx.long()


def _rows_moved(mine: GroupQuantTensor, theirs: GroupQuantTensor) -> int:
    """How many rows of `mine` are elsewhere in `theirs`, if both have the very same rows; else 0."""
    scale_a, min_a, scale_b, min_b, _ = _aligned(mine, theirs)
    rows_a, rows_b = _row_bytes(mine.codes(), scale_a, min_a), _row_bytes(theirs.codes(), scale_b, min_b)
    return sum(a != b for a, b in zip(rows_a, rows_b, strict=True)) if Counter(rows_a) == Counter(rows_b) else 0


def _row_bytes(codes: Tensor, scale: Tensor, minimum: Tensor) -> list[bytes]:
    parts = [codes, *((part + 0.0).contiguous().view(torch.uint8) for part in (scale, minimum))]  # -0.0 + 0.0 is 0.0
    return [row.tobytes() for row in torch.cat(parts, dim=1).numpy()]


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of each value in `dtype`, float64; of a subnormal, and of 0, the least subnormal."""
    least, mantissa = _FORMATS[dtype]
    exponent = torch.frexp(values.double().abs()).exponent - 1
    exponent = torch.where(values == 0, least, exponent).clamp(min=least)
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - mantissa)


def _largest_ulp(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    if torch.equal(mine, theirs):
        return 0.0
    return float(((mine.double() - theirs.double()).abs() / ulp(theirs, dtype)).max())


def essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a transformers config changes the logits, in one form whatever version wrote it; reals as float32."""
    decoder = decoder_of(config, "config.json")
    found = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_size,
        "vocab_size": decoder.vocabulary,
        "activation": decoder.activation,
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "rms_norm_eps": decoder.epsilon,
        "attention scale": decoder.scale,
        "attn_logit_softcapping": decoder.softcap,
        "final_logit_softcapping": decoder.logit_softcap,
        "windows": [layer.window for layer in decoder.layers],
        "rotary positions": [layer.rope for layer in decoder.layers],
    }
    for kind, rope in decoder.ropes.items():
        where = "rope" if kind == FULL else f"rope.{kind}"
        found |= {f"{where}.{key}": value for key, value in rope.parameters().items()}
    return {key: _float32(value) for key, value in found.items()}


def _float32(value: Any) -> Any:
    if isinstance(value, list):
        return [_float32(part) for part in value]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(float(value), dtype=torch.float32).item() if number else value


def _config_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    a, b = essentials(mine), essentials(theirs)
    return tuple(f"{key}: {a.get(key)} instead of {b.get(key)}" for key in sorted(a | b) if a.get(key) != b.get(key))
