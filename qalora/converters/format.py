"""What a format is: a record that its folder makes. What treats formats alike reads it, and asks none for its name.

A format has a line in `qalora.options.words.TARGETS`, with the module whose FORMAT is the record. What is read and not
written has one in SOURCES, with the module whose LAYOUT is the record.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint, Wrapper
from qalora.converters.plan import ExportOptions, Plan, Progress
from qalora.converters.wrapping import CARRIED, text_alone
from qalora.errors import FormatError, shown
from qalora.formats.safetensors import read_header
from qalora.formats.share import Share

__all__ = [
    "EXACT",
    "Format",
    "Layout",
    "LoraContent",
    "LoraFile",
    "Pushed",
    "Released",
    "Rounding",
    "exact",
    "for_the_whole",
    "late",
    "plain_name",
    "quantized_by",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What a runtime's kernels round beside float32's own summation.

    kind   "none"
           "weights": scale * (codes - zero) to float16 (GPTQ kernels)
           "lora": the same, and the LoRA beside, its input, and both its products to float16 (PEFT gives a LoRA the
           dtype of the layer below, whose scales are float16)
           "q8": the input to int8 in blocks of 32 columns, d = max|x|/127 in float16, and, where minima are stored,
           their factor d * sum(q) in float16 (llama.cpp's Q8_0 and Q8_1)
           "int8": the input to int8 in blocks of a group, d in float32 (MatMulNBits at accuracy level 4)
           "float16" or "bfloat16": input, weight and output to that dtype
    zeros  which integer zeros "weights", "lora" and "int8" subtract where the weight's are real: see
           `qalora.residual.to_residual`
    head   whether the weight of the output layer goes to float16 in "weights" and "lora" too
    """

    kind: Literal["none", "weights", "lora", "q8", "int8", "float16", "bfloat16"] = "none"
    zeros: Literal["nearest", "symmetric"] = "nearest"
    head: bool = False


EXACT = Rounding()


def late(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is called: to know a format, its code need not be there."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return call


def exact(path: Path) -> Rounding:
    """The rounding of kernels that compute in float32 with the numbers as they are stored."""
    return EXACT


def quantized_by(method: str) -> Callable[[Path, Mapping[str, Any]], bool]:
    """Recognises a folder by quantization_config.quant_method in its config.json."""

    def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == method

    return recognises


def _safetensors(folder: Path) -> Iterable[Path]:
    return folder.glob("*.safetensors")


def _metadata(path: Path) -> Mapping[str, Any] | None:
    return read_header(path).metadata if path.suffix == ".safetensors" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraContent:
    """What a file of an adapter holds: each module's rank, matrices by names for people, and what it says of itself."""

    ranks: tuple[int, ...]
    parameters: int
    matrices: Iterator[tuple[str, Tensor]]
    base: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """An adapter as a file that a format's runtime applies beside a model: an ordinary LoRA.

    name     as `qalora.options.words.LORA_FILES` has it; kind: as people call it, "a GGUF LoRA"
    suffix   what the name of such a file ends with
    holds    whether a path is such a file
    write    writes an adapter, of a model where one is given; gives the modules whose A is rounded by that
    content  what a file holds; FormatError for what is none
    by_base  whether names and the order of rows are the model's, which is needed to write and to read then
    read     opens one of a model
    """

    name: str
    kind: str
    suffix: str
    holds: Callable[[Path], bool]
    write: Callable[[Adapter, Checkpoint | None, Path], tuple[str, ...]]
    content: Callable[[Path], LoraContent]
    by_base: bool = False
    read: Callable[[Path, Checkpoint], Adapter] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What can be read.

    name       as reports and `Checkpoint.layout` have it; kind: as people call it
    read       opens a path that is recognised
    read_as    the same for a folder whose label of its zeros is wrong, with the right one (CheckpointFormat)
    by_files   recognises a file or folder by itself
    by_config  recognises a folder by its config.json, where no layout did by files
    end        what the names of tensors of integers end with, and unannounced: what to do where config.json is silent
    artifacts  the files of a folder that are models of their own, each to be proven
    lora       the file of an adapter for one of these; among artifacts it is for the one beside it
    weights    the files that hold an artefact's weights
    sources    the files that are read where one file is opened
    called     what of an artefact's path its name is made of
    runtimes   what an artefact is proven in, as `qalora.parity.runtimes.RUNTIMES` has them; also: where there is a
               device for it, or the artefact is small; generators: they generate from it too, and are used where they
               are installed; nothing is unproven without them
    rounding   what the kernels of these round, for an artefact's path; `exact` where it is nothing
    residual   whether a weight may be codes and a residual in float, which are compared as their sum
    ends       whose rule says where generation ends: see `qalora.converters.ends`
    tokenizer  whether the tokenizer is in the file itself
    findings   what `inspect` warns of in it alone
    suffixes   what the names of files of weights end with
    metadata_of  the metadata in a file of its folder, where PROVENANCE is; None for a file that has no place for it
    memory     bytes that a runtime takes for a byte of weights on disk, for a path; 0 where it maps the file
    """

    name: str
    kind: str
    read: Callable[[Path], Checkpoint]
    runtimes: tuple[str, ...]
    rounding: Callable[[Path], Rounding]
    read_as: Callable[[Path, str], Checkpoint] | None = None
    by_files: Callable[[Path], bool] | None = None
    by_config: Callable[[Path, Mapping[str, Any]], bool] | None = None
    end: str = ""
    unannounced: str = "its quantization_config is missing: take config.json from where the model came from"
    artifacts: Callable[[Path], Sequence[Path]] = lambda folder: ()
    lora: LoraFile | None = None
    weights: Callable[[Path], Iterable[Path]] = _safetensors
    sources: Callable[[Path], Iterable[Path]] = lambda path: [path]
    called: Callable[[Path], Path] = lambda path: path
    also: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    residual: bool = False
    ends: Literal["transformers", "mlx-lm", "llama.cpp", "onnxruntime-genai"] = "transformers"
    tokenizer: bool = False
    findings: Callable[[Checkpoint], Iterable[Any]] = lambda model: ()
    suffixes: tuple[str, ...] = (".safetensors",)
    metadata_of: Callable[[Path], Mapping[str, Any] | None] = _metadata
    memory: Callable[[Path], float] = lambda path: 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What a release says of one format: its model's name, the files of the format's folder, the tensors' carriers."""

    model: str
    files: tuple[str, ...]
    carriers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A format's folder in a repository of the Hub: its files, and `fetch`, the command that brings it to `local`."""

    repo: str
    local: str
    fetch: str
    files: tuple[str, ...]


def for_the_whole(text: str, told: Iterable[str]) -> str:
    """Text that opens a model in transformers, with the class of models of text and images where carriers, or the names
    of files, tell that it is one.
    """
    sees = any(word.endswith(CARRIED) or word.endswith("processor_config.json") for word in told)
    return text.replace("AutoModelForCausalLM", "AutoModelForImageTextToText") if sees else text


class Writer(Protocol):
    """Writes the planned files into an empty folder, a layer at a time."""

    def __call__(self, plan: Any, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
        """plan: what the format's own `plan` gave. share: what of the folder is written here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format(Layout):
    """What can be written too.

    runs      what runs it, for the heading of a model card
    plan      decides everything; raises InputError for what cannot be. Reads config and specs, and values where it must
    write     writes what was planned
    ships     whether an adapter is to lie beside this model rather than be folded into it
    slots     whether it has slots for a LoRA at run time (ExportOptions.lora_slots)
    usage     the text of a card that tries it, in the release's folder; see `qalora.releasing.usage`
    openings  what opens it on the Hub: commands, or lines of Python
    library   the Hub's word for the library that opens it, or None
    packages  what brings top-level modules, beside those that every format needs, that decide the bytes written
    carries   whether the whole of a model of text and images is written, or its decoder alone
    without   what a user should know where it is not, as the end of a sentence that says so
    """

    runs: str
    plan: Callable[[Checkpoint, ExportOptions], Plan]
    write: Writer
    usage: Callable[[Released], str]
    openings: Callable[[Pushed], Sequence[str]]
    ships: Callable[[Checkpoint, ExportOptions], bool] = lambda model, options: False
    slots: bool = False
    library: str | None = None
    packages: tuple[str, ...] = ()
    carries: Callable[[Wrapper], bool] = lambda wrapper: False
    without: Callable[[Wrapper], str] = lambda wrapper: ""

    def source(self, model: Checkpoint) -> Checkpoint:
        """What is written of a model: all of it, or, with a note, its decoder alone."""
        if model.wrapper is None or self.carries(model.wrapper):
            return model
        return text_alone(model, self.name, self.without(model.wrapper))


def plain_name(name: str) -> str:
    """A name that goes into a block of code: letters, digits and - _ . + alone."""
    if not name or len(name) > 255 or not all(char.isalnum() or char in "-_.+" for char in name):
        raise FormatError("manifest.json: a name in it", expected="letters, digits and - _ . +", got=shown(name))
    return name
