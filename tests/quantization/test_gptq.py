"""GPTQ against a slow obvious loop; what it promises; and that it beats rounding on the inputs it was given."""

import pytest
import torch
from torch import Tensor

from forks import Forks
from qalora.errors import InputError
from qalora.quantization import METHODS, ZEROS, QuantizeOptions, quantize_weight
from qalora.quantization.gptq import GptqOptions, damped, gptq_tensor, output_error
from qalora.quantization.grid import Grid, search
from qalora.quantization.refining import _descended, _fitted, _Minima
from qalora.quantization.rounding import to_float16
from qalora.quantization.searching import ALTERNATING, QUICK
from qalora.tensor import BITS, holds_float16, integer_zeros

TIES = 2
"""Rows that may differ from a loop in float64: a tie that float32 lets fall the other way changes the columns after it.
The noise is some 1e-6 of weights of 0.05, steps are 4e-4 or more: hardly one row in a test; of 1,152 none did.
"""


def layer(out: int = 24, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the moments of inputs that depend on one another."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=rng) * torch.logspace(0, -2, columns)[:, None]
    x = torch.randn(2000, columns, generator=rng) @ mixing + 0.3
    return torch.randn(out, columns, generator=rng) * 0.05, x.t() @ x / len(x)


def slow_gptq(w: Tensor, h: Tensor, bits: int, size: int, order: list[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal brain quantization with the inverse of H of the columns that are left, taken anew for each column."""
    w, h = w.double().clone(), damped(h, 0.01)
    top = (1 << bits) - 1
    codes = torch.zeros(w.shape)
    groups = w.shape[1] // size
    scale, minimum = torch.zeros(len(w), groups), torch.zeros(len(w), groups)
    if order is not None:
        moments = h.diagonal().float().view(groups, size)
        grid = search(w.float().view(len(w), groups, size), top, "real", QUICK, moments)
        scale, minimum = grid.scale, grid.min
    left = list(range(w.shape[1])) if order is None else list(order)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        i, g = left[0], left[0] // size
        if order is None and i % size == 0:
            within = torch.linalg.inv(h[left][:, left])
            importance = []
            for _ in range(size):  # 1 / the variance that each column adds, given those after it
                importance.append(1 / within[0, 0])
                within = (within - torch.outer(within[:, 0], within[0]) / within[0, 0])[1:, 1:]
            grid = search(
                w[:, i : i + size].float()[:, None], top, "real", QUICK, torch.stack(importance).float()[None]
            )
            scale[:, g], minimum[:, g] = grid.scale[:, 0], grid.min[:, 0]
        safe = torch.where(scale[:, g] == 0, torch.inf, scale[:, g])
        codes[:, i] = ((w[:, i] - minimum[:, g]) / safe).round().clamp(0, top)
        error = w[:, i] - (scale[:, g] * codes[:, i] + minimum[:, g])
        w[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
        left = left[1:]
    return codes.to(torch.uint8), scale, minimum


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 16), (4, 96), (8, 48)])
def test_it_is_what_the_slow_loop_gives(bits: int, size: int, act_order: bool) -> None:
    w, h = layer()
    order = torch.argsort(h.diagonal(), descending=True, stable=True).tolist() if act_order else None
    codes, scale, minimum = slow_gptq(w, h, bits, size, order)
    got = gptq_tensor(w, h, bits=bits, group_size=size, options=GptqOptions(act_order=act_order))
    same = (got.codes() == codes).all(dim=1) & (got.scale == scale).all(dim=1) & (got.min == minimum).all(dim=1)
    assert int((~same).sum()) <= TIES


def test_columns_beyond_a_block_are_corrected_too() -> None:
    w, h = layer(columns=288)
    codes, *_ = slow_gptq(w[:4], h, 4, 32, None)
    same = gptq_tensor(w[:4], h, bits=4, group_size=32).codes() == codes
    assert float(same.float().mean()) > 0.99


MEASURED = """
import re, sys, torch
from pathlib import Path
from qalora.quantization.gptq import GptqOptions, gptq_tensor
columns, passes, act_order = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
x = torch.randn(64, columns)
h, w = x.t() @ x / 64, torch.randn(2, columns)
def run(h, w):
    gptq_tensor(w, h, bits=4, group_size=32, options=GptqOptions(passes=passes, act_order=act_order))
run(h[:512, :512].contiguous(), w[:, :512])  # what the first call brings
def peak():  # not ru_maxrss, in which the process that started this one counts
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
before = peak()
run(h, w)
print(peak() - before)
"""


@pytest.mark.parametrize(("passes", "act_order", "most"), [(0, False, 1.5), (1, False, 2.0), (0, True, 2.0)])
def test_one_matrix_of_float64_is_held(light_forks: Forks, passes: int, act_order: bool, most: float) -> None:
    """Beside H: H damped, which becomes its own factor, and that in float32; with passes H damped in float32 as well;
    in another order, H damped while it is put in that order, rows then columns. `most` is in matrices of float64
    [in, in]; 24 MiB are for the linear algebra's own buffers, which a large matrix needs no more of.
    """
    done = light_forks.run("-c", MEASURED, 2048, passes, act_order)
    assert done.returncode == 0, done.stderr
    got = int(done.stdout)
    matrix = 8 * 2048**2
    assert matrix <= got <= most * matrix + (24 << 20)


MANY_GROUPS = """
import torch
from qalora.quantization.gptq import GptqOptions, gptq_tensor, output_error
torch.set_num_threads(2)
rng = torch.Generator().manual_seed(0)
x = torch.randn(64, 2048, generator=rng)
h, w = x.t() @ x / 64, torch.randn(8, 2048, generator=rng)
errors = []
for passes in (0, 1):
    tensor = gptq_tensor(w, h, bits=3, group_size=16, options=GptqOptions(passes=passes))
    errors.append(output_error(w, tensor.dequantize(), h))
print(errors[1] < errors[0])
"""


def test_rows_of_many_groups_on_two_threads(light_forks: Forks) -> None:
    """torch.linalg.solve of many matrices of some 190 rows and more does not come back from MKL where there are two
    threads: a layer of 4096 inputs in groups of 32 was never done.
    """
    done = light_forks.run("-c", MANY_GROUPS, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_is_better_on_the_inputs(bits: int) -> None:
    w, h = layer()
    errors = []
    for settings in (
        {"method": "rtn"},
        {"method": "clip"},
        {"method": "hqq"},
        {"method": "gptq", "passes": 0},
        {"method": "gptq", "passes": 1},
        {"method": "gptq", "passes": 4},
    ):
        tensor = quantize_weight(w, QuantizeOptions(bits=bits, **settings), h)  # type: ignore[arg-type]
        errors.append(output_error(w, tensor.dequantize(), h))
    assert errors[3:] == sorted(errors[3:], reverse=True)
    assert errors[3] < 0.6 * min(errors[:3])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rtn"])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", BITS)
def test_the_spec_is_kept(bits: int, zeros: str, method: str) -> None:
    w, h = layer(out=5)
    options = QuantizeOptions(bits=bits, zeros=zeros, method=method)  # type: ignore[arg-type]
    tensor, spec = quantize_weight(w, options, h), options.spec(96)
    assert (tensor.bits, tensor.group_size) == (spec.bits, spec.group_size)
    assert holds_float16(tensor.scale)
    assert spec.min_dtype == torch.float32 or holds_float16(tensor.min)
    whole = integer_zeros(tensor)
    assert (whole is not None) == (spec.zeros == "integer")
    if spec.zero is not None and whole is not None:
        assert bool((whole == spec.zero).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zeros", ZEROS)
def test_hard_groups_and_dead_inputs(method: str, zeros: str) -> None:
    w, h = layer(out=5, columns=64)
    w[0], w[1], w[2], w[3, ::2] = 0, 0.75, -3e-9, 1e-9
    h[3], h[:, 3] = 0, 0
    for moments in (h, torch.zeros_like(h)):
        options = QuantizeOptions(bits=3, zeros=zeros, method=method)  # type: ignore[arg-type]
        got = quantize_weight(w, options, moments).dequantize()
        assert bool(torch.isfinite(got).all())
        assert torch.equal(got[0], torch.zeros(64))
        if zeros == "real":
            assert float((got[1] - 0.75).abs().max()) < 1e-3


def test_a_descent_leaves_each_column_the_best() -> None:
    """After enough passes on a fixed grid, no single code can be changed for a smaller error."""
    w, h = layer(out=6, columns=32)
    h = damped(h, 0.01).float()
    grid = search(w.view(6, 2, 16), 3, "real", ALTERNATING)
    codes = grid.codes(w.view(6, 2, 16), 3).view(6, 32)
    for _ in range(30):
        codes = _descended(w, codes, grid, h, 3)

    def error(codes: Tensor) -> Tensor:
        left = (w - grid.values(codes.view(6, 2, 16)).view(6, 32)).double()
        return ((left @ h.double()) * left).sum(dim=1)

    best = error(codes)
    for i in range(32):
        for code in range(4):
            other = codes.clone()
            other[:, i] = code
            assert bool((error(other) >= best * (1 - 1e-5)).all())


@pytest.mark.parametrize("zeros", ["real", "integer"])
@pytest.mark.parametrize(("columns", "groups"), [(32, 1), (96, 3), (128, 8)])
def test_a_fit_finds_the_grid_that_a_weight_was_made_with(columns: int, groups: int, zeros: str) -> None:
    """A weight is made of codes and a grid of float16. From another grid, a fit finds that one to the bit: nothing is
    left of least squares, and what float32 and the ridge of 1e-6 leave is far below half an ULP of float16, 2^-12.
    """
    rng, size, out, top = torch.Generator().manual_seed(columns), columns // groups, 12, 7
    _, h = layer(out, columns, seed=columns)
    h.diagonal().add_(h.diagonal().mean())  # so that inputs are no copies of one another
    codes = torch.randint(0, top + 1, (out, columns), generator=rng).float()
    scale = to_float16(torch.rand(out, groups, generator=rng) + 0.5)
    zero = torch.randint(1, top, (out, groups), generator=rng).float()
    real = to_float16(torch.randn(out, groups, generator=rng) - 3 * scale)
    made = Grid(scale=scale, min=-scale * zero if zeros == "integer" else real)
    wrong = to_float16(scale * (1 + 0.2 * torch.rand(out, groups, generator=rng)))
    start = Grid(scale=wrong, min=-wrong * zero if zeros == "integer" else real + 0.1)
    weight = made.values(codes.view(out, groups, size)).view(out, columns)
    minima = _Minima(h, size) if zeros == "real" else None
    found = _fitted(weight, weight @ h, codes, start, h, minima, top)
    assert torch.equal(found.scale, made.scale)
    assert torch.equal(found.min, made.min)


def test_a_grid_is_as_good_as_a_dense_search() -> None:
    w = torch.randn(8, 1, 16, generator=torch.Generator().manual_seed(1))
    found = search(w, 3, "real", ALTERNATING)
    error = (found.values(found.codes(w, 3)) - w).square().sum(dim=(1, 2))
    lo, hi = w.amin(dim=2), w.amax(dim=2)
    best = torch.full((8,), torch.inf)
    for a in torch.linspace(0, 1, 60):
        for b in torch.linspace(0, 1, 60):
            grid = Grid(scale=(hi * b - lo * a) / 3, min=lo * a)
            best = torch.minimum(best, (grid.values(grid.codes(w, 3)) - w).square().sum(dim=(1, 2)))
    assert float((error / best).max()) < 1.05
    assert float((error / best).mean()) < 1.01


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_no_numbers_are_refused(method: str) -> None:
    w, h = layer(out=3)
    w[1, 3] = torch.nan
    with pytest.raises(InputError, match="expected finite values"):
        quantize_weight(w, QuantizeOptions(method=method), h)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits: expected one of"),
        ({"method": "awq"}, "method: expected one of rtn, clip, hqq, gptq"),
        ({"fit_minima": True, "zeros": "integer"}, "real zero points"),
        ({"damping": 0.0}, "damping"),
        ({"passes": -1}, "passes"),
    ],
)
def test_options_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizeOptions(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"method": "gptq"}, {"fit_minima": True}])
def test_what_needs_inputs_says_so(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="inputs"):
        quantize_weight(torch.ones(2, 32), QuantizeOptions(**settings))  # type: ignore[arg-type]


def test_moments_that_are_not_positive_definite_say_what_to_do() -> None:
    """As float32 sums over few tokens may be."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 2.0
    before = hessian.double()
    options = GptqOptions(damping=0.01)
    with pytest.raises(InputError, match=r"positive definite once damped.* larger `damping`, or more `calibration_to"):
        gptq_tensor(weight, before, bits=4, group_size=32, options=options)
    assert torch.equal(before, hessian.double()), "the caller's matrix stays"
