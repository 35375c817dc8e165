"""What a writer is going to do: for each tensor its carrier, exact or by how much not, its bytes and offset.

A plan is made, shown and checked before the first byte is written. What a carrier cannot hold exactly is a `Loss` with
a name; `Plan.check` refuses it unless that name was allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qalora.errors import ExactnessError, InputError
from qalora.formats.safetensors import SHARD_SIZE

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint

__all__ = ["CHOICES", "LOSSES", "PROVENANCE", "ExportOptions", "Loss", "Plan", "PlannedTensor", "Progress", "Target"]

PROVENANCE = "qalora.provenance."
"""What the keys of `ExportOptions.provenance` begin with; a reader of ours ignores them."""

LOSSES: dict[str, str] = {
    "zeros": "real zero points rounded to integers; on SmolLM2 half of the adapter is lost",
    "minima": "float32 minima rounded to float16, half an ULP",
    "scales": "float32 scales rounded to float16, half an ULP",
    "eight-bit": "re-encoded in 8 bits with the best multiplier per group; about 3 % of the adapter is lost",
    "residual": "what integer zero points leave over rounded to float32, half an ULP of it",
    "narrowing": "a float tensor stored in a narrower float type",
}
"""The losses that a user can allow by name, and what each means."""

CHOICES: dict[str, tuple[str, ...]] = {
    "gptq_form": ("auto", "nearest", "eight-bit", "round"),
    "gguf_form": ("auto", "wide"),
    "onnx_embedding": ("float32", "quantized"),
}
"""The options of an export that are words, and the words there are."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its bytes once it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss that a carrier brings: its name in LOSSES, and its size in words."""

    name: str
    size: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor as it is going to be written. `name` is the model's; `carrier` the format's word for the storage."""

    name: str
    carrier: str
    file: str
    offset: int
    nbytes: int
    loss: Loss | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a writer needs beside the model. Targets add fields of their own in a subclass.

    target   the format's name in the registry
    tensors  in the order in which they are written
    files    every file of the folder with its exact size, or None where only writing it tells
    notes    what the user should know
    longest  tokens up to which the format's runtime computes what the model does; None: as far as the model reaches
    """

    target: str
    tensors: tuple[PlannedTensor, ...]
    files: Mapping[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    longest: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(size for size in self.files.values() if size is not None)

    def check(self, allowed: Collection[str]) -> None:
        """Raise ExactnessError for the first loss that is not allowed, with the number of tensors that have it."""
        lossy = [tensor for tensor in self.tensors if tensor.loss is not None and tensor.loss.name not in allowed]
        if lossy and lossy[0].loss is not None:
            loss = lossy[0].loss
            count = sum(1 for tensor in lossy if tensor.loss is not None and tensor.loss.name == loss.name)
            raise ExactnessError(
                f"{self.target}: {lossy[0].name} ({count} tensors like it)",
                expected="a carrier that holds it exactly",
                got=f"{lossy[0].carrier}: {loss.size}",
                todo=f"choose another target, or accept it with --allow-loss {loss.name}",
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON: target, bytes, files, notes, and a row for each tensor."""
        return {
            "target": self.target,
            "bytes": self.nbytes,
            "files": dict(self.files),
            "notes": list(self.notes),
            "longest": self.longest,
            "tensors": [
                {
                    "name": tensor.name,
                    "carrier": tensor.carrier,
                    "file": tensor.file,
                    "offset": tensor.offset,
                    "bytes": tensor.nbytes,
                    "loss": None if tensor.loss is None else {"name": tensor.loss.name, "size": tensor.loss.size},
                }
                for tensor in self.tensors
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What a user may choose for an export. Each target reads what concerns it; all of it is checked here, InputError.

    name            the model's name in file names and metadata; the source's own by default
    allow_loss      names of LOSSES
    gptq_form       "auto" (own zeros where integer, else symmetric zeros + residual), "nearest" (nearest zeros +
                    residual), "eight-bit" or "round"
    gguf_form       "auto" (the type of the codes' width) or "wide" (integer zeros at up to 6 bits exactly, in Q8_0)
    accuracy_level  ONNX: 0..4, MatMulNBits' attribute; 4 computes with int8 activations
    onnx_embedding  ONNX: "float32", or "quantized": codes of the embedding, shared with a tied output, in the graph
                    for ONNX Runtime; a third of its bytes at 8 bits, a faster step and slower prompts
    lora_slots      ONNX: modules whose products take a LoRA at run time, an .onnx_adapter file
    max_shard_size  safetensors: bytes of tensors above which a model is split into several files
    split_max_size  GGUF: bytes of tensors above which the file is split, as gguf-split does; None never splits
    adapter         an adapter to ship beside the base instead of folding it (targets that say they can)
    provenance      what the files say of where they come from: GGUF keys, safetensors and ONNX metadata, all strings
    """

    name: str | None = None
    allow_loss: frozenset[str] = frozenset()
    gptq_form: str = "auto"
    gguf_form: str = "auto"
    accuracy_level: int = 0
    onnx_embedding: str = "float32"
    lora_slots: frozenset[str] = frozenset()
    max_shard_size: int = SHARD_SIZE
    split_max_size: int | None = None
    adapter: Adapter | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("allow_loss", "lora_slots"):
            given: Collection[str] = getattr(self, key)
            object.__setattr__(self, key, frozenset([given] if isinstance(given, str) else given))
        unknown = sorted(self.allow_loss - set(LOSSES))
        if unknown:
            raise InputError("allow-loss", expected=f"one of {', '.join(LOSSES)}", got=repr(unknown[0]))
        for key, words in CHOICES.items():
            if getattr(self, key) not in words:
                known = f"one of {', '.join(words)}" if len(words) > 2 else " or ".join(words)
                raise InputError(f"--{key.replace('_', '-')}", expected=known, got=repr(getattr(self, key)))
        if not 0 <= self.accuracy_level <= 4:
            raise InputError("--accuracy-level", expected="0..4", got=str(self.accuracy_level))
        for key in ("max_shard_size", "split_max_size"):
            size = getattr(self, key)
            if size is not None and size < 1:
                raise InputError(f"--{key.replace('_', '-')}", expected="at least a byte", got=str(size))


class Target(Protocol):
    """A module that writes a format: the registry in `qalora.converters` holds one for each name."""

    def plan(self, model: Checkpoint, options: ExportOptions) -> Plan:
        """Decide everything; raise InputError for what cannot be. Reads config and specs, and values where it must."""

    def write(self, plan: Plan, model: Checkpoint, folder: Path, progress: Progress) -> None:
        """Write the planned files into an empty folder, a layer at a time."""
