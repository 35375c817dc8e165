"""Whole runs on tiny models: the trained model is the folded model, runs repeat and resume to the same bits."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qalora
from qalora.adapter import read_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.devices import find_device
from qalora.errors import FormatError, InputError, OutputError
from qalora.formats.safetensors import read_header
from qalora.quantization import quantize
from qalora.testing import random_tensor
from qalora.training import StepReport, TrainOptions, train
from qalora.training.fast import refresh
from qalora.training.loop import _order, _Run
from qalora.training.plan import data_of, targets_of
from qalora.training.state import State

Leave = Callable[[Checkpoint, TrainOptions, int], None]


def options(text: Path, out: Path, **changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {"max_steps": 6, "rank": 4, "batch_size": 2, "max_length": 32, "held_out": 0.1}
    return TrainOptions(data=str(text), out=out, **{**settings, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(
    request: pytest.FixtureRequest, base: Checkpoint, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """How a run computed that nothing disturbed, and its adapter."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    train(base, options(text, folder, dtype=request.param))
    return request.param, folder


PAIRS = [(None, "float16", "float32"), (None, "float32", "bfloat16"), (16, "float16", "bfloat16")]
PAIRS += [(16, "float32", "float32"), (64, "float16", "float32"), (64, "float32", "bfloat16")]
"""Every two of a pool size, minima and a compute dtype; the other half of all three is long."""
THREES = [
    three if three in PAIRS else pytest.param(*three, marks=pytest.mark.long)
    for three in itertools.product((None, 16, 64), ("float16", "float32"), ("float32", "bfloat16"))
]


@pytest.mark.parametrize(("pool_size", "minima", "compute"), THREES)
def test_the_trained_model_is_the_folded_model(
    base: Checkpoint, text: Path, tmp_path: Path, minima: Any, pool_size: int | None, compute: str
) -> None:
    """Written, read again, folded, and run: the very minima and, in float32, logits of the model that was trained."""
    chosen = options(text, tmp_path / "adapter", minima=minima, pool_size=pool_size, dtype=compute)
    run = _Run(base, chosen, targets_of(base, chosen), *data_of(base, chosen))
    run.to_the_end(State(), lambda report: None)
    train(base, chosen)
    folded = qalora.fold(base, tmp_path / "adapter")
    tokens = torch.arange(40)[None] * 7
    with torch.no_grad():
        trained = run._module(input_ids=tokens).logits
    assert torch.equal(build(folded)(input_ids=tokens).logits, trained)
    assert not torch.equal(build(base)(input_ids=tokens).logits, trained)
    for path, layer in run._layers.items():
        minimum = folded.tensors[f"{path}.weight"].load_quantized().min
        assert torch.equal(layer.folded(), minimum)
        assert layer.shared is not None
    refresh(run._shared)
    for shared in run._shared:
        names = [path for one in shared.layers for path, layer in run._layers.items() if layer is one]
        pairs = [[of.tensors[f"{path}.weight"].load_quantized() for of in (folded, base)] for path in names]
        change = torch.cat([one.min - other.regrouped(one.group_size).min for one, other in pairs])
        inner = shared.layers[0].in_features
        assert torch.equal(shared.weight()[:, inner : inner + change.shape[1]], change.to(shared.dtype))


def test_the_loss_falls_and_is_logged(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    seen: list[StepReport] = []
    chosen = options(text, tmp_path / "adapter", max_steps=20, evaluate_every=10, learning_rate=0.01)
    train(base, chosen, seen.append)
    log = json.loads((tmp_path / "adapter" / "training.json").read_text("utf-8"))
    assert [entry["step"] for entry in log["held_out"]] == [0, 10, 20]
    assert log["held_out"][-1]["loss"] < log["held_out"][0]["loss"] - 0.1
    early = [report for report in seen if report.step == 0]
    assert all(math.isnan(report.loss) for report in early)
    assert all(report.seconds_left > 0 for report in seen[:-1])  # from the first forward on
    assert math.isnan(early[0].held_out)
    assert early[-1].held_out != seen[-1].held_out
    assert seen[-1].seconds_left == 0
    assert [report.step for report in seen[len(early) :]] == list(range(1, 21))
    assert len(log["losses"]) == 20
    assert str(tmp_path) not in json.dumps(log)


def test_the_held_out_loss_is_the_model_s_own(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    """Against transformers' logits of the untrained base, in float64."""
    chosen = options(text, tmp_path / "adapter", max_steps=1)
    kept, held = data_of(base, chosen)
    found = _Run(base, chosen, targets_of(base, chosen), kept, held).evaluate()
    logits = build(base).double()(input_ids=held.tokens).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), held.targets.flatten(), ignore_index=-100)
    # float32 logits of 64-term sums in a dozen layers, of values up to the largest logit
    assert abs(found - float(wanted)) <= 12 * 64 * 2.0**-24 * float(logits.detach().abs().max())


def test_a_step_is_adamw_on_the_mean_loss(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    """Gradient accumulation in two parts gives what one larger batch gives, up to the order of sums."""
    parts = []
    for name, batch, accumulation in (("a", 4, 1), ("b", 2, 2)):
        parts_of = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
        chosen = options(text, tmp_path / name, max_steps=1, warmup=0.0, dtype="float32", **parts_of)
        run = _Run(base, chosen, targets_of(base, chosen), *data_of(base, chosen))
        run._optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
        run._optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        loss = run._step(0)
        parts.append((loss, {name: p.grad.double() for name, p in run._parameters.items() if p.grad is not None}))
    (loss_a, grads_a), (loss_b, grads_b) = parts
    assert math.isclose(loss_a, loss_b, rel_tol=2**-20)
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads_a.values()))
    for name, grad in grads_a.items():
        assert float((grad - grads_b[name]).abs().max()) <= 2**-14 * norm, name  # float32 noise through two layers


def test_bfloat16_learns_what_float32_does(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    """Held-out losses are of the same model before, and after 20 steps within a twentieth of what was learned."""
    held = {}
    for compute in ("float32", "bfloat16"):
        train(base, options(text, tmp_path / compute, max_steps=20, learning_rate=0.01, dtype=compute))
        log = json.loads((tmp_path / compute / "training.json").read_text("utf-8"))
        assert log["options"]["dtype"] == compute
        held[compute] = [entry["loss"] for entry in log["held_out"]]
    assert held["bfloat16"][0] == held["float32"][0]
    assert abs(held["bfloat16"][1] - held["float32"][1]) <= 0.05 * (held["float32"][0] - held["float32"][1])
    weights = [(tmp_path / compute / "adapter_model.safetensors").read_bytes() for compute in held]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("ways", [{"gradient_checkpointing": True}, {"weights": "packed"}])
def test_other_ways_to_the_same_adapter(
    base: Checkpoint, text: Path, tmp_path: Path, whole: tuple[str, Path], ways: dict[str, Any]
) -> None:
    compute, folder = whole
    train(base, options(text, tmp_path / "other", dtype=compute, **ways))
    plain, other = files(folder), files(tmp_path / "other")
    logs = [json.loads(found.pop("training.json")) for found in (plain, other)]
    if compute == "float32" and "weights" in ways:  # trained by the exact forward, and evaluated like the other
        assert logs[0]["held_out"][0] == logs[1]["held_out"][0]
        assert plain.keys() == other.keys()
        assert plain != other
        return
    assert plain == other
    assert {**logs[0]["options"], **ways} == logs[1]["options"] != logs[0]["options"]
    assert logs[0]["losses"] == logs[1]["losses"]


def test_what_was_chosen_automatically_is_recorded(
    base: Checkpoint, text: Path, tmp_path: Path, fast_bfloat16: bool | None
) -> None:
    train(base, options(text, tmp_path / "adapter", max_steps=1, dtype="auto"))
    found = json.loads((tmp_path / "adapter" / "training.json").read_text("utf-8"))["options"]
    device = find_device("auto")
    assert found["device"] == str(device)
    if device.type == "cpu" and fast_bfloat16 is not None:
        assert found["dtype"] == ("bfloat16" if fast_bfloat16 else "float32")
    assert (found["weights"], found["gradient_checkpointing"]) == ("kept", False)


@pytest.mark.parametrize("stop", [2, 4])
def test_resuming_gives_the_same_bits(
    base: Checkpoint, text: Path, tmp_path: Path, stop: int, whole: tuple[str, Path]
) -> None:
    compute, folder = whole
    torch.manual_seed(999)  # nothing may hang on the global generator

    class Interrupted(Exception):
        pass

    def interrupt(report: StepReport) -> None:
        if report.step == stop + 1:
            raise Interrupted

    chosen = options(text, tmp_path / "parts", save_every=2, dtype=compute)
    with pytest.raises(Interrupted):
        train(base, chosen, interrupt)
    assert not (tmp_path / "parts").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["parts.checkpoint"]
    steps: list[int] = []
    train(base, replace(chosen, resume=True), lambda report: steps.append(report.step) if report.step else None)
    assert steps == list(range(stop + 1, 7))
    assert files(tmp_path / "parts") == files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_the_convention_changes_the_file_and_not_the_weights(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    folded = {}
    for convention in ("paper", "official", "peft"):
        chosen = options(text, tmp_path / convention, convention=convention)
        train(base, chosen)
        read = read_adapter(tmp_path / convention, base)
        assert read.convention == convention
        assert read.minima == "float16"
        folded[convention] = qalora.fold(base, read)
    for name in base.linears:
        first, *others = (model.tensors[name].load_quantized() for model in folded.values())
        assert all(torch.equal(first.min, other.min) for other in others), name


def test_target_modules(base: Checkpoint, tiny: Path, text: Path, tmp_path: Path) -> None:
    """The others are the base's, also where their minima are not float16's: the model is the folded one."""
    whole = quantize(load(tiny), bits=4, group_size=32, zeros="integer")
    chosen = options(text, tmp_path / "a", target_modules=("q_proj", "mlp.up_proj"))
    run = _Run(whole, chosen, targets_of(whole, chosen), *data_of(whole, chosen))
    run.to_the_end(State(), lambda report: None)
    train(whole, chosen)
    names = read_header(tmp_path / "a" / "adapter_model.safetensors").entries
    assert {name.removesuffix(".lora_A.weight").rpartition(".")[2] for name in names if "lora_A" in name} == {
        "q_proj",
        "up_proj",
    }
    tokens = torch.arange(40)[None] * 7
    with torch.no_grad():
        trained = run._module(input_ids=tokens).logits
    assert torch.equal(build(qalora.fold(whole, tmp_path / "a"))(input_ids=tokens).logits, trained)


def test_steps_are_adamw_with_clipped_gradients_on_a_schedule(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    """Against the formulas (Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2) in float64, a
    step at a time: 2 of 6 steps of warm-up, then down in a line.
    """
    rate, decay, limit = 0.01, 0.1, 0.05
    more = {"learning_rate": rate, "weight_decay": decay, "max_gradient_norm": limit, "warmup": 0.34}
    chosen = options(text, tmp_path / "a", start="uniform", **more)
    run = _Run(base, chosen, targets_of(base, chosen), *data_of(base, chosen))
    parameters = run._parameters
    count = sum(parameter.numel() for parameter in parameters.values())
    moments = {name: [torch.zeros(p.shape, dtype=torch.float64) for _ in range(2)] for name, p in parameters.items()}
    for step, share in enumerate((0.5, 1.0, 1.0, 0.75, 0.5, 0.25)):
        before = {name: parameter.detach().double() for name, parameter in parameters.items()}
        run._backward(step * 2, 2)
        gradients = {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}
        run._gradients.zero_()
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert norm > 2 * limit, "else nothing is clipped"
        run._step(step)
        for name, gradient in gradients.items():
            clipped = gradient * limit / (norm + 1e-6)
            first, second = moments[name]
            first.mul_(0.9).add_(clipped, alpha=0.1)
            second.mul_(0.999).add_(clipped.square(), alpha=0.001)
            towards = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            wanted = before[name] * (1 - rate * share * decay) - rate * share * towards
            # the norm is a float32 sum of `count` squares; a step is at most 6 rates, by some ten roundings
            slack = (count + 10 * 6) * 2.0**-24 * rate + 2 * 2.0**-24 * before[name].abs()
            assert bool(((parameters[name].detach() - wanted).abs() <= slack).all()), (step, name)


def test_a_run_does_not_replace_the_checkpoint_of_another(
    base: Checkpoint, text: Path, tmp_path: Path, leave: Leave
) -> None:
    chosen = options(text, tmp_path / "a", save_every=2)
    leave(base, chosen, 3)
    kept = files(tmp_path / "a.checkpoint")
    words = r"a\.checkpoint holds the checkpoint of an earlier run; `resume` goes on with it, `force` starts anew$"
    with pytest.raises(OutputError, match=words):
        train(base, chosen)
    assert files(tmp_path / "a.checkpoint") == kept
    train(base, replace(chosen, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_folder_that_is_no_checkpoint_stays(base: Checkpoint, text: Path, tmp_path: Path, save_every: int) -> None:
    mine = tmp_path / "a.checkpoint"
    mine.mkdir()
    (mine / "mine.txt").write_text("x", encoding="utf-8")
    chosen = options(text, tmp_path / "a", save_every=save_every)
    if save_every:
        with pytest.raises(OutputError, match=r"where checkpoints go, exists and is no checkpoint; move it"):
            train(base, replace(chosen, force=True))
        assert not (tmp_path / "a").exists()
    else:
        train(base, chosen)
    assert files(mine) == {"mine.txt": b"x"}


def test_what_a_killed_run_left_of_a_checkpoint_is_in_nobody_s_way(
    base: Checkpoint, text: Path, tmp_path: Path, leave: Leave
) -> None:
    """Weights without a record, as a run leaves them that is killed while it removes its checkpoint."""
    (tmp_path / "a.checkpoint").mkdir()
    (tmp_path / "a.checkpoint" / "state-4.safetensors").write_bytes(b"x")
    chosen = options(text, tmp_path / "a", save_every=2)
    leave(base, chosen, 3)
    assert sorted(files(tmp_path / "a.checkpoint")) == ["state-2.safetensors", "state.json"]
    train(base, replace(chosen, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_output_that_cannot_be_is_known_at_once(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    seen: list[StepReport] = []
    with pytest.raises(OutputError, match=r"text\.txt"):
        train(base, options(text, text / "adapter"), seen.append)
    assert not seen


def test_bases_that_differ_in_one_layer_or_norm_are_told_apart(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    """In none of its quantized layers' ends: a layer of the middle, and a norm."""
    chosen = options(text, tmp_path / "a")

    def digest(model: Checkpoint) -> str:
        run = _Run(model, chosen, targets_of(model, chosen), *data_of(model, chosen))
        return str(run._identity["model_sha256"])

    middle = base.linears[len(base.linears) // 2]
    tensor = base.tensors[middle].load_quantized()
    other = replace(tensor, min=tensor.min * 1.5)
    norm = base.tensors["model.norm.weight"]
    changes = {
        middle: replace(base.tensors[middle], read=other.rows),
        "model.norm.weight": replace(norm, read=lambda start, stop: norm.rows(start, stop) * 2),
    }
    found = {digest(replace(base, tensors={**base.tensors, name: changed})) for name, changed in changes.items()}
    assert len(found | {digest(base)}) == 3
    assert digest(base) == digest(base)


def test_every_epoch_is_a_permutation() -> None:
    order = _order(10, 3, 0, 35)
    assert [sorted(order[n : n + 10]) for n in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert _order(10, 3, 17, 9) == order[17:26]
    assert _order(10, 4, 0, 10) != order[:10]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 0}, "rank: expected an integer >= 1, or auto, got 0"),
    "steps": ({"max_steps": 0}, "max_steps: expected an integer >= 1, got 0"),
    "learning rate": ({"learning_rate": 0.0}, "learning_rate: expected a number > 0 and <= 1, got 0.0"),
    "held out": ({"held_out": 1.0}, "held_out: expected a number > 0 and <= 0.9, got 1.0"),
    "alpha": ({"alpha": -1.0}, r"alpha: expected a number > 0 and <= 1000000.0, got -1.0"),
    "a large alpha": ({"alpha": 2e6}, r"alpha: expected a number > 0 and <= 1000000.0, got 2000000.0"),
    "seed": ({"seed": 20250101120000}, "seed: expected an integer from 0 to 4294967295, got 20250101120000"),
    "budget": ({"budget": 1000}, "budget: expected `rank` auto beside it, got rank 16"),
    "convention": ({"convention": "mine"}, "convention: expected one of paper, official, peft"),
    "dtype": ({"dtype": "int8"}, "dtype: expected one of auto, float32, bfloat16, got 'int8'"),
    "weights": ({"weights": "lost"}, "weights: expected kept or packed"),
    "minima": ({"minima": "int8"}, "minima: expected float16 or float32"),
    "context": ({"max_length": 1024}, "at most 512, the model's context"),
    "target modules": ({"target_modules": ("query",)}, "target_modules: expected some of down_proj, .* got 'query'"),
    "pool size": ({"pool_size": 48}, "pool"),
    "device": ({"device": "abacus"}, "device: expected a device that torch has"),
    "data": ({"data": "none.txt"}, "none.txt: no such file"),
    "resume": ({"resume": True}, "expected a checkpoint to resume, got none"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_leave_nothing(kind: str, base: Checkpoint, text: Path, tmp_path: Path) -> None:
    changes, words = REFUSED[kind]
    with pytest.raises(InputError, match=words):
        chosen = {"data": str(text), "out": tmp_path / "adapter", "max_length": 32, "max_steps": 1, **changes}
        train(base, TrainOptions(**chosen))
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_told_how_to_become_integer(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"quantize it first: qalora quantize {tiny}"):
        train(load(tiny), options(text, tmp_path / "adapter"))


def test_act_order_is_refused(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    name = base.linears[0]
    lazy = base.tensors[name]
    assert lazy.spec is not None
    mixed = replace(lazy, spec=replace(lazy.spec, act_order=True))
    with pytest.raises(InputError, match="act-order"):
        train(replace(base, tensors={**base.tensors, name: mixed}), options(text, tmp_path / "adapter"))


def test_a_loss_that_is_no_number_says_what_to_do(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    broken = random_tensor(64, 64, bits=4, group_size=32)
    huge = replace(broken, scale=torch.full_like(broken.scale, 3e38))
    name = next(name for name in base.linears if base.tensors[name].shape == (64, 64))
    tensors = {**base.tensors, name: replace(base.tensors[name], read=huge.rows)}
    for start, words in (
        ("uniform", "step 1: the loss is nan.*lower `learning_rate`"),
        ("gradient", "first sequences"),
    ):
        with pytest.raises(InputError, match=words):
            train(replace(base, tensors=tensors), options(text, tmp_path / "adapter", start=start))
    assert not list(tmp_path.iterdir())


def _state(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "state.json").read_text("utf-8"))
        change(record)
        (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")

    return edit


def _cut(folder: Path) -> None:
    data = (folder / "state-2.safetensors").read_bytes()
    (folder / "state-2.safetensors").write_bytes(data[:-8])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "other seed": (_state(lambda record: record["run"].update(seed=5)), "seed: expected 0, got 5; it is another run's"),
    "other data": (_state(lambda record: record["run"].update(data_sha256="0")), "data_sha256"),
    "other version": (_state(lambda record: record.update(version=1)), "version"),
    "no step": (_state(lambda record: record.pop("step")), "state.json: step: this key is missing"),
    "cut": (_cut, "state-2.safetensors"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_checkpoint_of_another_run_is_refused(
    kind: str, base: Checkpoint, text: Path, tmp_path: Path, leave: Leave
) -> None:
    damage, words = DAMAGE[kind]
    chosen = options(text, tmp_path / "adapter", save_every=2)
    leave(base, chosen, 3)
    damage(tmp_path / "adapter.checkpoint")
    with pytest.raises((InputError, FormatError), match=words):
        train(base, replace(chosen, resume=True))
    assert not (tmp_path / "adapter").exists()
