"""What a writer is going to do: for each tensor its carrier, exact or by how much not, its bytes and offset.

A plan is made, shown and checked before the first byte is written. What a carrier cannot hold exactly is a `Loss` with
a name; `Plan.check` refuses it unless that name was allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qalora.errors import ExactnessError
from qalora.formats.output import Progress
from qalora.formats.record_json import encode
from qalora.options.export import Writing
from qalora.options.words import LOSSES

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.converters.device_load import DeviceLoad

__all__ = ["LOSSES", "PROVENANCE", "ExportOptions", "Loss", "Plan", "PlannedTensor", "Progress"]

PROVENANCE = "qalora.provenance."
"""What the keys of `ExportOptions.provenance` begin with; a reader of ours ignores them."""


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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """Everything a writer needs beside the model. Targets add fields of their own in a subclass.

    target   the format's name in the registry
    tensors  in the order in which they are written
    files    every file of the folder with its exact size, or None where only writing it tells
    notes    what the user should know
    longest  tokens up to which the format's runtime computes what the model does; None: as far as the model reaches
    device_load   what a device loads of it; None in a plan that was made for no model (`qalora.converters.device_load`)
    """

    target: str
    tensors: tuple[PlannedTensor, ...]
    files: Mapping[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    longest: int | None = None
    device_load: DeviceLoad | None = None

    def __repr__(self) -> str:
        """In a line: what is written, and how much."""
        return f"Plan({self.target}, {len(self.tensors)} tensors, {self.nbytes:,} bytes)"

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
                todo=f"choose another target, or accept it: `allow_loss` {loss.name}",
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON: target, bytes, files, notes, what a device loads, and a row for each tensor."""
        return {
            "target": self.target,
            "bytes": self.nbytes,
            "files": dict(self.files),
            "notes": list(self.notes),
            "longest": self.longest,
            "device_load": encode(self.device_load),
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
class ExportOptions(Writing):
    """What a user may choose for an export. Each target reads what concerns it; all of it is checked here, InputError.

    gptq_form       "auto" (own zeros where integer, else symmetric zeros + residual), "nearest" (nearest zeros +
                    residual), "eight-bit" or "round"
    gguf_form       "auto" (the type of the codes' width) or "wide" (integer zeros at up to 6 bits exactly, in Q8_0)
    onnx_embedding  "auto" (codes of the embedding, shared with a tied output, where the base has them; a third of its
                    bytes at 8 bits), "float32" or "quantized" (codes, or an error)
    onnx_graphs     "both", "fast" or "portable"
    openvino_precision  "float32", or "fast": what OpenVINO does by itself
    lora_slots      ONNX: modules whose products take a LoRA at run time, an .onnx_adapter file
    adapter         an adapter to ship beside the base instead of folding it (targets that say they can)
    provenance      what the files say of where they come from: GGUF keys, safetensors and ONNX metadata, all strings
    """

    lora_slots: frozenset[str] = field(default=frozenset())
    adapter: Adapter | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots: Collection[str] = self.lora_slots
        object.__setattr__(self, "lora_slots", frozenset([slots] if isinstance(slots, str) else slots))
        super(ExportOptions, self).__post_init__()
