"""Checkpoints of a training run: what is needed to continue to the very same weights, in safetensors and JSON.

state.safetensors  <module>.a, .b             the adapter
                   <module>.a.mean, .a.square, .b.mean, .b.square     AdamW's moments
state.json         {"version": 1, "step", "losses", "held_out", "run"}
                   run: options, and digests of data and model; a checkpoint of another run is refused

The order of the data follows from the seed and the step, so there is no other state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.errors import FormatError, InputError
from qalora.formats.files import InputFile, read_limited
from qalora.formats.output import new_folder, write_json
from qalora.formats.safetensors import SafetensorsWriter, plan_layout, read_header, read_tensor

__all__ = ["State", "checkpoint_of", "read_state", "write_state"]

VERSION = 1
WEIGHTS = "state.safetensors"
RECORD = "state.json"
MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}


@dataclass(slots=True, kw_only=True)
class State:
    """Where a run is: steps done, the training loss of each, and (step, held-out loss) pairs."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


def checkpoint_of(out: Path) -> Path:
    """Where the checkpoint of a run that writes `out` lies: beside it."""
    return out.parent / f"{out.name}.checkpoint"


def write_state(
    out: Path, state: State, run: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Replace the checkpoint of `out`; the earlier one stays until the new one is whole."""
    tensors = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, word in MOMENTS.items():
            tensors[f"{name}.{word}"] = optimizer.state[parameter][key].cpu()
    layout = plan_layout([(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()], {})
    with new_folder(checkpoint_of(out), force=True, names=[RECORD]) as folder:
        with SafetensorsWriter(folder / WEIGHTS, layout) as file:
            for name, value in tensors.items():
                file.write(name, value)
        write_json(
            folder / RECORD,
            {
                "version": VERSION,
                "step": state.step,
                "losses": state.losses,
                "held_out": [list(pair) for pair in state.held_out],
                "run": dict(run),
            },
        )


def read_state(
    out: Path, run: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> State:
    """Put a checkpoint into parameters and optimizer. InputError where there is none, or it is of another run."""
    folder = checkpoint_of(out)
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder}", expected="a checkpoint to resume", got="none", todo="start without --resume")
    try:
        record = json.loads(read_limited(folder / RECORD, 64 << 20).decode("utf-8"))
        state = State(
            step=int(record["step"]),
            losses=[float(loss) for loss in record["losses"]],
            held_out=[(int(step), float(loss)) for step, loss in record["held_out"]],
        )
        same = record["version"] == VERSION
        found: dict[str, Any] = dict(record["run"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{folder / RECORD}", expected="a training state", got=type(error).__name__) from error
    differing = [key for key in sorted({*found, *run}) if found.get(key) != run.get(key)]
    if differing or not same:
        what = "version" if not same else differing[0]
        got, wanted = found.get(what), run.get(what)
        raise InputError(
            f"{folder}: {what}",
            expected=repr(wanted),
            got=repr(got),
            todo="it is another run's; start without --resume",
        )
    _load(folder / WEIGHTS, parameters, optimizer, state.step)
    return state


@torch.no_grad()
def _load(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    header = read_header(path)
    with InputFile(path) as file:

        def fetch(name: str, like: Tensor) -> Tensor:
            entry = header.entries.get(name)
            if entry is None or entry.dtype != like.dtype or entry.shape != tuple(like.shape):
                raise FormatError(f"{path}: {name}", expected=f"{like.dtype} {list(like.shape)}", got="none or another")
            return read_tensor(file, entry).to(like.device)

        for name, parameter in parameters.items():
            parameter.copy_(fetch(name, parameter))
            moments = {key: fetch(f"{name}.{word}", parameter) for key, word in MOMENTS.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
