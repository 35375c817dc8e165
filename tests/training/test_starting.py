"""Rows and ranks from the first gradient: it is the gradient, they are its main directions, and no ranks keep more."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora
from qalora.adapter import read_adapter
from qalora.checkpoint import Checkpoint
from qalora.errors import InputError
from qalora.folding import prove_fold
from qalora.training import TrainOptions, train
from qalora.training.fast import refresh
from qalora.training.loop import _order, _Run
from qalora.training.plan import data_of, targets_of
from qalora.training.starting import SEQUENCES, allocate, first_rows, principal_rows


def options(text: Path, out: Path, **changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {"max_steps": 6, "rank": 2, "batch_size": 2, "max_length": 32, "held_out": 0.1}
    return TrainOptions(data=str(text), out=out, **{**settings, **changes})


def run_of(base: Checkpoint, chosen: TrainOptions) -> _Run:
    return _Run(base, chosen, targets_of(base, chosen), *data_of(base, chosen))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_loss(base: Checkpoint, text: Path, tmp_path: Path, compute: str) -> None:
    """B's gradient is G @ A^T whatever A is, so A = identity shows G; a backward of the same sequences gives it."""
    chosen = options(text, tmp_path / "a", dtype=compute, batch_size=SEQUENCES)
    run = run_of(base, chosen)
    gathered = run._first_gradients()
    assert all(layer.gathered is None for layer in run._layers.values())
    assert not bool(run._gradients.any())
    other = run_of(base, chosen)
    for layer in other._layers.values():
        layer.start_from(torch.eye(layer.a.shape[1]))
    refresh(other._shared)
    tokens, targets = other._training.take(_order(len(other._training), 0, 0, SEQUENCES))
    (other._loss(tokens, targets, other._dtype) / int((targets >= 0).sum())).backward()
    for path, layer in other._layers.items():
        assert layer.b.grad is not None
        assert torch.equal(gathered[path], layer.b.grad)  # the same product, and another with the identity


def test_a_gradient_that_is_no_number(tmp_path: Path, text: Path) -> None:
    gradient = torch.ones(4, 3)
    gradient[2, 1] = torch.inf
    with pytest.raises(InputError, match="the first gradient of q: expected finite numbers, got NaN or Inf"):
        first_rows({"p": torch.ones(4, 3), "q": gradient}, options(text, tmp_path / "a"), torch.Generator())


def test_principal_rows_keep_most_of_the_gradient() -> None:
    """No other rows do better than the sum of the largest squared singular values, and random ones do worse."""
    rng = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, 12, generator=rng) @ torch.diag(torch.linspace(2, 0.1, 12))
    values, rows = principal_rows(gradient)
    assert rows.shape == (12, 12)
    assert torch.allclose(rows @ rows.t(), torch.eye(12) / 3, atol=12 * 2.0**-23)
    wanted = torch.linalg.svdvals(gradient.double())
    assert torch.allclose(values, wanted, rtol=2.0**-40)

    def kept(a: torch.Tensor) -> float:
        q, _ = torch.linalg.qr(a.double().t())
        return float((gradient.double() @ q).square().sum())

    assert kept(rows[:3]) == pytest.approx(float(wanted[:3].square().sum()), rel=2.0**-20)
    others = [kept(torch.randn(3, 12, generator=rng)) for _ in range(50)]
    assert max(others) < kept(rows[:3])


def test_no_ranks_of_the_budget_keep_more() -> None:
    """Against every choice of ranks, with layers of one shape, where the order is exact."""
    rng = torch.Generator().manual_seed(1)
    shapes = dict.fromkeys("abc", (20, 5))
    values = {name: torch.rand(5, generator=rng).sort(descending=True).values * (n + 1) for n, name in enumerate("abc")}
    budget = 25 * 8 + 11
    found = allocate(values, shapes, budget)
    assert sum(25 * rank for rank in found.values()) <= budget

    def kept(ranks: dict[str, int]) -> float:
        return sum(float(values[name][:rank].square().sum()) for name, rank in ranks.items())

    every = [dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(range(1, 6), repeat=3)]
    assert kept(found) == max(kept(ranks) for ranks in every if sum(ranks.values()) * 25 <= budget)
    with pytest.raises(InputError, match="at least 75, a rank of 1 for each layer, got 74"):
        allocate(values, shapes, 74)


def test_more_rows_than_a_gradient_has_are_uniform() -> None:
    chosen = TrainOptions(data="x", out=Path("x"), rank=8)
    found = first_rows({"w": torch.randn(40, 5)}, chosen, torch.Generator().manual_seed(0))["w"]
    assert found.shape == (8, 5)
    assert int(torch.linalg.matrix_rank(found)) == 5
    assert float(found[5:].abs().max()) <= 5**-0.5


@pytest.mark.parametrize("start", ["gradient", "uniform"])
def test_ranks_of_a_budget(base: Checkpoint, text: Path, tmp_path: Path, start: str) -> None:
    """The adapter keeps to the budget, spends it nearly, differs between layers, folds exactly, and is read by name."""
    plain = train(base, options(text, tmp_path / "plain"))
    budget = sum(layer.a.numel() + layer.b.numel() for layer in plain.layers.values())
    chosen = options(text, tmp_path / "auto", rank="auto", budget=budget, start=start)
    found = train(base, chosen)
    sizes = {path: layer.a.numel() + layer.b.numel() for path, layer in found.layers.items()}
    largest = max(size // found.layers[path].rank for path, size in sizes.items())
    assert budget - largest < sum(sizes.values()) <= budget
    assert len({layer.rank for layer in found.layers.values()}) > 1
    read = read_adapter(tmp_path / "auto")
    assert {path: layer.rank for path, layer in read.layers.items()} == {
        path: layer.rank for path, layer in found.layers.items()
    }
    folded = qalora.fold(base, tmp_path / "auto")
    for path, layer in read.layers.items():
        before, after = (model.tensors[f"{path}.weight"].load_quantized() for model in (base, folded))
        assert prove_fold(before, layer, after).exact


@pytest.mark.parametrize("rank", [2, "auto"])
def test_it_resumes_to_the_same_bits(base: Checkpoint, text: Path, tmp_path: Path, leave: Any, rank: Any) -> None:
    changes = {"rank": rank, "save_every": 2, **({"budget": 4000} if rank == "auto" else {})}
    train(base, options(text, tmp_path / "whole", **changes))
    leave(base, options(text, tmp_path / "cut", **changes), 3)
    train(base, options(text, tmp_path / "cut", resume=True, **changes))
    for name in ("adapter_model.safetensors", "training.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 0}, "rank: expected an integer >= 1, or auto, got 0"),
    "alpha": ({"rank": "auto", "alpha": 8.0}, "`alpha` goes with one rank"),
    "budget alone": ({"budget": 100}, "budget: expected `rank` auto beside it, got rank 2"),
    "no budget": ({"rank": "auto", "budget": 0}, "budget: expected an integer >= 1, got 0"),
    "start": ({"start": "svd"}, "start: expected gradient or uniform, got 'svd'"),
    "small budget": ({"rank": "auto", "budget": 10}, "budget: expected at least .*, a rank of 1 for each layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_leave_nothing(kind: str, base: Checkpoint, text: Path, tmp_path: Path) -> None:
    changes, words = REFUSED[kind]
    with pytest.raises(InputError, match=words):
        train(base, options(text, tmp_path / "adapter", **changes))
    assert not list(tmp_path.iterdir())
