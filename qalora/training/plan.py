"""What a run would train, and on what: asked before anything is trained, and by what only plans."""

from __future__ import annotations

import torch

from qalora.adapter import Adapter, AdapterLayer
from qalora.checkpoint import Checkpoint
from qalora.errors import InputError, shown
from qalora.options.train import TrainOptions
from qalora.training.data import Blocks, training_blocks
from qalora.training.documents import Account
from qalora.training.layer import folded_size

__all__ = ["data_of", "planned_data", "targets_of", "untrained"]


def untrained(model: Checkpoint, options: TrainOptions) -> Adapter:
    """An adapter of the form that `train` gives, which adds nothing: to plan with. Raises as `train` does."""
    layers = {}
    for path in sorted(targets_of(model, options)):
        lazy = model.tensors[f"{path}.weight"]
        pool = options.pool_size or (1 if lazy.spec is None else lazy.spec.group_size)
        layers[path] = AdapterLayer(
            a=torch.zeros(options.first_rank, lazy.shape[1] // pool),
            b=torch.zeros(lazy.shape[0], options.first_rank),
            pool_size=pool,
            scaling=options.scaling,
            factor=options.scaling,
        )
    return Adapter(layers=layers, convention="paper", minima=options.minima)


def planned_data(model: Checkpoint, options: TrainOptions) -> Account:
    """What `train` would learn; raises as it does where model or data are not as they should be."""
    targets_of(model, options)
    return data_of(model, options)[0].account


def targets_of(model: Checkpoint, options: TrainOptions) -> frozenset[str]:
    """The modules to train. InputError for a model or target modules that are not as `train` says."""
    specs = {name.removesuffix(".weight"): model.tensors[name].spec for name in model.linears}
    if not any(specs.values()):
        raise InputError(
            f"{model.path} holds no integers, and QA-LoRA is trained on integer weights",
            todo=f"quantize it first: qalora quantize {model.path} -o DIR",
        )
    targets = {
        module
        for module, spec in specs.items()
        if spec is not None
        and (not options.target_modules or any(f".{module}".endswith(f".{end}") for end in options.target_modules))
    }
    unmatched = [end for end in options.target_modules if not any(f".{path}".endswith(f".{end}") for path in targets)]
    if unmatched:
        kinds = sorted({module.rpartition(".")[2] for module in specs})
        raise InputError(field="target_modules", expected=f"some of {', '.join(kinds)}", got=shown(unmatched[0]))
    for module, spec in sorted(specs.items()):
        if spec is not None and spec.act_order:
            raise InputError(
                f"{module} was quantized with act-order: its groups are not runs of columns, and an adapter over them "
                "cannot be folded",
                todo="quantize without act-order",
            )
        if spec is not None and module in targets and options.pool_size is not None:
            columns = model.tensors[f"{module}.weight"].shape[1]
            folded_size(module, columns, spec.group_size, options.pool_size)
    return frozenset(targets)


def data_of(model: Checkpoint, options: TrainOptions) -> tuple[Blocks, Blocks]:
    """The sequences that are trained on, and those that are held out. Raises as `qalora.training.data` does."""
    return training_blocks(model, options.data, options.max_length, options.held_out)
