"""Models: every keyword does what it says, one effect for each, and none without."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora
from elsewhere import Elsewhere
from folders import same_files
from public_world import SUBJECTS, Effects, World, assert_no_engine, spec_of, unlike, unrecorded
from qalora.adapter import write_adapter
from qalora.calibration import bits_per_weight
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.errors import InputError, OutputError
from qalora.quantization import quantize as quantize_model
from qalora.testing import assert_same_model, assert_same_tensor, random_model

effect = Effects("models")


# load


@effect("load", "path")
def _(world: World) -> None:
    assert qalora.load(world.artifact).layout == "qalora"
    assert qalora.load(str(world.float_model)).layout == "huggingface"


@effect("load", "checkpoint_format")
def _(world: World) -> None:
    place = world.exported("gptq", model=random_model(world.base, zeros="integer"))
    for file in ("config.json", "quantize_config.json"):  # or our own name in it makes the label believed
        text = json.loads((place / file).read_text("utf-8"))
        text.get("quantization_config", text).pop("meta")
        (place / file).write_text(json.dumps(text), encoding="utf-8")
    assert unlike(qalora.load(place, checkpoint_format="gptq"), qalora.load(place, checkpoint_format="gptq_v2"))
    for other, name in ((world.artifact, "qalora"), (world.float_model, "huggingface")):
        with pytest.raises(InputError, match=f"`checkpoint_format` is for GPTQ folders, and .* is {name}; leave"):
            qalora.load(other, checkpoint_format="gptq")
    with pytest.raises(InputError, match="checkpoint_format: expected gptq or gptq_v2, got 'v1'"):
        qalora.load(world.out / "nothing", checkpoint_format="v1")  # type: ignore[arg-type]


# quantize


def quantized(world: World, **options: Any) -> Checkpoint:
    return qalora.quantize(world.float_model, **options)


@effect("quantize", "model")
def _(world: World) -> None:
    assert not unlike(qalora.quantize(load(world.float_model)), qalora.quantize(str(world.float_model)))


@effect("quantize", "bits", "group_size", "zeros")
def _(world: World) -> None:
    spec = spec_of(quantized(world, bits=3, group_size=64, zeros="integer"))
    assert (spec.bits, spec.group_size, spec.zeros) == (3, 64, "integer")


@effect("quantize", "method")
def _(world: World) -> None:
    assert unlike(quantized(world, method="clip"), quantized(world))


@effect("quantize", "calibration")
def _(world: World) -> None:
    assert unlike(quantized(world, method="hqq", calibration=world.text), quantized(world, method="hqq"))
    with pytest.raises(InputError, match="`method` rtn makes no use of `calibration`"):
        quantized(world, calibration=world.text)


@effect("quantize", "fit_minima")
def _(world: World) -> None:
    assert unlike(quantized(world, fit_minima=True, calibration=world.text), quantized(world))


@effect("quantize", "act_order", "damping", "passes")
def _(world: World) -> None:
    usual = quantized(world, method="gptq", calibration=world.text, bits=3)
    for one in ({"act_order": True}, {"damping": 0.5}, {"passes": 0}):
        assert unlike(quantized(world, method="gptq", calibration=world.text, bits=3, **one), usual)
        with pytest.raises(InputError, match="is for `method` gptq, and the method is rtn"):
            quantized(world, **one)


@effect("quantize", "budget")
def _(world: World) -> None:
    made = quantized(world, budget=4.3, calibration=world.text)
    assert bits_per_weight(made) <= 4.3
    with pytest.raises(InputError, match="`bits` auto and `budget` go together"):
        quantized(world, budget=4.3, calibration=world.text, bits=4)


@effect("quantize", "widths", "calibration_tokens", "calibration_length", "progress")
def _(world: World) -> None:
    seen: list[None] = []
    given = {"calibration": world.text, "calibration_tokens": 64, "calibration_length": 16}
    made = quantized(world, budget=5, widths=(3, 8), progress=lambda: seen.append(None), **given)
    assert {made.tensors[name].spec.bits for name in made.linears} <= {3, 8}
    assert seen
    usual = quantized(world, method="gptq", bits=3, **given)
    for name, value in (("calibration_tokens", 16), ("calibration_length", 32)):
        assert unlike(quantized(world, method="gptq", bits=3, **{**given, name: value}), usual)
        with pytest.raises(InputError, match=f"`{name}` needs a text"):
            quantized(world, **{name: value})


@effect("quantize", "device")
def _(world: World) -> None:
    with Elsewhere("mps:0") as place:
        made = quantized(world, device="mps:0")
        one = made.tensors[made.linears[0]].load_quantized()
    assert place.there["amax"]
    assert one.packed.device.type == "cpu"
    assert_same_tensor(one, quantized(world).tensors[made.linears[0]].load_quantized())
    with pytest.raises(InputError, match="abacus"):
        quantized(world, device="abacus")


@effect("quantize", "requantize")
def _(world: World) -> None:
    with pytest.raises(InputError, match="holds integers already"):
        qalora.quantize(world.base, bits=3)
    assert spec_of(qalora.quantize(world.base, bits=3, requantize=True)).bits == 3


# fold


@effect("fold", "model", "adapter")
def _(world: World) -> None:
    write_adapter(world.adapter, world.out / "adapter")
    made = qalora.fold(world.base, world.adapter)
    assert unlike(made, world.base)
    assert not unlike(made, qalora.fold(world.base, world.out / "adapter"))


@effect("fold", "minima")
def _(world: World) -> None:
    assert spec_of(qalora.fold(world.base, world.adapter, minima="float32")).min_dtype == torch.float32
    with pytest.raises(InputError, match="minima: expected float16 or float32, got 'fp8'"):
        qalora.fold(world.out / "nothing", world.adapter, minima="fp8")  # type: ignore[arg-type]


@effect("fold", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    with pytest.raises(InputError, match="give `convention`"):
        qalora.fold(world.base, place)
    assert unlike(*(qalora.fold(world.base, place, convention=one) for one in ("paper", "official")))
    with pytest.raises(InputError, match="convention: expected none, or the adapter's own"):
        qalora.fold(world.base, world.adapter, convention="official")


# save


@effect("save", "model", "out", "max_shard_size", "force", "progress")
def _(world: World) -> None:
    told: list[str] = []
    plan = qalora.save(world.base, world.out / "a", progress=lambda name, nbytes: told.append(name))
    assert_same_model(load(world.out / "a"), world.base)
    assert set(told) == set(world.base.tensors) == {tensor.name for tensor in plan.tensors}
    with pytest.raises(OutputError, match="exists already"):
        qalora.save(world.base, world.out / "a")
    qalora.save(world.base, world.out / "a", force=True, max_shard_size=40_000)
    assert len(list((world.out / "a").glob("*.safetensors"))) > 1


@effect("save", "jobs", "engine")
def _(world: World) -> None:
    for jobs in (1, 2):
        qalora.save(world.base, world.out / str(jobs), jobs=jobs)
    assert same_files(world.out / "1", world.out / "2")
    assert_no_engine(lambda **given: qalora.save(world.base, world.out / "a", **given))


def test_a_checkpoint_saves_itself(world: World) -> None:
    world.base.save(world.out / "a")
    assert_same_model(load(world.out / "a"), world.base)
    with pytest.raises(OutputError, match="exists already"):
        world.base.save(str(world.out / "a"))
    world.base.save(world.out / "a", force=True, max_shard_size=40_000)
    assert len(list((world.out / "a").glob("*.safetensors"))) > 1


def test_records_are_shown_in_a_line(world: World) -> None:
    report = world.verified(level="weights")
    (plan,) = qalora.export(world.base, "gguf", world.out)
    adapter = f"Adapter({len(world.adapter.layers)} layers, rank 4, paper)"
    assert repr(world.base).endswith(f", llama, {len(world.base.linears)} x 4 bits in groups of 32)")
    assert repr(world.adapter) == adapter
    assert repr(plan) == f"Plan(gguf, {len(plan.tensors)} tensors, {plan.nbytes:,} bytes)"
    assert repr(report) == f"ParityReport({world.base.path.name}, 1 artefacts, gates: {report.counts()})"


def test_a_run_says_its_steps_to_the_standard_logger(world: World, caplog: pytest.LogCaptureFixture) -> None:
    watch = qalora.Watch()
    with caplog.at_level("INFO", logger="qalora"):
        watch.step("train", "finished", 1.25)
        watch.note("a label that may be wrong")
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("INFO", "train: finished, 1.2 s"),
        ("WARNING", "a label that may be wrong"),
    ]


# inspect


@effect("inspect", "path", "quick")
def _(world: World) -> None:
    whole, quick = qalora.inspect(world.artifact).to_json(), qalora.inspect(world.artifact, quick=True).to_json()
    assert whole["layout"] == quick["layout"] == "qalora"
    assert whole["codes"]["scales"]
    assert quick["codes"] is None


@effect("inspect", "base", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    assert qalora.inspect(place, convention="official").to_json()["convention"] == "official"
    plain = qalora.inspect(place).to_json()
    assert plain["convention"] is None
    other = quantize_model(load(world.float_model), bits=4, group_size=64)
    qalora.save(other, world.out / "other")
    assert qalora.inspect(place, base=world.out / "other").to_json() != plain


@effect("inspect", "checkpoint_format")
def _(world: World) -> None:
    with pytest.raises(InputError, match="`checkpoint_format` is for GPTQ folders"):
        qalora.inspect(world.artifact, checkpoint_format="gptq")


# all of them


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's dynamic INT8
@effect.parametrized()
def test_a_keyword_does_what_it_says(proof: Callable[[World], None], world: World) -> None:
    proof(world)


def test_every_keyword_has_an_effect_here() -> None:
    assert not effect.missing()


def test_every_function_has_a_file() -> None:
    functions = {name for name in qalora.__all__ if inspect.isfunction(getattr(qalora, name))}
    assert {name for names in SUBJECTS.values() for name in names} == functions
    assert {path.stem for path in Path(__file__).parent.glob("test_*.py")} == {f"test_{name}" for name in SUBJECTS}


def test_what_is_no_keyword_is_refused(world: World) -> None:
    for call in (
        lambda: qalora.export(world.base, "gguf", world.out, adaptor=world.adapter),
        lambda: qalora.quantize(world.base, group=32),
        lambda: qalora.verify(world.base, [world.artifact], adaptor=world.adapter),
        lambda: qalora.train(world.base, world.text, world.out / "x", ranks=3),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()
