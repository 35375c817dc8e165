"""Artefacts: recognised by what they are, never by what they are called; opened with the reader of their format.

A folder that holds several (`gptq/`, `gguf/`, `mlx/`, `onnx/` and, in that, `portable/`) stands for all of them. A GGUF
file with a GGUF LoRA in the same folder is one artefact: the base, and the adapter beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters import by_config, layout, layouts, load
from qalora.converters.format import Layout
from qalora.errors import InputError
from qalora.formats.around import instead_of_model
from qalora.parity.runtimes import RUNTIMES

__all__ = [
    "Artifact",
    "may_run",
    "memory_needed",
    "open_artifact",
    "recognize",
    "reference_artifact",
    "runtimes_of",
    "takes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One artefact.

    name  as the report calls it
    kind  the name of its layout
    path  the folder, or the file of a GGUF or ONNX model
    lora  the GGUF LoRA beside it, or None
    """

    name: str
    kind: str
    path: Path
    lora: Path | None = None

    @property
    def layout(self) -> Layout:
        """What is so of every artefact of its kind."""
        return layout(self.kind)


def recognize(paths: Sequence[Path], relative_to: Path | None = None) -> list[Artifact]:
    """Every artefact that the paths stand for, in their order; InputError for a path that stands for none.

    Names are relative to `relative_to`, or begin with the last part of the path.
    """
    artifacts: list[Artifact] = []
    for path in paths:
        here = _artifacts(path)
        if not here:
            expected = "a GGUF or ONNX file, a model folder, or a folder of them"
            raise InputError(str(path), expected=expected, got=instead_of_model(path))
        for kind, place in here:
            called = layout(kind).called(place)
            artifacts.append(Artifact(name=_name(called, path, relative_to), kind=kind, path=place))
    return _distinct(_paired(artifacts))


def _paired(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """LoRAs put beside the one model of their kind and folder; InputError for one that has none, or several."""
    loras = [one for one in artifacts if one.layout.lora is not None and one.layout.lora.holds(one.path)]
    models = [artifact for artifact in artifacts if artifact not in loras]
    for lora in loras:
        beside = [
            n for n, other in enumerate(models) if other.kind == lora.kind and other.path.parent == lora.path.parent
        ]
        if len(beside) != 1 or models[beside[0]].lora is not None:
            expected = f"one {lora.layout.kind} model, and one LoRA, in its folder"
            got = f"{len(beside)} models" if len(beside) != 1 else "a second LoRA"
            raise InputError(f"{lora.path} is a LoRA", expected=expected, got=got)
        models[beside[0]] = replace(models[beside[0]], lora=lora.path)
    return models


def _artifacts(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [(one.name, path) for one in layouts() if one.by_files is not None and one.by_files(path)][:1]
    if not path.is_dir():
        return []
    files = [(one.name, file) for one in layouts() for file in one.artifacts(path)]
    if files:
        return files
    if (path / "config.json").is_file():
        return [(by_config(path).name, path)]
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return [pair for folder in folders for pair in _artifacts(folder)]


def _name(where: Path, path: Path, relative_to: Path | None) -> str:
    if relative_to is not None and where.resolve().is_relative_to(relative_to.resolve()):
        return where.resolve().relative_to(relative_to.resolve()).as_posix()
    root = path.resolve().parent if path.is_file() else path.resolve()
    if where.resolve() == root:
        return root.name
    return (Path(root.name) / where.resolve().relative_to(root)).as_posix() if root.name else where.name


def _distinct(artifacts: list[Artifact]) -> list[Artifact]:
    names: dict[str, int] = {}
    distinct = []
    for artifact in artifacts:
        count = names[artifact.name] = names.get(artifact.name, 0) + 1
        name = artifact.name if count == 1 else f"{artifact.name} ({count})"
        distinct.append(replace(artifact, name=name))
    return distinct


def reference_artifact(model: Checkpoint) -> Artifact | None:
    """The file or folder that holds just this model, where a runtime opens it by code that is not ours; else None."""
    if not model.as_stored or model.beside is not None:  # a runtime would take the adapter too
        return None
    (kind, path), *_ = _artifacts(model.path)
    artifact = Artifact(name="reference", kind=kind, path=path)
    return None if artifact.layout.runtimes[0] == "torch" else artifact


def open_artifact(artifact: Artifact) -> Checkpoint:
    """Read an artefact back, lazily."""
    return load(artifact.path)


def runtimes_of(artifact: Artifact) -> tuple[str, ...]:
    """The runtimes that an artefact is proven in: those of its kind, CUDA where there is a device, and, for a small
    graph of standard operators, onnx.reference.
    """
    return (*artifact.layout.runtimes, *(one for one in _also(artifact.layout) if takes(one, artifact)))


def may_run(kind: str) -> tuple[str, ...]:
    """Every runtime that an artefact of a kind may be run in here, whatever it is like; none of a kind that is none."""
    known_layout = next((one for one in layouts() if one.name == kind), None)
    return () if known_layout is None else (*known_layout.runtimes, *_also(known_layout), *known_layout.generators)


def _also(known_layout: Layout) -> list[str]:
    return [one for one in known_layout.also if not RUNTIMES[one].cuda or _has_cuda()]


def takes(kind: str, artifact: Artifact) -> bool:
    """Whether a runtime takes an artefact, as far as it asks."""
    parts = RUNTIMES[kind]
    return not parts.picky or bool(import_module(parts.module).takes(artifact.path, _weight_bytes(artifact)))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _weight_bytes(artifact: Artifact) -> int:
    """Bytes of an artefact's weights on disk."""
    return sum(file.stat().st_size for file in artifact.layout.weights(artifact.path) if file.is_file())


def memory_needed(artifact: Artifact) -> int:
    """About how many bytes a runtime takes for an artefact's weights; 0 where it maps the file and reads as it goes."""
    return math.ceil(artifact.layout.memory(artifact.path) * _weight_bytes(artifact))
