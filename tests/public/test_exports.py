"""Exports and their proofs: every keyword does what it says, one effect for each, and none without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file

import qalora
from elsewhere import Elsewhere
from folders import same_files
from public_world import Effects, World, assert_no_engine, spec_of, unrecorded
from qalora.adapter import read_adapter, write_adapter
from qalora.converters import load
from qalora.converters.onnx.files import accuracy_level
from qalora.errors import ExactnessError, InputError, OutputError
from qalora.folding import fold
from qalora.formats.gguf import read_header
from qalora.quantization import quantize as quantize_model
from qalora.testing import assert_same_model

effect = Effects("exports")


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
        with pytest.raises(InputError, match=f"`{next(iter(option))}` needs an adapter to fold"):
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


@effect("export", "jobs", "engine")
def _(world: World) -> None:
    for name, jobs in (("a", 1), ("b", 2)):
        world.exported("gguf", name, jobs=jobs)
    assert same_files(world.out / "a", world.out / "b")
    assert_no_engine(lambda **given: world.exported("gguf", "c", **given))


@effect("verify", "jobs", "engine")
def _(world: World) -> None:
    reports = [world.verified(level="weights", jobs=jobs) for jobs in (1, 2)]
    assert reports[0] == reports[1]
    assert_no_engine(lambda **given: world.verified(level="weights", **given))


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
    for form in ("quantized", "float32"):
        place = world.exported("onnx", form, coded, onnx_embedding=form)
        graph = onnx.load(place / "model.onnx", load_external_data=False).graph
        looked_up = any(item.name.startswith("model.embed_tokens.table") for item in graph.initializer)
        assert looked_up == (form == "quantized")


@effect("export", "compressed_scales")
def _(world: World) -> None:
    for dtype in ("float16", "float32"):
        place = world.exported("compressed-tensors", dtype, world.whole, compressed_scales=dtype)
        stored = load_file(place / "model.safetensors")
        assert {str(value.dtype) for name, value in stored.items() if name.endswith("_scale")} == {f"torch.{dtype}"}


@effect("export", "onnx_graphs")
def _(world: World) -> None:
    for graphs, files in (("both", 2), ("fast", 1), ("portable", 1)):
        assert len([*world.exported("onnx", graphs, onnx_graphs=graphs).rglob("model.onnx")]) == files


@effect("export", "openvino_precision")
def _(world: World) -> None:
    for precision, asked in (("float32", True), ("fast", False)):
        place = world.exported("openvino", precision, openvino_precision=precision)
        assert ("KV_CACHE_PRECISION" in (place / "openvino_model.xml").read_text("utf-8")) == asked


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


@effect("verify", "device")
def _(world: World) -> None:
    with Elsewhere("mps:0") as place:
        report = world.verified(level="logits", device="mps:0")
    assert place.there["mm"]
    assert (report.device, world.verified(level="logits").device) == ("mps", "cpu")
    assert report.passed()
    with pytest.raises(InputError, match="abacus"):
        world.verified(device="abacus")


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


# all of them


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's dynamic INT8
@effect.parametrized()
def test_a_keyword_does_what_it_says(proof: Callable[[World], None], world: World) -> None:
    proof(world)


def test_every_keyword_has_an_effect_here() -> None:
    assert not effect.missing()
