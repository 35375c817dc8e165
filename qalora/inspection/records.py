"""What an inspection gives, as dataclasses and as JSON. The JSON is stable: keys are added, never renamed.

A model:

    {"kind": "model", "path", "layout": "huggingface" | "qalora" | "gptq" | "gguf" | "onnx" | ...,
     "family": config's model_type, "layers": int, "tied": bool,
     "weights": int, "bytes": int, "bits_per_weight": float,     of the files that hold weights
     "tensors": [{"count", "weights", "dtype": "float32" | null, "bits" | null, "group_size" | null,
                  "zeros": "integer" | "real" | null, "act_order": bool}],     one for each kind, commonest first
     "codes": {"scales": [[exponent, count], ...], "zero_scales": int, "negative_scales": int,
               "zero_points": [lowest, highest] | null} | null,    null without integers, and where values were not read
     "ends": {"tokens": [{"id": int, "text": str | null}], "source": str} | null,
     "files": [str], "notes": [str], "warnings": [...]}

    ends    the tokens that end a generation, and what names them; null where that is no token
    codes   of the linear layers; scales: how many |scale| lie in 2**exponent <= |scale| < 2**(exponent + 1)

An adapter:

    {"kind": "adapter", "path", "layout": "peft" | "gguf-lora" | "onnx-adapter",
     "convention": "paper" | "official" | "peft" | null, "minima": "float16" | "float32" | null, "use_qalora": bool,
     "base": str | null, "parameters": int, "bytes": int,
     "layers": [{"count", "rank", "pool_size" | null}], "notes": [str], "warnings": [...]}

A folder of several artefacts: {"kind": "folder", "path", "artifacts": [models and adapters]}

A warning: {"code": one of WARNINGS, "message": str, "evidence": str, "todo": str}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "WARNINGS",
    "AdapterReport",
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

    counts: tuple[tuple[int, int], ...]
    zero: int
    negative: int
    zero_points: tuple[float, float] | None

    def lines(self, width: int = 40) -> list[str]:
        """A bar for each exponent."""
        most = max((count for _, count in self.counts), default=1)
        lines = [f"2^{e:<4} {'█' * max(1, round(width * n / most)):<{width}} {n:,}" for e, n in self.counts]
        return [*lines, *([f"0      {self.zero:,}"] if self.zero else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """What ends a generation: (id, text) of each token, and what names them."""

    tokens: tuple[tuple[int, str | None], ...]
    source: str

    def __str__(self) -> str:
        """In words."""
        listed = [str(n) if text is None else f"{n} {text!r}" for n, text in self.tokens]
        return f"{', '.join(listed) or 'no token'} ({self.source})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """A model or an artefact. `histogram` is None without integers, and where values were not read; `ends` where what
    ends a generation is no token.
    """

    path: Path
    layout: str
    family: str
    layers: int
    tied: bool
    weights: int
    nbytes: int
    tensors: tuple[TensorKind, ...]
    histogram: ScaleHistogram | None
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
        held = self.histogram
        return {
            "kind": "model",
            "path": str(self.path),
            "layout": self.layout,
            "family": self.family,
            "layers": self.layers,
            "tied": self.tied,
            "weights": self.weights,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "tensors": [asdict(kind) for kind in self.tensors],
            "codes": None
            if held is None
            else {
                "scales": [list(pair) for pair in held.counts],
                "zero_scales": held.zero,
                "negative_scales": held.negative,
                "zero_points": None if held.zero_points is None else list(held.zero_points),
            },
            "ends": None
            if self.ends is None
            else {"tokens": [{"id": n, "text": text} for n, text in self.ends.tokens], "source": self.ends.source},
            "files": list(self.files),
            "notes": list(self.notes),
            "warnings": [asdict(finding) for finding in self.warnings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """An adapter. `layers`: how many have which (rank, pool size); a pool size of None is not known."""

    path: Path
    layout: str
    convention: str | None
    minima: str | None
    use_qalora: bool
    base: str | None
    parameters: int
    nbytes: int
    layers: Mapping[tuple[int, int | None], int]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """See the module's docstring."""
        return {
            "kind": "adapter",
            "path": str(self.path),
            "layout": self.layout,
            "convention": self.convention,
            "minima": self.minima,
            "use_qalora": self.use_qalora,
            "base": self.base,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "layers": [
                {"count": count, "rank": rank, "pool_size": pool} for (rank, pool), count in self.layers.items()
            ],
            "notes": list(self.notes),
            "warnings": [asdict(finding) for finding in self.warnings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderReport:
    """A folder that holds several artefacts."""

    path: Path
    artifacts: tuple[ModelReport | AdapterReport, ...]

    def to_json(self) -> dict[str, Any]:
        """See the module's docstring."""
        return {
            "kind": "folder",
            "path": str(self.path),
            "artifacts": [artifact.to_json() for artifact in self.artifacts],
        }


Report = ModelReport | AdapterReport | FolderReport
