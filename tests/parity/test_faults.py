"""The test of the tester: each planted fault fails exactly the gate that is meant to catch it, in every format.

A format joins with one entry in OF_REAL_ZEROS, a fault with one in FAULTS.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from other_keys import with_another_rope_key
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import InputError
from qalora.parity import ParityReport, verify
from qalora.tensor import GroupQuantTensor, pack_codes
from targets import OF_REAL_ZEROS

Change = Callable[[GroupQuantTensor], GroupQuantTensor]
Plant = Callable[[Checkpoint, Checkpoint, Path], Checkpoint]
"""Makes a wrong model of the folded one and the base; the folder is for files that it needs."""


def changed(model: Checkpoint, name: str, change: Change) -> Checkpoint:
    """The model with one tensor changed as it is read whole."""
    lazy = model.tensors[name]

    def read(start: int, stop: int) -> GroupQuantTensor:
        return change(lazy.load_quantized()).rows(start, stop)

    return replaced(model, replace(lazy, read=read))


def replaced(model: Checkpoint, lazy: LazyTensor) -> Checkpoint:
    """The model with another tensor of the same name."""
    return replace(model, tensors={**model.tensors, lazy.name: lazy})


def one_code(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """One code flips its lowest bit."""
    codes = tensor.codes().clone()
    codes[5, 0] ^= 1
    return replace(tensor, packed=pack_codes(codes, tensor.bits))


def one_scale_ulp(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """One scale goes to float16's next value."""
    scale = tensor.scale.half()
    scale.view(torch.int16)[5, 1] += 1
    return replace(tensor, scale=scale.float())


def zero_off_by_one(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Every zero point is one too large, as where gptq and gptq_v2 are confused; minima in float16 as ever."""
    return replace(tensor, min=(tensor.min - tensor.scale).half().float())


def one_zero_off_by_one(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """One group's zero point is one too large."""
    minimum = tensor.min.clone()
    minimum[5, 1] = (tensor.min[5, 1] - tensor.scale[5, 1]).half().float()
    return replace(tensor, min=minimum)


def float16_zeros(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Zero points rounded to float16, as HQQ keeps them, and minima made of those again."""
    zero = (-tensor.min / torch.where(tensor.scale == 0, 1.0, tensor.scale)).half().float()
    minimum = torch.where(tensor.scale == 0, tensor.min, (-tensor.scale * zero).half().float())
    return replace(tensor, min=minimum)


def permuted_rows(tensor: GroupQuantTensor, heads: int) -> GroupQuantTensor:
    """Rows of each head in llama.cpp's rotary order: [2, d/2] -> [d/2, 2]."""
    rows = torch.arange(tensor.shape[0]).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return replace(tensor, packed=tensor.packed[rows], scale=tensor.scale[rows], min=tensor.min[rows])


LAYER = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def layer(change: Change) -> Plant:
    return lambda folded, base, place: changed(folded, LAYER, change)


def adapter_left_out(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    return replaced(folded, base.tensors[LAYER])


def norm_off_by_an_ulp(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    values = folded.tensors[NORM].load_float().clone()
    values.view(torch.int32)[3] += 1
    return replaced(
        folded,
        LazyTensor(
            name=NORM, shape=tuple(values.shape), dtype=torch.float32, read=lambda start, stop: values[start:stop]
        ),
    )


def other_rope(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    rope = {**folded.config.get("rope_parameters", {}), "rope_type": "default", "rope_theta": 20000.0}
    return replace(folded, config={**folded.config, "rope_parameters": rope})


def keys_that_disagree(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    """A rope_scaling beside rope_parameters, as a model card tells to add it: transformers takes the former."""
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    return replace(folded, config={**folded.config, "rope_scaling": scaling})


def other_tokenizer(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    """Two words have changed places in the vocabulary."""
    content = json.loads(folded.files["tokenizer.json"].read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["\u0120the"], vocabulary["\u0120of"] = vocabulary["\u0120of"], vocabulary["\u0120the"]
    changed_file = place / "other-tokenizer.json"
    changed_file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return replace(folded, files={**folded.files, "tokenizer.json": changed_file})


def other_flags(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    """A special token is none: a text that has it is cut into letters."""
    content = json.loads(folded.files["tokenizer.json"].read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|tool|>"]
    changed_file = place / "other-flags.json"
    changed_file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return replace(folded, files={**folded.files, "tokenizer.json": changed_file})


def other_template(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    """A turn ends without its line."""
    text = folded.files["chat_template.jinja"].read_text("utf-8")
    changed_file = place / "other-template.jinja"
    changed_file.write_text(text.replace("'<|im_end|>\n'", "'<|im_end|>'"), encoding="utf-8")
    return replace(folded, files={**folded.files, "chat_template.jinja": changed_file})


def another_end_token(folded: Checkpoint, base: Checkpoint, place: Path) -> Checkpoint:
    """Generation ends at a word as well."""
    content = json.loads(folded.files["generation_config.json"].read_text("utf-8"))
    changed_file = place / "other-generation.json"
    changed_file.write_text(json.dumps({**content, "eos_token_id": [content["eos_token_id"], 300]}), encoding="utf-8")
    return replace(folded, files={**folded.files, "generation_config.json": changed_file})


FAULTS: dict[str, tuple[Plant, str]] = {
    "one code": (layer(one_code), "codes"),
    "one scale by an ULP": (layer(one_scale_ulp), "scale"),
    "one zero off by one": (layer(one_zero_off_by_one), "minima"),
    "zeros off by one": (layer(zero_off_by_one), "minima"),
    "zeros in float16": (layer(float16_zeros), "minima"),
    "q not permuted": (layer(lambda tensor: permuted_rows(tensor, heads=4)), "rows"),
    "adapter left out of a layer": (adapter_left_out, "minima"),
    "a norm by an ULP": (norm_off_by_an_ulp, "floats"),
    "another rope base": (other_rope, "config"),
    "rope keys that disagree": (keys_that_disagree, "config"),
    "another tokenizer": (other_tokenizer, "tokenizer"),
    "another added token's flags": (other_flags, "tokenizer"),
    "another chat template": (other_template, "tokenizer"),
    "another end token": (another_end_token, "end"),
}


WORDS = {
    "another added token's flags": "'<|tool|>'",
    "another chat template": "chat template",
    "rope keys that disagree": "rope.factor: 4.0 instead of None",
}
OTHER_WORDS = "2 tokens have other ids, such as '\u0120the' is "


def failed(report: ParityReport) -> set[str]:
    return {result.gate for _, result in report.results() if result.status != "pass"}


@pytest.mark.parametrize("form", OF_REAL_ZEROS)
def test_what_is_right_passes(form: str, base, adapter, made) -> None:
    report = verify(base, [made(form, "folded")], adapter=adapter, level="weights")
    assert failed(report) == set(), report.failure()
    assert report.passed() and report.failure() == ""


@pytest.mark.parametrize("form", OF_REAL_ZEROS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_its_gate(form: str, fault: str, base, adapter, folded, write, tmp_path: Path) -> None:
    plant, gate = FAULTS[fault]
    report = verify(base, [write(form, plant(folded, base, tmp_path), tmp_path)], adapter=adapter, level="weights")
    assert failed(report) == {gate}
    assert not report.passed(allow_unproven=True)
    place = {"floats": NORM, "config": "rope_theta", "tokenizer": OTHER_WORDS, "end": "it ends at 300"}.get(gate, LAYER)
    assert WORDS.get(fault, place) in report.failure()


@pytest.mark.parametrize("form", OF_REAL_ZEROS)
def test_rope_keys_of_a_file_that_disagree_fail_their_gate(form: str, base, adapter, made, tmp_path: Path) -> None:
    """By other means than ours: the artefact is edited after it was written. A graph's own tables count, and it is
    refused."""
    place = with_another_rope_key(made(form, "folded"), tmp_path / "edited")
    if form in ("onnx", "openvino", "transformersjs", "mnn"):
        with pytest.raises(InputError, match=r"rotary\.\S+: expected rotary positions as config\.json says"):
            verify(base, [place], adapter=adapter, level="weights")
        return
    report = verify(base, [place], adapter=adapter, level="weights")
    assert failed(report) == {"config"}
    assert "rope.factor: 4.0 instead of None" in report.failure()


OF_TEXT = ("another tokenizer", "another added token's flags", "another chat template", "another end token")
UNFELT = ("a norm by an ULP", *OF_TEXT)
"""The first is float32's noise; with the others, every runtime gets the same ids."""

OF_POSITIONS = ("another rope base", "rope keys that disagree")
LARGE = ("zeros off by one", "q not permuted", "adapter left out of a layer", *OF_POSITIONS)
"""Faults that no rounding of inputs hides; the others are below the 8 bits that some kernels round them to."""

HIDDEN = ("gguf", "adapter left out of a layer")
"""In a model this small one layer's adapter is less than what 8-bit inputs do; the weights read back show it."""

FELT = {
    "qalora": "logits",
    "mlx": "logits",
    "hqq": "logits",
    "torchao": "logits",
    "onnx": "logits",
    "openvino": "logits",
    "gptq": "kernel rounding",
    "gguf": "activation rounding",
}
"""The gate on logits of each format's own runtime, where it tells what each layer gives: Node does not."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "fault"),
    [("qalora", fault) for fault in FAULTS if fault not in UNFELT]
    + [(form, fault) for form in FELT if form != "qalora" for fault in LARGE if (form, fault) != HIDDEN],
)
def test_a_planted_fault_is_felt_in_the_logits(
    form: str, fault: str, base, adapter, folded, write, tmp_path: Path
) -> None:
    """And it is put down to the layer that has it; other positions are felt from the first layer on.

    On one thread: several that wait for one another take longer than all there is to compute.
    """
    plant, _ = FAULTS[fault]
    artifact = write(form, plant(folded, base, tmp_path), tmp_path)
    report = verify(base, [artifact], adapter=adapter, level="logits", max_tokens=64, threads=1)
    for run in (run for found in report.artifacts for run in found.runs):
        gates = {result.gate for result in run.gates if result.status == "fail"}
        assert gates >= {"adapter" if run.rounding == "lora" else FELT[form]}, run.kind
        layer, what = (0, "are the reference's") if fault in OF_POSITIONS else (1, "differ: self_attn.q_proj")
        assert run.fault is not None
        assert f"first at fault is layer {layer}: " in run.fault
        assert what in run.fault
