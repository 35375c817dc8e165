"""Artefacts: recognised by what they are, never by what they are called; opened with the reader of their format.

A folder that holds several (`gptq/`, `gguf/`, `mlx/`, `onnx/` and, in that, `portable/`) stands for all of them. A GGUF
file with a GGUF LoRA in the same folder is one artefact: the base, and the adapter beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.errors import InputError
from qalora.formats.around import instead_of_model
from qalora.formats.files import InputFile
from qalora.formats.gguf_split import part_number, split_files
from qalora.formats.onnx import read_model

__all__ = [
    "GENERATORS",
    "RUNTIMES",
    "Artifact",
    "accuracy_level",
    "has_head_in_words",
    "is_symmetric",
    "may_run",
    "memory_needed",
    "open_artifact",
    "recognize",
    "reference_artifact",
    "runtimes_of",
]

RUNTIMES: dict[str, tuple[str, ...]] = {
    "gptq": ("gptqmodel",),
    "gguf": ("llama.cpp",),
    "onnx": ("onnxruntime",),
    "mlx": ("mlx",),
    "hqq": ("hqq",),
    "qalora": ("torch",),
    "huggingface": ("transformers",),
}
"""The runtimes that an artefact of each kind is proven in, as `qalora.parity.runtimes.open_runtime` knows them."""

GENERATORS: dict[str, tuple[str, ...]] = {"onnx": ("onnxruntime-genai",)}
"""Runtimes that generate from a kind too, and are used where they are installed; nothing is unproven without them."""

_CUDA, _SLOW = "onnxruntime-cuda", "onnx.reference"
ALSO: dict[str, tuple[str, ...]] = {"onnx": (_CUDA, _SLOW)}
"""Runtimes that an artefact of a kind is proven in too, where there is a device for it, or where it is small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One artefact.

    name  as the report calls it
    kind  a key of RUNTIMES
    path  the folder, or the file of a GGUF or ONNX model
    lora  the GGUF LoRA beside it, or None
    """

    name: str
    kind: str
    path: Path
    lora: Path | None = None


def recognize(paths: Sequence[Path], relative_to: Path | None = None) -> list[Artifact]:
    """Every artefact that the paths stand for, in their order; InputError for a path that stands for none.

    Names are relative to `relative_to`, or begin with the last part of the path.
    """
    found: list[Artifact] = []
    for path in paths:
        here = _artifacts(path)
        if not here:
            wanted = "a GGUF or ONNX file, a model folder, or a folder of them"
            raise InputError(str(path), expected=wanted, got=instead_of_model(path))
        for kind, place in here:
            found.append(Artifact(name=_name(place, path, relative_to), kind=kind, path=place))
    return _distinct(_paired(found))


def _paired(found: Sequence[Artifact]) -> list[Artifact]:
    """GGUF LoRAs put beside the one model of their folder; InputError for one that has none, or several."""
    from qalora.converters.gguf.lora import is_lora

    loras = [artifact.path for artifact in found if artifact.kind == "gguf" and is_lora(artifact.path)]
    kept = [artifact for artifact in found if artifact.path not in loras]
    for lora in loras:
        beside = [n for n, other in enumerate(kept) if other.kind == "gguf" and other.path.parent == lora.parent]
        if len(beside) != 1 or kept[beside[0]].lora is not None:
            raise InputError(f"{lora} is a LoRA", expected="one GGUF model, and one LoRA, in its folder", got="others")
        kept[beside[0]] = replace(kept[beside[0]], lora=lora)
    return kept


def _artifacts(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        if path.suffix == ".onnx":
            return [("onnx", path)]
        with InputFile(path) as file:
            return [("gguf", path)] if file.read(0, min(4, file.size)) == b"GGUF" else []
    if not path.is_dir():
        return []
    if (path / "model.onnx").is_file():
        portable = path / "portable" / "model.onnx"
        return [("onnx", path / "model.onnx"), *([("onnx", portable)] if portable.is_file() else [])]
    if (path / "config.json").is_file():
        return [(_folder_kind(path), path)]
    files = sorted(file for file in path.glob("*.gguf") if file.is_file() and part_number(file) == 1)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    inner = [found for folder in folders for found in _artifacts(folder)] if not files else []
    return [("gguf", file) for file in files] + inner


def _folder_kind(path: Path) -> str:
    from qalora.converters.huggingface import quant_method

    method = quant_method(path)
    return method if method in RUNTIMES else "huggingface"


def _name(place: Path, given: Path, relative_to: Path | None) -> str:
    where = place.parent if place.name == "model.onnx" else place
    if relative_to is not None and where.resolve().is_relative_to(relative_to.resolve()):
        return where.resolve().relative_to(relative_to.resolve()).as_posix()
    root = given.resolve().parent if given.is_file() else given.resolve()
    if where.resolve() == root:
        return root.name
    return (Path(root.name) / where.resolve().relative_to(root)).as_posix() if root.name else where.name


def _distinct(found: list[Artifact]) -> list[Artifact]:
    names: dict[str, int] = {}
    distinct = []
    for artifact in found:
        count = names[artifact.name] = names.get(artifact.name, 0) + 1
        name = artifact.name if count == 1 else f"{artifact.name} ({count})"
        distinct.append(replace(artifact, name=name))
    return distinct


def reference_artifact(model: Checkpoint) -> Artifact | None:
    """The file or folder that holds just this model, where a runtime opens it by code that is not ours; else None."""
    if not model.as_stored or model.beside is not None:  # a runtime would take the adapter too
        return None
    (kind, path), *_ = _artifacts(model.path)
    return None if kind == "qalora" else Artifact(name="reference", kind=kind, path=path)


def open_artifact(artifact: Artifact) -> Checkpoint:
    """Read an artefact back, lazily."""
    if artifact.kind == "onnx":
        from qalora.converters.onnx.reader import read as read_onnx

        return read_onnx(artifact.path)
    from qalora.converters import load

    return load(artifact.path)


def runtimes_of(artifact: Artifact) -> tuple[str, ...]:
    """The runtimes that an artefact is proven in: those of its kind, CUDA where there is a device, and, for a small
    graph of standard operators, onnx.reference.
    """
    from qalora.parity.runtimes.onnx_reference import LARGEST

    also = [kind for kind in ALSO.get(artifact.kind, ()) if kind != _CUDA or _has_cuda()]
    if _SLOW in also and not (_weight_bytes(artifact) <= LARGEST and _is_standard(artifact.path)):
        also.remove(_SLOW)
    return (*RUNTIMES[artifact.kind], *also)


def may_run(kind: str) -> tuple[str, ...]:
    """Every runtime that an artefact of a kind may be run in here, whatever it is like; none of a kind that is none."""
    also = [one for one in ALSO.get(kind, ()) if one != _CUDA or _has_cuda()]
    return (*RUNTIMES.get(kind, ()), *also, *GENERATORS.get(kind, ()))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_standard(path: Path) -> bool:
    """Whether a graph has standard operators only, and functions of its own that are made of them."""
    graph = read_model(path)
    own = {function.domain for function in graph.functions}
    return all(opset.domain in own | {"", "ai.onnx"} for opset in graph.opset_import)


def _weight_bytes(artifact: Artifact) -> int:
    """Bytes of an artefact's weights on disk."""
    path = artifact.path
    if artifact.kind == "gguf":
        return sum(file.stat().st_size for file in split_files(path) if file.is_file())
    files = path.parent.glob(f"{path.name}*") if artifact.kind == "onnx" else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files if file.is_file())


def memory_needed(artifact: Artifact, kind: str) -> int:
    """About how many bytes a runtime takes for an artefact's weights; 0 where it maps the file and reads as it goes.

    torch holds them dequantized, in float32: at least 8 times the bytes of 4-bit codes; so does transformers: twice
    those of 16-bit floats.
    """
    if kind == "llama.cpp":
        return 0
    size = _weight_bytes(artifact)
    if kind == "transformers":
        return 2 * size
    return 8 * size if kind == "torch" and artifact.kind == "qalora" else size


def accuracy_level(path: Path) -> int:
    """The highest accuracy_level of a graph's MatMulNBits nodes, 0 where there are none; 4 has int8 activations."""
    graph = read_model(path)
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    levels = [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"]
    return max(levels, default=0)


def has_head_in_words(folder: Path) -> bool:
    """Whether a GPTQ folder's output layer is in words."""
    from qalora.converters.huggingface import stored_tensors

    return "lm_head.qweight" in stored_tensors(folder)


def is_symmetric(folder: Path) -> bool:
    """Whether a GPTQ folder says that its zeros are the middle everywhere."""
    from qalora.converters.huggingface import read_config

    return bool((read_config(folder).get("quantization_config") or {}).get("sym"))
