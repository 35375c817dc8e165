"""Training: every keyword does what it says, one effect for each, and none without."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora
from public_world import Effects, World, same_layers
from qalora.adapter import read_adapter
from qalora.errors import InputError, OutputError
from qalora.training import TrainOptions
from qalora.training import train as train_model
from qalora.training.layer import FoldedLinear

effect = Effects("training")


# train


@effect("train", "model", "data", "out")
def _(world: World) -> None:
    made, _ = world.trained("a")
    assert same_layers(made, read_adapter(world.out / "a", world.base))
    with pytest.raises(InputError, match="no such file"):
        qalora.train(world.base, world.out / "none.txt", world.out / "b")


@effect("train", "rank", "alpha")
def _(world: World) -> None:
    made, _ = world.trained("a", rank=3, alpha=6.0)
    assert {(layer.rank, layer.factor) for layer in made.layers.values()} == {(3, 2.0)}


@effect("train", "budget")
def _(world: World) -> None:
    made, _ = world.trained("a", rank="auto", budget=1200, start="gradient")
    assert sum(layer.a.numel() + layer.b.numel() for layer in made.layers.values()) <= 1200


@effect("train", "convention", "pool_size", "target_modules")
def _(world: World) -> None:
    made, _ = world.trained("a", convention="official", pool_size=16, target_modules=("q_proj", "mlp.up_proj"))
    assert made.convention == "official"
    assert {layer.pool_size for layer in made.layers.values()} == {16}
    assert {path.rpartition(".")[2] for path in made.layers} == {"q_proj", "up_proj"}


@effect("train", "minima")
def _(world: World) -> None:
    assert world.trained("a", minima="float32")[0].minima == "float32"


DECIDE: Sequence[tuple[str, Any]] = (
    ("start", "gradient"),
    ("max_steps", 3),
    ("batch_size", 1),
    ("gradient_accumulation_steps", 2),
    ("max_length", 48),
    ("learning_rate", 1e-2),
    ("warmup", 0.9),
    ("weight_decay", 0.9),
    ("max_gradient_norm", 1e-3),
    ("held_out", 0.5),
    ("strength", 0.5),
    ("seed", 7),
    ("dtype", "bfloat16"),
)
"""Options that another value of makes another adapter, and the value."""


@effect("train", *(name for name, _ in DECIDE))
def _(world: World) -> None:
    usual, log = world.trained("usual", max_steps=4, learning_rate=3e-3)
    for name, value in DECIDE:
        made, other = world.trained(name, **{"max_steps": 4, "learning_rate": 3e-3, name: value})
        assert not same_layers(made, usual), name
        assert other["options"][name] == value != log["options"][name], name


@effect("train", "evaluate_every")
def _(world: World) -> None:
    assert [one["step"] for one in world.trained("a", max_steps=3)[1]["held_out"]] == [0, 3]
    assert [one["step"] for one in world.trained("b", max_steps=3, evaluate_every=1)[1]["held_out"]] == [0, 1, 2, 3]


@effect("train", "device")
def _(world: World) -> None:
    assert world.trained("a", device="cpu")[1]["options"]["device"] == "cpu"
    with pytest.raises(InputError, match="abacus"):
        world.trained("b", device="abacus")


@effect("train", "weights")
def _(world: World) -> None:
    """Weights are made once or at each use; in bfloat16 to the same bits, and in float32 the folded ones themselves."""
    kept, made = {}, {}
    for dtype in ("bfloat16", "float32"):
        for weights in ("kept", "packed"):
            settings: dict[str, Any] = {"max_steps": 2, "max_length": 32, "dtype": dtype, "weights": weights}
            chosen = TrainOptions(data=str(world.text), out=world.out / f"{weights}-{dtype}", **settings)
            seen: set[str] = set()
            gc.collect()
            others = {id(one) for one in gc.get_objects() if type(one) is FoldedLinear}

            def look(report: object, seen: set[str] = seen, others: set[int] = others) -> None:
                layers = [one for one in gc.get_objects() if type(one) is FoldedLinear and id(one) not in others]
                found = [one.shared for one in layers]
                seen |= {"folded" if one is None else "packed" if one._kept is None else "kept" for one in found}

            made[dtype, weights] = train_model(world.base, chosen, look)
            kept[dtype, weights] = seen
            gc.collect()
    assert kept["bfloat16", "kept"] == {"kept"}
    assert kept["bfloat16", "packed"] == {"packed"}
    assert kept["float32", "kept"] == {"kept"}
    assert kept["float32", "packed"] == {"folded"}
    assert same_layers(made["bfloat16", "kept"], made["bfloat16", "packed"])


@effect("train", "gradient_checkpointing")
def _(world: World) -> None:
    """Less is kept for the backward; the adapter is the same to the bit."""
    held, made = {}, {}
    for flag in (False, True):
        count = [0]

        def pack(value: torch.Tensor, count: list[int] = count) -> torch.Tensor:
            count[0] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            made[flag], _ = world.trained(str(flag), gradient_checkpointing=flag)
        held[flag] = count[0]
    assert same_layers(made[False], made[True])
    assert held[True] != held[False]


@effect("train", "shard")
def _(world: World) -> None:
    """tests/training/test_distributed.py has what it does with several processes."""
    with pytest.raises(InputError, match="expected several processes, to spread the base over, got one"):
        world.trained("a", shard=True)


def left(world: World, name: str, **options: Any) -> Path:
    """A run that was left after its second step; gives its output."""

    def stop(report: Any) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    out = world.out / name
    chosen = TrainOptions(data=str(world.text), out=out, max_steps=3, max_length=32, batch_size=2, **options)
    with pytest.raises(KeyboardInterrupt):
        train_model(world.base, chosen, stop)
    return out


@effect("train", "save_every", "resume", "force")
def _(world: World) -> None:
    settings = {"max_steps": 3, "start": "gradient"}
    whole, _ = world.trained("whole", **settings)
    assert not (left(world, "none", save_every=0).parent / "none.checkpoint").exists()
    assert (left(world, "a", save_every=1).parent / "a.checkpoint").exists()
    with pytest.raises(InputError, match="resume"):
        world.trained("a", **settings)
    assert same_layers(world.trained("a", resume=True, **settings)[0], whole)
    with pytest.raises(OutputError, match="exists already"):
        world.trained("a", **settings)
    assert same_layers(world.trained("a", force=True, **settings)[0], whole)


@effect("train", "progress")
def _(world: World) -> None:
    seen: list[int] = []
    world.trained("a", progress=lambda report: seen.append(report.step) if report.step else None)
    assert seen == [1, 2]


# all of them


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's dynamic INT8
@effect.parametrized()
def test_a_keyword_does_what_it_says(proof: Callable[[World], None], world: World) -> None:
    proof(world)


def test_every_keyword_has_an_effect_here() -> None:
    assert not effect.missing()
