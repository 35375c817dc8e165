"""What the keywords of public functions are tried on, and the list of their effects."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora
from qalora.adapter import Adapter, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.errors import InputError

SUBJECTS = {
    "models": ("load", "quantize", "fold", "save", "inspect"),
    "training": ("train",),
    "exports": ("export", "verify"),
    "releases": ("release", "check", "run"),
}
"""The public functions by the file of tests/public that has their effects."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What effects are tried on; `out` is an empty folder of each effect's own."""

    float_model: Path
    base: Checkpoint
    whole: Checkpoint
    adapter: Adapter
    text: Path
    artifact: Path
    out: Path

    def trained(self, name: str, **options: Any) -> tuple[Adapter, dict[str, Any]]:
        """A run of two steps, and its log."""
        given = {"max_steps": 2, "max_length": 32, "batch_size": 2, "start": "uniform", **options}
        made = qalora.train(self.base, self.text, self.out / name, **given)
        return made, json.loads((self.out / name / "training.json").read_text("utf-8"))

    def verified(self, **options: Any) -> Any:
        given = {"adapter": self.adapter, "max_tokens": 24, "generate": 2, "threads": 1, **options}
        return qalora.verify(self.base, [self.artifact], **given)

    def exported(self, target: str, name: str = "x", model: Checkpoint | None = None, **options: Any) -> Path:
        qalora.export(model or self.base, target, self.out / name, **options)
        return self.out / name / target


def assert_no_engine(call: Callable[..., object]) -> None:
    """An engine that there is not, and a cluster that does not answer, are refused before anything is done."""
    with pytest.raises(InputError, match="engine: expected local or ray, got 'dask'"):
        call(engine="dask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(InputError, match="RAY_ADDRESS: expected host:port of a Ray cluster that answers"):
            call(engine="ray")


class Effects:
    """A proof for each keyword of the functions of a subject; `effects(function, keyword, ...)` takes one."""

    def __init__(self, subject: str) -> None:
        self.functions = SUBJECTS[subject]
        self.proofs: dict[tuple[str, str], Callable[[World], None]] = {}

    def __call__(self, function: str, *names: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
        def put(proof: Callable[[World], None]) -> Callable[[World], None]:
            for name in names:
                assert (function, name) not in self.proofs
                self.proofs[function, name] = proof
            return proof

        return put

    def missing(self) -> set[tuple[str, str]]:
        """Keywords without an entry, and entries of no keyword."""
        sources = {name: inspect.signature(getattr(qalora, name)).parameters for name in self.functions}
        return {(name, key) for name, keys in sources.items() for key in keys} ^ set(self.proofs)

    def parametrized(self) -> Any:
        """`proof`, each in turn."""

        def name_of(proof: Callable[[World], None]) -> str:
            return "-".join(name for (_, name), one in self.proofs.items() if one is proof)[:60]

        return pytest.mark.parametrize("proof", dict.fromkeys(self.proofs.values()), ids=name_of)


def unlike(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether a linear weight of two models differs."""
    return any(not torch.equal(one.tensors[name].load_float(), two.tensors[name].load_float()) for name in one.linears)


def same_layers(one: Adapter, two: Adapter) -> bool:
    return one.layers.keys() == two.layers.keys() and all(
        torch.equal(layer.a, two.layers[path].a) and torch.equal(layer.b, two.layers[path].b)
        for path, layer in one.layers.items()
    )


def spec_of(model: Checkpoint) -> Any:
    return model.tensors[model.linears[0]].spec


def unrecorded(world: World) -> Path:
    """An adapter's folder that does not say what its scaling means."""
    write_adapter(world.adapter, world.out / "foreign")
    (world.out / "foreign" / "qalora_adapter.json").unlink()
    return world.out / "foreign"
