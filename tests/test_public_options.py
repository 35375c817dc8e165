"""Every keyword of every public function does what it says: one effect for each, and none without."""

from __future__ import annotations

import gc
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import qalora
from qalora.adapter import Adapter, read_adapter, write_adapter
from qalora.calibration import bits_per_weight
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.onnx.files import accuracy_level
from qalora.demo import demo_text
from qalora.errors import ExactnessError, InputError, OutputError
from qalora.folding import fold
from qalora.formats.gguf import read_header
from qalora.options.export import Export
from qalora.options.release import Package
from qalora.options.verify import Verify
from qalora.quantization import quantize as quantize_model
from qalora.testing import assert_same_model, random_adapter, random_model
from qalora.training import TrainOptions
from qalora.training import train as train_model
from qalora.training.layer import FoldedLinear


def keywords(source: Any) -> list[str]:
    return list(inspect.signature(source).parameters)


def every_keyword() -> list[tuple[str, str]]:
    functions = [name for name in qalora.__all__ if inspect.isfunction(getattr(qalora, name))]
    return [(name, key) for name in functions for key in keywords(getattr(qalora, name))]


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


@pytest.fixture(scope="module")
def shared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("public")
    base = quantize_model(load(tiny), bits=4, group_size=32)
    adapter = random_adapter(base, pool_size=None, seed=1, a_size=0.05, b_size=0.05, scaling=2.0)
    (place / "text.txt").write_text(demo_text()[:9000], encoding="utf-8")
    write_adapter(adapter, place / "adapter")
    qalora.export(fold(base, adapter), "qalora", place)
    return World(
        float_model=tiny,
        base=base,
        whole=quantize_model(load(tiny), bits=4, group_size=32, zeros="integer"),
        adapter=adapter,
        text=place / "text.txt",
        artifact=place / "qalora",
        out=place,
    )


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    return replace(shared, out=tmp_path)


EFFECTS: dict[tuple[str, str], Callable[[World], None]] = {}


def effect(function: str, *names: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def put(proof: Callable[[World], None]) -> Callable[[World], None]:
        for name in names:
            assert (function, name) not in EFFECTS
            EFFECTS[function, name] = proof
        return proof

    return put


def unlike(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether a linear weight of two models differs."""
    return any(not torch.equal(one.tensors[name].load_float(), two.tensors[name].load_float()) for name in one.linears)


def same_layers(one: Adapter, two: Adapter) -> bool:
    return one.layers.keys() == two.layers.keys() and all(
        torch.equal(layer.a, two.layers[path].a) and torch.equal(layer.b, two.layers[path].b)
        for path, layer in one.layers.items()
    )


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


def spec_of(model: Checkpoint) -> Any:
    return model.tensors[model.linears[0]].spec


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
        with pytest.raises(InputError, match=f"`{name}` is of the text that `calibration` gives"):
            quantized(world, **{name: value})


@effect("quantize", "requantize")
def _(world: World) -> None:
    with pytest.raises(InputError, match="holds integers already"):
        qalora.quantize(world.base, bits=3)
    assert spec_of(qalora.quantize(world.base, bits=3, requantize=True)).bits == 3


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
    world.trained("a", progress=lambda report: seen.append(report.step))
    assert seen == [1, 2]


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


def unrecorded(world: World) -> Path:
    """An adapter's folder that does not say what its scaling means."""
    write_adapter(world.adapter, world.out / "foreign")
    (world.out / "foreign" / "qalora_adapter.json").unlink()
    return world.out / "foreign"


@effect("fold", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    with pytest.raises(InputError, match="give `convention`"):
        qalora.fold(world.base, place)
    assert unlike(*(qalora.fold(world.base, place, convention=one) for one in ("paper", "official")))
    with pytest.raises(InputError, match="convention: expected none, or the adapter's own"):
        qalora.fold(world.base, world.adapter, convention="official")


# export


@effect("export", "model", "targets", "out")
def _(world: World) -> None:
    plans = qalora.export(world.base, ["qalora", "mlx"], world.out)
    assert [plan.target for plan in plans] == ["qalora", "mlx"]
    assert load(world.out / "mlx").layout == "mlx"
    for wrong in ("foo", ["gptq", "foo"]):
        with pytest.raises(InputError, match=r"targets: expected one of .* got 'foo'"):
            qalora.export(world.out / "nothing", wrong, world.out)
    with pytest.raises(InputError, match="targets: expected at least one of"):
        qalora.export(world.out / "nothing", [], world.out)


@effect("export", "adapter")
def _(world: World) -> None:
    """The fine-tune is in every format: folded, or, over a base of integer zero points, beside it."""
    write_adapter(world.adapter, world.out / "adapter")
    for name, given in (
        ("record", world.adapter),
        ("folder", world.out / "adapter"),
        ("text", str(world.out / "adapter")),
    ):
        made = load(world.exported("qalora", name, adapter=given))
        assert_same_model(made, fold(world.base, world.adapter))
    beside = load(world.exported("gptq", "whole", world.whole, adapter=world.adapter)).beside
    assert beside is not None
    assert read_adapter(beside, world.whole).layers.keys() == world.adapter.layers.keys()


@effect("export", "minima")
def _(world: World) -> None:
    made = load(world.exported("qalora", adapter=world.adapter, minima="float32"))
    assert_same_model(made, fold(world.base, world.adapter, minima="float32"))
    with pytest.raises(InputError, match="minima: expected float16 or float32"):
        world.exported("qalora", adapter=world.adapter, minima="fp8")
    for option in ({"minima": "float32"}, {"convention": "official"}):
        with pytest.raises(InputError, match=f"`{next(iter(option))}` is of a fold: expected an adapter to fold"):
            world.exported("qalora", **option)


@effect("export", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    with pytest.raises(InputError, match="give `convention`"):
        world.exported("qalora", adapter=place)
    made = load(world.exported("qalora", adapter=place, convention="official"))
    assert_same_model(made, fold(world.base, read_adapter(place, world.base, convention="official")))


@effect("export", "force")
def _(world: World) -> None:
    world.exported("qalora")
    with pytest.raises(OutputError, match="exists already"):
        world.exported("qalora")
    world.exported("qalora", force=True)


@effect("export", "name")
def _(world: World) -> None:
    qalora.export(world.base, "gguf", world.out, name="Ours")
    (file,) = (world.out / "gguf").glob("*.gguf")
    assert file.name.startswith("Ours")


@effect("export", "allow_loss")
def _(world: World) -> None:
    wide = fold(world.base, world.adapter, minima="float32")
    with pytest.raises(ExactnessError, match="`allow_loss` minima"):
        world.exported("gguf", model=wide)
    for name, given in (("a", "minima"), ("b", ["minima"]), ("c", frozenset({"minima"}))):
        assert list(world.exported("gguf", name, wide, allow_loss=given).glob("*.gguf"))
    with pytest.raises(InputError, match=r"allow_loss: expected one of .* got 'quality'"):
        qalora.export(world.out / "nothing", "gguf", world.out, allow_loss="quality")


@effect("export", "gptq_form")
def _(world: World) -> None:
    assert load(world.exported("gptq", "a")).quantized
    assert spec_of(load(world.exported("gptq", "b", gptq_form="eight-bit", allow_loss="eight-bit"))).bits == 8


@effect("export", "gguf_form")
def _(world: World) -> None:
    for form, kind in (("auto", "Q4_1"), ("wide", "Q8_0")):
        (file,) = world.exported(
            "gguf", form, world.whole, gguf_form=form, allow_loss="minima" if form == "auto" else ()
        ).glob("*.gguf")
        assert kind in {tensor.type for tensor in read_header(file).tensors.values()}


@effect("export", "accuracy_level")
def _(world: World) -> None:
    assert accuracy_level(world.exported("onnx", accuracy_level=4) / "model.onnx") == 4


@effect("export", "onnx_embedding")
def _(world: World) -> None:
    name = "model.embed_tokens.weight"
    coded = replace(world.base, tensors={**world.base.tensors, name: _coded(world, name)})
    place = world.exported("onnx", model=coded, onnx_embedding="quantized")
    graph = onnx.load(place / "model.onnx", load_external_data=False).graph
    assert any(item.name.startswith("model.embed_tokens.table") for item in graph.initializer)


def _coded(world: World, name: str) -> Any:
    only = replace(world.base, tensors={name: load(world.float_model).tensors[name]}, linears=(name,))
    return quantize_model(only, bits=8, zeros="symmetric").tensors[name]


@effect("export", "lora_slots")
def _(world: World) -> None:
    module = "model.layers.0.self_attn.q_proj"
    for name, given in (("a", [module]), ("b", module)):
        graph = onnx.load(world.exported("onnx", name, lora_slots=given) / "model.onnx", load_external_data=False).graph
        assert f"{module}.lora_A" in {value.name for value in graph.input}
    with pytest.raises(InputError, match="lora_slots: expected onnx among the formats, got mlx"):
        world.exported("mlx", lora_slots=[module])


@effect("export", "max_shard_size", "split_max_size")
def _(world: World) -> None:
    assert len(list(world.exported("qalora", max_shard_size=40_000).glob("*.safetensors"))) > 1
    assert len(list(world.exported("gguf", split_max_size=40_000).glob("*.gguf"))) > 1


@effect("export", "progress")
def _(world: World) -> None:
    told: list[tuple[str, int]] = []
    world.exported("qalora", progress=lambda name, nbytes: told.append((name, nbytes)))
    assert {name for name, _ in told} == set(world.base.tensors)
    assert all(nbytes > 0 for _, nbytes in told)


# verify


@effect("verify", "reference", "artifacts")
def _(world: World) -> None:
    assert qalora.verify(world.artifact, world.artifact, level="weights").passed()
    assert not qalora.verify(world.base, [str(world.artifact)], level="weights").passed()


@effect("verify", "adapter", "level")
def _(world: World) -> None:
    write_adapter(world.adapter, world.out / "adapter")
    for given in (world.adapter, world.out / "adapter", str(world.out / "adapter")):
        report = world.verified(adapter=given, level="weights")
        assert report.passed()
        assert report.adapter.layers == len(world.adapter.layers)
        assert report.artifacts[0].runs == ()
    with pytest.raises(InputError, match="level: expected one of"):
        qalora.verify(world.out / "nothing", [], level="colour")


@effect("verify", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    assert world.verified(adapter=place, convention="paper", level="weights").passed()
    assert not world.verified(adapter=place, convention="official", level="weights").passed()


@effect("verify", "minima")
def _(world: World) -> None:
    assert world.verified(level="weights").passed()
    assert not world.verified(minima="float32", level="weights").passed()


@effect("verify", "text", "max_tokens")
def _(world: World) -> None:
    report = world.verified(level="logits", text="some words " * 50, max_tokens=17)
    assert (report.text, report.tokens) == ("text given", 17)


@effect("verify", "tokens")
def _(world: World) -> None:
    report = world.verified(level="logits", tokens=[1, 2, 3, 4] * 3)
    assert (report.text, report.tokens) == ("tokens given", 12)


@effect("verify", "prompts", "generate", "threads")
def _(world: World) -> None:
    report = world.verified(prompts=["one", "two", "three"], generate=3)
    (run,) = report.artifacts[0].runs
    assert [len(made.tokens) for made in run.generations] == [3, 3, 3]
    assert run.runtime.threads == 1
    for name in ("generate", "threads", "max_tokens", "memory"):
        with pytest.raises(InputError, match=f"{name}: expected at least 1, got 0"):
            qalora.verify(world.out / "nothing", [], **{name: 0})


@effect("verify", "memory")
def _(world: World) -> None:
    report = world.verified(level="logits", memory=1000)
    assert "of memory, and there are" in report.failure()


@effect("verify", "dynamic_int8", "progress")
def _(world: World) -> None:
    said: list[str] = []
    report = world.verified(level="logits", dynamic_int8=True, progress=lambda stage, share: said.append(stage))
    assert report.comparison is not None
    assert {"reference", "running dynamic INT8"} <= set(said)


@effect("verify", "relative_to")
def _(world: World) -> None:
    report = world.verified(level="weights", relative_to=world.artifact.parent.parent)
    assert report.artifacts[0].name == f"{world.artifact.parent.name}/qalora"


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


# release and check


def released(world: World, name: str = "dist", **options: Any) -> Path:
    given = {"verify": Verify(max_tokens=24, generate=2), "adapter": world.adapter, **options}
    made = qalora.release(world.base, Export(targets=("qalora",)), Package(out=world.out / name), **given)
    assert made.folder == world.out / name
    return made.folder


@effect("release", "model", "export", "package", "adapter", "verify", "force")
def _(world: World) -> None:
    dist = released(world, verify=Verify(level="weights"))
    assert_same_model(load(dist / "qalora"), fold(world.base, world.adapter))
    assert json.loads((dist / "report.json").read_text("utf-8"))["level"] == "weights"
    assert (dist / "adapter").is_dir()
    export, package = Export(targets=("gguf",), name="Ours"), Package(out=dist, with_adapter=False, license="mit")
    with pytest.raises(OutputError, match="exists already"):
        qalora.release(world.out / "nothing", export, package)
    made = qalora.release(world.base, export, package, force=True, verify=Verify(level="weights"))
    assert not (dist / "adapter").exists()
    assert "license: mit" in (dist / "README.md").read_text("utf-8")
    assert [plan.target for plan in made.plans] == ["gguf"]


@effect("release", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    with pytest.raises(InputError, match="give `convention`"):
        released(world, adapter=place)
    dist = released(world, adapter=place, convention="official", verify=Verify(level="weights"))
    assert_same_model(load(dist / "qalora"), fold(world.base, read_adapter(place, world.base, convention="official")))


@effect("release", "password", "watch")
def _(world: World) -> None:
    key = signing_key(world.out / "key", password="open")
    package = Package(out=world.out / "dist", sign=key)
    export, verify = Export(targets=("qalora",)), Verify(level="weights")
    with pytest.raises(InputError, match="password"):
        qalora.release(world.base, export, package, password="shut")
    told: list[Any] = []
    watch = qalora.Watch(judged=told.append, done=told.append)
    made = qalora.release(world.base, export, package, password="open", verify=verify, watch=watch)
    assert told == [made.report, made]
    assert (world.out / "dist" / "model.sig").is_file()


@effect("check", "folder", "base", "adapter", "open_artifacts", "progress", "allow_unproven")
def _(world: World) -> None:
    """What is not asked of it is said to be skipped."""
    dist, told = released(world), []
    found = qalora.check(dist, base=world.base, progress=told.append)
    assert not found.findings
    assert not next(stage for stage in found.stages if stage.question == "made again").skipped
    assert told
    skipped = {stage.question for stage in qalora.check(dist, open_artifacts=False).stages if stage.skipped}
    assert {"opening", "made again"} <= skipped
    other = replace(world.adapter, layers=dict(list(world.adapter.layers.items())[1:]))
    write_adapter(other, world.out / "other")
    assert qalora.check(dist, base=world.base, adapter=world.out / "other", open_artifacts=False).findings
    assert qalora.check(dist, open_artifacts=False, allow_unproven=True).findings == ()
    (dist / "README.md").write_text("another", encoding="utf-8")
    assert qalora.check(dist, open_artifacts=False).findings


@effect("check", "public_key", "text", "template")
def _(world: World) -> None:
    key = signing_key(world.out / "key")
    (world.out / "words").write_text("some words " * 50, encoding="utf-8")
    (world.out / "card.md").write_text("---\n{{ card_data }}\n---\nOurs.\n", encoding="utf-8")
    qalora.release(
        world.base,
        Export(targets=("qalora",)),
        Package(out=world.out / "dist", sign=key, card_template=world.out / "card.md"),
        verify=Verify(text=world.out / "words", max_tokens=24, generate=2),
    )
    given = {"public_key": world.out / "key.pub", "base": world.base, "open_artifacts": False}
    read = {"text": "some words " * 50, "template": (world.out / "card.md").read_text("utf-8")}
    assert qalora.check(world.out / "dist", **given, **read).findings == ()
    without = qalora.check(world.out / "dist", open_artifacts=False)
    assert {"signature", "card"} <= {stage.question for stage in without.stages if stage.skipped}
    signing_key(world.out / "another")
    assert qalora.check(world.out / "dist", **{**given, "public_key": world.out / "another.pub"}, **read).findings


def signing_key(path: Path, password: str | None = None) -> Path:
    """A private key, and its public one at `<path>.pub`."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_name(f"{path.name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    return path


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


# run


@effect("run", "recipe", "force", "dry_run", "watch")
def _(world: World) -> None:
    qalora.save(world.base, world.out / "base")
    recipe = world.out / "recipe.toml"
    lines = (
        '[base]\nmodel = "base"\n[export]\nto = ["qalora"]\n[verify]\nlevel = "weights"\n[release]\noutput = "dist"\n'
    )
    recipe.write_text(lines, encoding="utf-8")
    told: list[tuple[str, str]] = []
    watch = qalora.Watch(step=lambda step, state, seconds: told.append((step, state)))
    assert {row.state for row in qalora.run(recipe, dry_run=True, watch=watch)} == {"to do"}
    assert not (world.out / "dist").exists()
    assert not told
    qalora.run(str(recipe), watch=watch)
    assert ("release", "finished") in told
    assert {row.state for row in qalora.run(recipe)} == {"reused"}
    (world.out / "dist" / "README.md").write_text("another", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        qalora.run(recipe)
    qalora.run(recipe, force=True)
    assert qalora.check(world.out / "dist", open_artifacts=False).findings == ()


# all of them


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's dynamic INT8
@pytest.mark.parametrize(
    "proof",
    dict.fromkeys(EFFECTS.values()),
    ids=lambda proof: "-".join(name for (_, name), one in EFFECTS.items() if one is proof)[:60],
)
def test_a_keyword_does_what_it_says(proof: Callable[[World], None], world: World) -> None:
    proof(world)


def test_every_keyword_has_an_effect_here() -> None:
    """A new keyword without an entry fails, and an entry of none."""
    assert set(every_keyword()) == set(EFFECTS)


def test_what_is_no_keyword_is_refused(world: World) -> None:
    for call in (
        lambda: qalora.export(world.base, "gguf", world.out, adaptor=world.adapter),
        lambda: qalora.quantize(world.base, group=32),
        lambda: qalora.verify(world.base, [world.artifact], adaptor=world.adapter),
        lambda: qalora.train(world.base, world.text, world.out / "x", ranks=3),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()
