"""GPTQ folders: losses are stated, what cannot be is refused, damage is found; each in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora.checkpoint import Checkpoint
from qalora.converters import gptq, huggingface
from qalora.converters.gptq.planner import GptqPlan
from qalora.converters.plan import ExportOptions
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.share import Share
from qalora.tensor import GroupQuantTensor, unpack_codes
from qalora.testing import assert_same_model, lazily, random_model, random_tensor

BITS = (2, 3, 4, 8)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def quantized(source: Path, **options: Any) -> Checkpoint:
    return random_model(huggingface.read(source), **options)


def written(model: Checkpoint, folder: Path, options: ExportOptions | None = None) -> GptqPlan:
    options = options or ExportOptions()
    plan = gptq.plan(model, options)
    plan.check(options.allow_loss)
    folder.mkdir()
    reported = []
    gptq.write(plan, model, folder, lambda name, nbytes: reported.append((name, nbytes)), Share())
    assert sum(nbytes for _, nbytes in reported) == sum(tensor.nbytes for tensor in plan.tensors)
    for name, size in plan.files.items():
        assert size is None or (folder / name).stat().st_size == size, name
    return plan


def relabel(folder: Path, **changes: object) -> None:
    """Change quantization_config of a folder and take our name out of it."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= {"meta": {}, **changes}
    path.write_text(json.dumps(config), encoding="utf-8")


def edit(folder: Path, change, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


# ---- losses, and refusals


def test_rounded_zeros_are_a_loss(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied)
    options = ExportOptions(gptq_form="round")
    with pytest.raises(ExactnessError, match=r"14 tensors like it.*`allow_loss` zeros"):
        gptq.plan(model, options).check(options.allow_loss)
    written(model, tmp_path / "gptq", replace(options, allow_loss=frozenset({"zeros"})))
    again = gptq.read(tmp_path / "gptq")
    for name in model.linears:
        got, expected = again.tensors[name].load_quantized(), model.tensors[name].load_quantized()
        assert torch.equal(got.packed, expected.packed)
        held = expected.scale != 0
        zero = torch.round(-expected.min[held] / expected.scale[held]).clamp(0, 15)
        assert torch.equal(got.min[held], -expected.scale[held] * zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_eight_bits_take_the_best_multiplier(tiny_untied: Path, tmp_path: Path, bits: int) -> None:
    """Against a slow search over every multiplier for each group, by the worst weight of the group."""
    model = quantized(tiny_untied, bits=bits, change=near_zeros)
    options = ExportOptions(gptq_form="eight-bit")
    with pytest.raises(ExactnessError, match=r"`allow_loss` eight-bit"):
        gptq.plan(model, options).check(options.allow_loss)
    written(model, tmp_path / "gptq", replace(options, allow_loss=frozenset({"eight-bit"})))
    name = f"{Q_PROJ}.weight"
    got = gptq.read(tmp_path / "gptq").tensors[name].load_quantized()
    expected = model.tensors[name].load_quantized()
    assert got.bits == 8
    difference = (got.dequantize().double() - expected.dequantize().double()).abs()
    codes = unpack_codes(expected.packed, bits)
    for row in range(6):
        for group in range(expected.groups):
            columns = slice(group * 32, group * 32 + 32)
            found = float(difference[row, columns].max())
            best = slow_best(expected.scale[row, group].item(), expected.min[row, group].item(), bits)
            assert found <= best + 1e-9, (row, group)  # both in float64 but for dequantize's float32: 2^-24 of 1e-2
            used = got.codes()[row, columns].long()
            steps = {int(c): int(u) for c, u in zip(codes[row, columns], used, strict=True)}
            assert len(set(steps.values())) == len(steps) or expected.scale[row, group] == 0


def near_zeros(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Real zero points in and a little beyond 0..2**bits-1, as a fold gives them."""
    top = (1 << tensor.bits) - 1
    rng = torch.Generator().manual_seed(7)
    zero = torch.rand(tensor.scale.shape, generator=rng) * (top + 1) - 0.5
    minimum = torch.where(tensor.scale == 0, 0.25, -tensor.scale * zero)
    return replace(tensor, min=minimum.half().float())


def slow_best(scale: float, minimum: float, bits: int) -> float:
    """The smallest worst error over all multipliers m and offsets k that 8 bits have room for."""
    top = (1 << bits) - 1
    if scale == 0:
        return 0.0
    best = float("inf")
    for m in range(1, 255 // top + 1):
        step = torch.tensor(scale / m, dtype=torch.float64).half().double().item()
        z = round(m * -minimum / scale)
        if not any(0 <= z + k <= 255 and m * top + k <= 255 for k in range(256)):
            continue
        best = min(best, max(abs(step * (m * q - z) - (scale * q + minimum)) for q in range(top + 1)))
    return best


def test_integer_zeros_of_six_bits_go_into_eight_exactly(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, bits=6, zeros="integer")
    written(model, tmp_path / "gptq", ExportOptions(gptq_form="eight-bit"))
    again = gptq.read(tmp_path / "gptq")
    for name in model.linears:
        assert torch.equal(again.tensors[name].load_float(), model.tensors[name].load_float())


def test_wide_scales_are_a_loss_only_where_they_are_wide(tiny_untied: Path, tmp_path: Path) -> None:
    narrow = quantized(tiny_untied, zeros="integer", scale_dtype=torch.float32)
    gptq.plan(narrow, ExportOptions()).check(())

    def widen(tensor: GroupQuantTensor) -> GroupQuantTensor:
        scale = tensor.scale * (1 + 2.0**-14)
        return replace(tensor, scale=scale, min=-scale * 3)

    wide = quantized(tiny_untied, zeros="integer", scale_dtype=torch.float32, change=widen)
    with pytest.raises(ExactnessError, match=r"float32 scales rounded to float16.*`allow_loss` scales"):
        gptq.plan(wide, ExportOptions()).check(())
    written(wide, tmp_path / "gptq", ExportOptions(allow_loss=frozenset({"scales"})))
    got = gptq.read(tmp_path / "gptq").tensors[f"{Q_PROJ}.weight"].load_quantized()
    expected = wide.tensors[f"{Q_PROJ}.weight"].load_quantized()
    assert torch.equal(got.scale, expected.scale.half().float())
    assert torch.equal(got.min, -got.scale * 3)


def tiny_minima(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Minima so far below the scales that float32 does not hold min + scale * z."""
    return replace(tensor, min=torch.full_like(tensor.min, 2.0**-40 * 3))


def test_float32_minima_are_exact_or_a_stated_loss(tiny_untied: Path, tmp_path: Path) -> None:
    def fine(exponent: int):
        return lambda tensor: replace(tensor, min=tensor.min + 2.0**exponent)

    held = quantized(tiny_untied, min_dtype=torch.float32, change=fine(-24))
    written(held, tmp_path / "held")
    assert_same_model(gptq.read(tmp_path / "held"), held)
    beyond = quantized(
        tiny_untied,
        min_dtype=torch.float32,
        change=tiny_minima,
    )
    with pytest.raises(ExactnessError, match=r"LoRA of rank 4 in float32: .*`allow_loss` residual"):
        gptq.plan(beyond, ExportOptions()).check(())
    written(beyond, tmp_path / "beyond", ExportOptions(allow_loss=frozenset({"residual"})))
    got = gptq.read(tmp_path / "beyond").tensors[f"{Q_PROJ}.weight"].load_quantized()
    # C is at most 8 * 0.0215 + tiny < 0.25, so it is rounded by at most 2^-27, and min by that and its own rounding
    assert float((got.min - 2.0**-40 * 3).abs().max()) <= 2.0**-26


def test_a_promise_of_narrow_minima_that_is_not_held_is_found_while_writing(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, change=tiny_minima)
    plan = gptq.plan(model, ExportOptions())
    plan.check(())
    (tmp_path / "gptq").mkdir()
    with pytest.raises(ExactnessError, match=r"expected a residual that float32 holds"):
        gptq.write(plan, model, tmp_path / "gptq", lambda name, nbytes: None, Share())


def test_what_gptq_cannot_hold_is_refused_with_a_way_out(tiny_untied: Path) -> None:
    def refused(model: Checkpoint, message: str, **options: object) -> None:
        with pytest.raises(InputError, match=message):
            gptq.plan(model, ExportOptions(**options))

    refused(huggingface.read(tiny_untied), r"holds floats; quantize the model first")
    for bits in (5, 6):
        refused(quantized(tiny_untied, bits=bits), rf"gptq at {bits} bits: expected 2, 3, 4 or 8 bits; export to gguf")
    refused(quantized(tiny_untied, group_size=8), r"group_size: expected one of 16, .* got 8; quantize with")
    refused(quantized(tiny_untied, bits=8), r"form eight-bit: expected fewer than 8 bits", gptq_form="eight-bit")
    refused(quantized(tiny_untied), r"gptq_form: expected one of auto", gptq_form="best")
    mixed = quantized(tiny_untied)
    other = quantized(tiny_untied, bits=8).tensors[f"{Q_PROJ}.weight"]
    refused(replace(mixed, tensors={**mixed.tensors, f"{Q_PROJ}.weight": other}), r"expected one width in all layers")
    odd = lazily(f"{Q_PROJ}.weight", random_tensor(60, 64, bits=4, group_size=32))
    refused(
        replace(mixed, tensors={**mixed.tensors, f"{Q_PROJ}.weight": odd}),
        r"out a multiple of 8 at 4 bits, got \[60, 64\]",
    )


# ---- damaged and foreign folders


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


DAMAGES = {
    "no scales": (drop(f"{Q_PROJ}.scales"), {}, r"q_proj: missing tensor scales"),
    "float zeros": (
        put(f"{Q_PROJ}.qzeros", torch.zeros(2, 64, dtype=torch.float16)),
        {},
        r"q_proj.qzeros: expected torch.int32 with 2 dimensions, got torch.float16 \[2, 64\]; float zero points",
    ),
    "zeros of another shape": (
        put(f"{Q_PROJ}.qzeros", torch.zeros(2, 7, dtype=torch.int32)),
        {},
        r"q_proj.qzeros: expected shape \[2, 8\], got \[2, 7\]",
    ),
    "scales of another shape": (
        put(f"{Q_PROJ}.scales", torch.ones(4, 64, dtype=torch.float16)),
        {},
        r"q_proj.scales: expected 2 groups of 32 in 64 columns, got 4",
    ),
    "g_idx of another length": (
        put(f"{Q_PROJ}.g_idx", torch.zeros(65, dtype=torch.int32)),
        {},
        r"q_proj.g_idx: expected shape \[64\], got \[65\]",
    ),
    "a vector of words": (
        put(f"{Q_PROJ}.qweight", torch.zeros(512, dtype=torch.int32)),
        {},
        r"q_proj.qweight: expected torch.int32 with 2 dimensions",
    ),
    "no words": (
        put(f"{Q_PROJ}.qweight", torch.zeros(0, 64, dtype=torch.int32)),
        {},
        r"q_proj: expected 4-bit rows in equal groups",
    ),
    "another width": (None, {"bits": 8}, r"down_proj.scales: expected 2 groups of 32 in 64 columns, got 4"),
    "a width that is planar": (None, {"bits": 5}, r"bits: expected one of 2, 3, 4, 8, got 5"),
    "another method": (None, {"quant_method": "awq"}, r"quant_method: expected gptq, got 'awq'"),
    "a group size of nothing": (None, {"group_size": 0}, r"group_size: expected -1 or a whole number from 1, got 0"),
    "marlin words": (
        None,
        {"checkpoint_format": "marlin"},
        r"checkpoint_format: expected gptq or gptq_v2, got 'marlin'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_a_sentence(tiny_untied: Path, tmp_path: Path, damage: str) -> None:
    change, settings, message = DAMAGES[damage]
    folder = tmp_path / "gptq"
    written(quantized(tiny_untied, zeros="integer"), folder)
    if change is not None:
        edit(folder, change)
    if settings:
        relabel(folder, **settings)
    with pytest.raises(FormatError, match=message):
        gptq.read(folder)


def test_damage_in_values_is_found_when_they_are_read(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    written(quantized(tiny_untied, zeros="integer"), folder)
    edit(folder, lambda tensors: tensors[f"{Q_PROJ}.scales"].fill_(float("nan")))
    with pytest.raises(FormatError, match=r"q_proj.weight: scale: expected finite values, got NaN or Inf"):
        gptq.read(folder).tensors[f"{Q_PROJ}.weight"].load()
    other = Q_PROJ.replace("q_proj", "k_proj")
    edit(folder, put(f"{other}.g_idx", torch.full((64,), 2, dtype=torch.int32)))
    with pytest.raises(FormatError, match=r"k_proj.weight: g_idx: expected values in 0..1, got 2..2"):
        gptq.read(folder).tensors[f"{other}.weight"].load()


def test_a_folder_without_quantized_layers_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    written(quantized(tiny_untied, zeros="integer"), folder)
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".qweight")])
    with pytest.raises(FormatError, match=r"expected tensors named <layer>.qweight, got none"):
        gptq.read(folder)
