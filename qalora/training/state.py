"""Checkpoints of a training run: what is needed to continue to the very same weights, in safetensors and JSON.

state.json         {"version": 2, "step", "losses", "held_out", "run"}
                   run: options, and digests of data and model; a checkpoint of another run is refused
state-STEP.safetensors
                   <module>.a, .b             the adapter after that step
                   <module>.a.mean, .a.square, .b.mean, .b.square     AdamW's moments

The order of the data follows from the seed and the step, so there is no other state. A checkpoint is replaced in one
moment, when a new state.json takes the place of the old one: whenever a run is killed, or the disk is full, the folder
holds a whole checkpoint, the old or the new.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora.errors import FormatError, InputError, OutputError, shown
from qalora.formats.files import InputFile
from qalora.formats.json_text import read_json
from qalora.formats.output import new_file, new_folder, remove_left, write_json
from qalora.formats.record_json import decode, encode
from qalora.formats.safetensors import SafetensorsWriter, plan_layout, read_header, read_tensor
from qalora.training.layer import FoldedLinear

__all__ = [
    "State",
    "check_state",
    "checkpoint_of",
    "fingerprint",
    "forget_state",
    "has_state",
    "layer_digest",
    "read_ranks",
    "read_state",
    "write_state",
]

VERSION = 2
RECORD = "state.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HIGHEST_RANK = 1 << 20
"""A checkpoint with a higher one is none of ours."""

STATE_FILES = re.compile(r"state\.json|state-\d+\.safetensors|\.state\S+\.(\d+|partial|lock)")
"""What a checkpoint's folder holds, the last where a run was killed while it wrote."""

MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}


@dataclass(slots=True, kw_only=True)
class State:
    """Where a run is: steps done, the training loss of each, and (step, held-out loss) pairs."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Record:
    """state.json."""

    version: Any
    step: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    run: Mapping[str, Any]


def checkpoint_of(out: Path) -> Path:
    """Where the checkpoint of a run that writes `out` lies: beside it."""
    return out.parent / f"{out.name}.checkpoint"


def check_state(out: Path, *, force: bool) -> None:
    """OutputError where a checkpoint of `out` would replace another run's, unless `force`, or what is no checkpoint."""
    place = checkpoint_of(out)
    if has_state(out) and not force:
        raise OutputError(
            f"{place} holds the checkpoint of an earlier run", todo="`resume` goes on with it, `force` starts anew"
        )
    if place.is_symlink() or (place.exists() and not _is_ours(place)):
        raise OutputError(
            f"{place}, where checkpoints go, exists and is no checkpoint",
            todo="move it, choose another output, or `save_every` 0",
        )


def has_state(out: Path) -> bool:
    """Whether there is a checkpoint of `out`."""
    return (checkpoint_of(out) / RECORD).is_file()


def _is_ours(place: Path) -> bool:
    """Whether it is a checkpoint's folder: one with a record, or with nothing but what a killed run may have left."""
    if place.is_symlink() or not place.is_dir():
        return False
    names = {path.name for path in place.iterdir()}
    return RECORD in names or all(map(STATE_FILES.fullmatch, names))


def write_state(
    out: Path, state: State, run: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Replace the checkpoint of `out`; the earlier one stays until the new one is whole, and where this fails.

    Raises OutputError with the room that it takes.
    """
    tensors = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, word in MOMENTS.items():
            tensors[f"{name}.{word}"] = optimizer.state[parameter][key].cpu()
    layout = plan_layout([(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()], {})
    record = {"version": VERSION, **encode(state), "run": dict(run)}

    def write(weights: Path) -> None:
        with SafetensorsWriter(weights, layout) as file:
            for name, value in tensors.items():
                file.write(name, value)

    place = checkpoint_of(out)
    try:
        if _is_ours(place):
            _replace(place, state.step, write, record)
        else:
            with new_folder(place, force=True, names=[RECORD]) as folder:
                write(folder / _weights(state.step))
                write_json(folder / RECORD, record)
    except OutputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = error.__cause__.strerror or str(error.__cause__)
        if error.__cause__.errno not in NO_ROOM:
            raise OutputError(f"{place}: {reason}") from error
        raise OutputError(f"{place}", expected=f"room for {layout.size} bytes", got=reason) from error


def _weights(step: int) -> str:
    return f"state-{step}.safetensors"


def _replace(place: Path, step: int, write: Callable[[Path], None], record: Mapping[str, Any]) -> None:
    """Put the files of a new checkpoint beside the old one's, then let state.json name them, then remove the others."""
    weights = place / _weights(step)
    known = weights.exists()
    with new_file(weights, force=True) as path:
        write(path)
    try:
        with new_file(place / RECORD, force=True) as path:
            write_json(path, record)
    except BaseException:
        if not known:
            weights.unlink(missing_ok=True)
        raise
    _remove_others(place, weights.name)


def _remove_others(place: Path, weights: str) -> None:
    """Remove the old checkpoint's weights, and what a run left that was killed while it wrote."""
    for other in place.iterdir():
        if other.name not in (weights, RECORD) and STATE_FILES.fullmatch(other.name):
            other.unlink(missing_ok=True)


def forget_state(out: Path) -> None:
    """Remove the checkpoint of `out`, and what runs that were killed while they wrote a first one left beside it.

    A folder of that name that is not a checkpoint's, and other files in it, stay.
    """
    place = checkpoint_of(out)
    if place.is_dir() and not place.is_symlink():
        for path in place.iterdir():
            if STATE_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            place.rmdir()
    remove_left(place)


def read_ranks(out: Path, run: Mapping[str, Any], modules: Sequence[str]) -> dict[str, int]:
    """The rank of each module in the checkpoint of `out`. Raises as `read_state` does."""
    folder = checkpoint_of(out)
    step = _state(folder, run)
    header = read_header(folder / _weights(step.step))
    ranks = {}
    for module in modules:
        entry = header.entries.get(f"{module}.a")
        if entry is None or len(entry.shape) != 2 or not 1 <= entry.shape[0] <= HIGHEST_RANK:
            got = "no tensor" if entry is None else f"shape {list(entry.shape)}"
            raise FormatError(f"{folder}: {module}.a", expected="shape [rank, in/pool_size]", got=got)
        ranks[module] = entry.shape[0]
    return ranks


def read_state(
    out: Path, run: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> State:
    """Put a checkpoint into parameters and optimizer. InputError where there is none, or it is of another run."""
    folder = checkpoint_of(out)
    state = _state(folder, run)
    _load(folder / _weights(state.step), parameters, optimizer, state.step)
    return state


def _state(folder: Path, run: Mapping[str, Any]) -> State:
    """Where the run is; InputError for another run's."""
    stored, state = _record(folder)
    expected = {"version": VERSION, **run}
    for key in sorted({*stored, *expected}, key=lambda key: (key != "version", key)):
        if stored.get(key) != expected.get(key):
            raise InputError(
                f"{folder}: {key}",
                expected=shown(expected.get(key)),
                got=shown(stored.get(key)),
                todo="it is another run's; start anew with `force` in place of `resume`",
            )
    return state


def _record(folder: Path) -> tuple[dict[str, Any], State]:
    """What the run was, with the version, and where it is."""
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder}", expected="a checkpoint to resume", got="none", todo="start without `resume`")
    record = decode(_Record, read_json(folder / RECORD, 64 << 20, strict=True), str(folder / RECORD))
    state = State(step=record.step, losses=list(record.losses), held_out=list(record.held_out))
    return {**record.run, "version": record.version}, state


@torch.no_grad()
def _load(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    header = read_header(path)
    with InputFile(path) as file:

        def fetch(name: str, like: Tensor) -> Tensor:
            entry = header.entries.get(name)
            if entry is None or entry.dtype != like.dtype or entry.shape != tuple(like.shape):
                got = "no tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                raise FormatError(f"{path}: {name}", expected=f"{like.dtype} {list(like.shape)}", got=got)
            return read_tensor(file, entry).to(like.device)

        for name, parameter in parameters.items():
            parameter.copy_(fetch(name, parameter))
            moments = {key: fetch(f"{name}.{word}", parameter) for key, word in MOMENTS.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}


def layer_digest(layer: FoldedLinear) -> bytes:
    """SHA-256 of a layer's scales and minima."""
    digest = hashlib.sha256()
    for value in (layer.scale, layer.minimum):
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.digest()


def fingerprint(config: Mapping[str, Any], module: nn.Module, layers: Mapping[str, bytes]) -> str:
    """SHA-256 of the config, of the digest of every quantized layer, and of norms and biases: what tells one base from
    another.

    layers  `layer_digest` of each, by its module path
    """
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode("utf-8"))
    for path, part in module.named_modules():
        digests = [layers[path]] if path in layers else []
        vectors = (parameter.detach() for parameter in part.parameters(recurse=False) if parameter.ndim == 1)
        for data in [*digests, *(vector.contiguous().cpu().numpy().tobytes() for vector in vectors)]:
            digest.update(path.encode("utf-8"))
            digest.update(data)
    return digest.hexdigest()
