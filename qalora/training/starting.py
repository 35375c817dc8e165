"""Where an adapter starts, and the rank of each layer.

B starts as zeros, so that the model starts as the base, and A decides what the first steps can reach: a step of
gradient descent on B changes B @ A by -rate * G @ A^T @ A, the part of

    G = dL/d(B @ A) = sum over tokens of grad_y^T @ pool(x)      [out, in/pool_size]

that lies in A's rows. `uniform` rows are LoRA's, of mean squared length 1/3. `gradient` rows are the right singular
vectors of G of the largest singular values: of all rows these keep most of it (Eckart and Young), with G summed over
`SEQUENCES` of the first sequences that are trained on. They get the length of uniform rows, so that a learning rate
means the same. The idea is LoRA-GA's (arXiv 2407.05000), which changes the base's weights and starts B as well; a base
of integers stays as it is.

The same singular values say where parameters are worth most. A rank r of a layer keeps the sum of the r largest
squared ones for r * (out + in/pool_size) parameters, so `allocate` takes singular values, of all layers, in the order
of their square per parameter until the budget is spent. As they fall within each layer, no other ranks of the same
number of parameters keep more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qalora.errors import InputError
from qalora.options.train import BUDGET_RANK, TrainOptions
from qalora.training.layer import uniform_rows

__all__ = ["SEQUENCES", "allocate", "first_rows", "parameters_of", "principal_rows"]

SEQUENCES = 8
"""Sequences whose gradient is gathered before the first step."""

ROW = 3.0**-0.5
"""The length of a row that starts uniform in +-1/sqrt(n): the root of its mean square."""


def first_rows(gradients: Mapping[str, Tensor], options: TrainOptions, rng: torch.Generator) -> dict[str, Tensor]:
    """A of each layer, float32 [rank, in/pool_size], as the options want rows and ranks.

    gradients  float32 [out, in/pool_size], of each layer's B @ A

    Rows beyond the smaller of a gradient's sides are uniform. Raises InputError as `allocate` does, and for a gradient
    that is no number somewhere.
    """
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise InputError(
                f"the first gradient of {name}",
                expected="finite numbers",
                got="NaN or Inf",
                todo="look at the base, or train with `dtype` float32",
            )
    principal = {name: principal_rows(gradient) for name, gradient in gradients.items()}
    shapes = {name: (gradient.shape[0], gradient.shape[1]) for name, gradient in gradients.items()}
    ranks = dict.fromkeys(shapes, options.first_rank)
    if options.rank == "auto":
        budget = options.budget or sum(parameters_of(shape, BUDGET_RANK) for shape in shapes.values())
        ranks = allocate({name: values for name, (values, _) in principal.items()}, shapes, budget)
    rows_by_name = {}
    for name, (_, rows) in principal.items():
        rows_by_name[name] = uniform_rows(ranks[name], shapes[name][1], rng)
        if options.start == "gradient":
            rows_by_name[name][: len(rows)] = rows[: ranks[name]]
    return rows_by_name


def principal_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(singular values, float64, falling; right singular vectors of length ROW, float32 [as many, in/pool_size]).

    gradient  float32 [out, in/pool_size]

    As many as the smaller side has. A gradient of zeros has values of zero, and rows all the same.
    """
    _, values, rows = torch.linalg.svd(gradient.double(), full_matrices=False)
    return values, (ROW * rows).float()


def parameters_of(shape: tuple[int, int], rank: int = 1) -> int:
    """Numbers of A and B together, for (out, in/pool_size)."""
    return rank * sum(shape)


def allocate(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """A rank for each layer, at least 1, that together take `budget` parameters at most.

    values  singular values, falling
    shapes  (out, in/pool_size)

    Raises InputError for a budget that does not give every layer a rank of 1.
    """
    ranks = dict.fromkeys(shapes, 1)
    left = budget - sum(parameters_of(shape) for shape in shapes.values())
    if left < 0:
        raise InputError(
            field="budget", expected=f"at least {budget - left}, a rank of 1 for each layer", got=str(budget)
        )
    pieces = [
        (-value * value / parameters_of(shapes[name]), number, name)
        for name, layer_values in values.items()
        for number, value in enumerate(layer_values.tolist()[1:], start=1)
    ]
    for _, number, name in sorted(pieces):
        cost = parameters_of(shapes[name])
        if ranks[name] == number and cost <= left:
            ranks[name] += 1
            left -= cost
    return ranks
