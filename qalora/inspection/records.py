"""What an inspection gives, as dataclasses and as JSON. The JSON is stable: keys are added, never renamed.

Its keys are the fields, by these names where they have others: `bytes` for nbytes, and `codes` for the histogram, whose
`scales` are pairs [exponent, count], how many |scale| lie in 2**exponent <= |scale| < 2**(exponent + 1), beside
`zero_scales` and `negative_scales`. A model has `bits_per_weight` too; an adapter's `layers` are objects of `count`,
`rank` and `pool_size`. `kind` is "model", "adapter" or "folder", and `tensors` has one row for each kind of tensor, the
commonest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from qalora.converters.device_load import DeviceLoad
from qalora.formats.record_json import Key, encode

__all__ = [
    "WARNINGS",
    "AdapterReport",
    "EndToken",
    "EndTokens",
    "Finding",
    "FolderReport",
    "ModelReport",
    "Report",
    "ScaleHistogram",
    "TensorKind",
]

WARNINGS: dict[str, str] = {
    "zeros-label": "a label of the zero points that their values contradict",
    "zeros-mixed": "layers that store their zero points in two ways",
    "zeros-off-by-one": "codes that lie a whole step beside their zero points, in nearly every layer",
    "zeros-wrap": "zero points that version 1 cannot store, and that loaders read differently",
    "symmetry-label": "a `sym` that the zero points contradict",
    "act-order": "groups that are not runs of columns",
    "not-finite": "NaN or Inf",
    "all-zero": "a layer of zeros",
    "unreadable": "a tensor that is not what its format says",
    "runtime": "a runtime that computes something else from these files, or does not take them",
    "residual-beside": "half of the model lies in a LoRA beside it",
    "no-tokenizer": "no tokenizer",
    "no-chat-template": "no chat template",
    "end-token": "an end of generation that is no token of the model",
    "qalora-ignored": "use_qalora is set, and A's shape is that of an ordinary LoRA",
    "ordinary-lora": "an adapter that no minima can take up",
    "convention-unknown": "an adapter that does not say what its scaling means",
    "pool-unknown": "an adapter that does not say how many columns it pools",
    "pool-mismatch": "a pool that is no multiple of the base's groups",
    "float-base": "a base without integers",
    "other-base": "an adapter of another model",
}
"""Every code that a warning may have, and what it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A warning: its code in WARNINGS, what it means for the user, what was seen, and what to do."""

    code: str
    message: str
    evidence: str
    todo: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorKind:
    """Tensors of one kind: how many, and how many weights they hold; a float dtype, or bits, groups and zeros."""

    count: int
    weights: int
    dtype: str | None = None
    bits: int | None = None
    group_size: int | None = None
    zeros: str | None = None
    act_order: bool = False

    def __str__(self) -> str:
        """In words."""
        if self.dtype is not None:
            return f"{self.count} x {self.dtype}"
        order = ", act-order" if self.act_order else ""
        return f"{self.count} x {self.bits} bits in groups of {self.group_size}, {self.zeros} zero points{order}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleHistogram:
    """The scales and zero points of the quantized linear layers.

    counts       (e, how many |scale| lie in 2**e <= |scale| < 2**(e+1)), e ascending
    zero         scales that are 0: a constant group
    negative     scales below 0
    zero_points  the lowest and the highest -min/scale; None where every scale is 0
    """

    counts: Annotated[tuple[tuple[int, int], ...], Key("scales")]
    zero: Annotated[int, Key("zero_scales")]
    negative: Annotated[int, Key("negative_scales")]
    zero_points: tuple[float, float] | None

    def lines(self, width: int = 40) -> list[str]:
        """A bar for each exponent."""
        most = max((count for _, count in self.counts), default=1)
        lines = [f"2^{e:<4} {'█' * max(1, round(width * n / most)):<{width}} {n:,}" for e, n in self.counts]
        return [*lines, *([f"0      {self.zero:,}"] if self.zero else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToken:
    """A token that ends a generation. text: None where the tokenizer has none for it."""

    id: int
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """What ends a generation, and what names these tokens."""

    tokens: tuple[EndToken, ...]
    source: str

    def __str__(self) -> str:
        """In words."""
        listed = [str(one.id) if one.text is None else f"{one.id} {one.text!r}" for one in self.tokens]
        return f"{', '.join(listed) or 'no token'} ({self.source})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """A model or an artefact. `histogram` is None without integers, and where values were not read; `ends` where what
    ends a generation is no token; `device_load` where the reader of its layout does not tell what its tensors take.
    """

    kind: Literal["model"] = "model"
    path: Path
    layout: str
    family: str
    layers: int
    tied: bool
    weights: int
    nbytes: Annotated[int, Key("bytes")]
    device_load: DeviceLoad | None
    tensors: tuple[TensorKind, ...]
    histogram: Annotated[ScaleHistogram | None, Key("codes")]
    ends: EndTokens | None
    files: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, everything included."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """See the module's docstring."""
        return {**encode(self), "bits_per_weight": round(self.bits_per_weight, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """An adapter. `layers`: how many have which (rank, pool size); a pool size of None is not known."""

    kind: Literal["adapter"] = "adapter"
    path: Path
    layout: str
    convention: str | None
    minima: str | None
    use_qalora: bool
    base: str | None
    parameters: int
    nbytes: Annotated[int, Key("bytes")]
    layers: Mapping[tuple[int, int | None], int]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """See the module's docstring."""
        rows = [{"count": count, "rank": rank, "pool_size": pool} for (rank, pool), count in self.layers.items()]
        return {**encode(self), "layers": rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderReport:
    """A folder that holds several artefacts."""

    kind: Literal["folder"] = "folder"
    path: Path
    artifacts: tuple[ModelReport | AdapterReport, ...]

    def to_json(self) -> dict[str, Any]:
        """See the module's docstring."""
        return {**encode(self), "artifacts": [artifact.to_json() for artifact in self.artifacts]}


Report = ModelReport | AdapterReport | FolderReport
