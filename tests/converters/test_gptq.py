"""GPTQ folders: what is written is what is read, labels that lie, and what lies beside."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora.adapter import Adapter, to_plain_lora
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import gptq, huggingface, load
from qalora.converters.exports import export_jobs, run_jobs
from qalora.converters.gptq.forms import encode
from qalora.converters.gptq.planner import GptqPlan
from qalora.converters.plan import ExportOptions
from qalora.errors import AdapterError, ExactnessError, FormatError, InputError
from qalora.formats.gptq import pack_qweight, pack_qzeros
from qalora.formats.share import Share
from qalora.parity.runtimes.gptqmodel import open_artifact
from qalora.tensor import GroupQuantTensor
from qalora.testing import (
    assert_same_model,
    assert_same_tensor,
    lazily,
    random_adapter,
    random_model,
    random_tensor,
    tiny_model,
)

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
    """Change quantization_config of a folder and take our name out of it, and what older tools keep beside it."""
    (folder / "quantize_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= {"meta": {}, **changes}
    path.write_text(json.dumps(config), encoding="utf-8")


def edit(folder: Path, change, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


# ---- there and back


@pytest.mark.pairs(bits=BITS, group_size=[16, 32, 64, None], form=["auto", "nearest"])
def test_real_zeros_come_back_bit_for_bit(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, form: str
) -> None:
    model = quantized(tiny_untied, bits=bits, group_size=group_size)
    plan = written(model, tmp_path / "gptq", ExportOptions(gptq_form=form))
    assert plan.symmetric == (form == "auto")
    again = gptq.read(tmp_path / "gptq")
    assert_same_model(again, model)
    spec = again.tensors[f"{Q_PROJ}.weight"].spec
    assert spec is not None and (spec.zeros, spec.min_dtype) == ("real", torch.float16)
    assert again.notes == ()


@pytest.mark.pairs(bits=BITS, group_size=[16, 32, 64, None], zeros=["integer", "symmetric"])
def test_integer_zeros_keep_their_own(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, zeros: str
) -> None:
    model = quantized(tiny_untied, bits=bits, group_size=group_size, zeros=zeros)
    written(model, tmp_path / "gptq")
    assert not (tmp_path / "gptq" / "adapter_config.json").exists()
    settings = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text(encoding="utf-8"))
    label = "gptq" if zeros == "symmetric" else "gptq_v2"
    assert (settings["checkpoint_format"], settings["sym"]) == (label, zeros == "symmetric")
    assert settings["group_size"] == (group_size or -1)
    again = gptq.read(tmp_path / "gptq")
    assert_same_model(again, model)
    assert gptq.ships_adapter(again)
    spec = again.tensors[f"{Q_PROJ}.weight"].spec
    assert spec is not None and spec.zero == (1 << (bits - 1) if zeros == "symmetric" else None)


@pytest.mark.parametrize("zeros", ["real", "integer"])
def test_act_order_keeps_its_groups(tiny_untied: Path, tmp_path: Path, zeros: str) -> None:
    def shuffled(tensor: GroupQuantTensor) -> GroupQuantTensor:
        order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(0))
        return replace(tensor, g_idx=(order // tensor.group_size).int())

    model = quantized(tiny_untied, zeros=zeros, change=shuffled)
    written(model, tmp_path / "gptq")
    again = gptq.read(tmp_path / "gptq")
    assert_same_model(again, model)
    spec = again.tensors[f"{Q_PROJ}.weight"].spec
    assert spec is not None and spec.act_order


def test_rows_are_those_of_the_whole(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, bits=3)
    written(model, tmp_path / "gptq")
    lazy = gptq.read(tmp_path / "gptq").tensors[f"{Q_PROJ}.weight"]
    assert_same_tensor(lazy.rows(5, 12), lazy.load_quantized().rows(5, 12))


def test_the_same_model_gives_the_same_bytes(tiny_untied: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        written(quantized(tiny_untied), tmp_path / place)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_quantized_embedding_is_decoded(tiny_untied: Path, tmp_path: Path) -> None:
    """In float32; in float16, which is a loss, where that was allowed."""
    model = quantized(tiny_untied)
    name = "model.embed_tokens.weight"
    made = random_tensor(256, 64, bits=8, group_size=32, zeros="integer")
    model = replace(
        model, tensors={**model.tensors, name: lazily(name, made, zeros="integer", min_dtype=torch.float32)}
    )
    plan = written(model, tmp_path / "gptq")
    again = gptq.read(tmp_path / "gptq").tensors[name]
    assert again.dtype == torch.float32
    assert torch.equal(again.load_float(), made.dequantize())
    assert f"{name}: GPTQ has no codes for it, and its 8-bit ones become float32" in plan.notes[-1]
    half = written(model, tmp_path / "half", ExportOptions(allow_loss=frozenset({"embedding"})))
    (row,) = [row for row in half.tensors if row.loss is not None]
    assert (row.name, row.carrier, row.nbytes) == (name, "float16, decoded from 8 bits", 2 * 256 * 64)
    narrow = gptq.read(tmp_path / "half").tensors[name]
    assert narrow.dtype == torch.float16
    assert torch.equal(narrow.load_float(), made.dequantize().half())
    with pytest.raises(ExactnessError, match=r"float16, decoded from 8 bits.*`allow_loss` embedding"):
        half.check(())


def test_a_decoded_value_beyond_float16_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    name, made = "model.embed_tokens.weight", random_tensor(256, 64, bits=8, group_size=32, zeros="integer")
    wide = replace(made, scale=made.scale * 2.0**20, min=made.min * 2.0**20)
    lazy = lazily(name, wide, zeros="integer", scale_dtype=torch.float32, min_dtype=torch.float32)
    model = quantized(tiny_untied)
    with pytest.raises(InputError, match=rf"{name}: expected values within float16's 65504, got .*keep it in float32"):
        written(
            replace(model, tensors={**model.tensors, name: lazy}),
            tmp_path / "gptq",
            ExportOptions(allow_loss=frozenset({"embedding"})),
        )


# ---- no wider than what is held


def near_the_middle(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Zero points from half to twice the middle: min + scale * middle is then exact in float16 (Sterbenz's lemma)."""
    middle = 1 << (tensor.bits - 1)
    zero = torch.rand(tensor.scale.shape, generator=torch.Generator().manual_seed(3)) * middle + 0.55 * middle
    return replace(tensor, min=(-tensor.scale * zero).half().float())


def test_a_residual_that_float16_holds_is_float16(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, change=near_the_middle)
    plan = written(model, tmp_path / "gptq", ExportOptions(gptq_form="nearest"))
    assert plan.beside is not None
    dtypes = {name.rpartition("lora_")[2]: entry.dtype for name, entry in plan.beside.entries.items()}
    assert dtypes == {"A.weight": torch.float16, "B.weight": torch.float16}
    assert "LoRA of rank 2 in float16" in {row.carrier for row in plan.tensors}
    assert_same_model(gptq.read(tmp_path / "gptq"), model)


def test_one_value_that_float16_rounds_makes_the_residual_float32(tiny_untied: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = quantized(tiny_untied, change=near_the_middle)
    last = model.tensors[name].load_quantized()
    last.scale[5, 1], last.min[5, 1] = 1 + 2.0**-10, -40  # no code is near its zero point: C = -25 + 15 * 2**-10
    model = replace(model, tensors={**model.tensors, name: replace(model.tensors[name], read=last.rows)})
    plan = written(model, tmp_path / "gptq", ExportOptions(gptq_form="nearest"))
    assert plan.beside is not None
    assert {entry.dtype for entry in plan.beside.entries.values()} == {torch.float32}
    assert_same_model(gptq.read(tmp_path / "gptq"), model)


def test_a_residual_of_an_earlier_version_is_read(tiny_untied: Path, tmp_path: Path) -> None:
    """A in float16, B in float32."""
    folder, model = tmp_path / "gptq", quantized(tiny_untied, change=near_the_middle)
    written(model, folder)

    def as_before(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.float16 if "lora_A" in name else torch.float32)

    edit(folder, as_before, "adapter_model.safetensors")
    assert_same_model(gptq.read(folder), model)


@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.float16), (2.0**-20, torch.bfloat16)])
def test_an_adapter_of_bfloat16_ships_in_16_bits(
    tiny_untied: Path, tmp_path: Path, size: float, dtype: torch.dtype
) -> None:
    """float16 holds these values too, unless they are below its range."""
    model = quantized(tiny_untied, zeros="integer")
    wide = adapter_for(model)
    layers = {
        module: replace(layer, a=layer.a.bfloat16().float(), b=layer.b.bfloat16().float() * size)
        for module, layer in wide.layers.items()
    }
    plan = written(model, tmp_path / "gptq", ExportOptions(adapter=replace(wide, layers=layers)))
    assert plan.beside is not None
    assert {entry.dtype for entry in plan.beside.entries.values()} == {dtype}
    stored = load_file(tmp_path / "gptq" / "adapter_model.safetensors")
    for module, layer in layers.items():
        a, b = (stored[f"base_model.model.{module}.lora_{part}.weight"].float() for part in "AB")
        assert torch.equal(a, layer.a.repeat_interleave(32, dim=1)) and torch.equal(b, layer.b)


def test_the_plan_says_first_what_integer_zero_points_would_save(tiny_untied: Path) -> None:
    real, integer = (gptq.plan(quantized(tiny_untied, zeros=zeros), ExportOptions()) for zeros in ("real", "integer"))
    saved = real.files["adapter_model.safetensors"]
    assert saved is not None and integer.files.keys() == real.files.keys() - {
        "adapter_model.safetensors",
        "adapter_config.json",
        "model.safetensors.index.json",
    }
    model = huggingface.read(tiny_untied)
    shapes = [model.tensors[name].shape for name in model.linears]
    bits = 8 * saved / sum(rows * columns for rows, columns in shapes)
    rank = 4 * sum(rows + columns for rows, columns in shapes)
    assert real.notes[0] == (
        f"smaller: a base made with `zeros` integer needs no residual, {saved / 1000:.1f} kB less here "
        f"({bits:.2f} bits per weight); an adapter then lies beside it, {rank / 1000:.1f} kB for each of its ranks"
    )
    assert not any("smaller" in note for note in integer.notes)


def test_shards_and_a_quantized_output_layer_are_read(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    model = quantized(tiny_untied, zeros="integer")
    written(model, folder)
    tensors = load_file(folder / "model.safetensors")
    head = random_tensor(256, 64, bits=4, group_size=32, zeros="integer", seed=9)
    layer = encode(head, "own")
    del tensors["lm_head.weight"]
    tensors |= {
        "lm_head.qweight": pack_qweight(layer.packed),
        "lm_head.qzeros": pack_qzeros(layer.zero, 4, "gptq_v2"),
        "lm_head.scales": layer.scale.t().contiguous(),
    }
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    index = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    again = gptq.read(folder)
    assert_same_tensor(again.tensors["lm_head.weight"].load_quantized(), head)
    for name in model.linears:
        assert_same_tensor(again.tensors[name].load_quantized(), model.tensors[name].load_quantized())
    streamed = torch.cat([tile for _, tile in again.tensors["lm_head.weight"].float_tiles(5000)])
    assert torch.equal(streamed, head.dequantize())


# ---- labels that lie


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_zeros_are_told_by_their_values(tiny_untied: Path, tmp_path: Path, bits: int, stored: str) -> None:
    model = quantized(tiny_untied, bits=bits, zeros="symmetric")
    folder = tmp_path / "gptq"
    written(model, folder)
    if stored == "gptq_v2":

        def as_v2(tensors: dict[str, torch.Tensor]) -> None:
            for name in tensors:
                if name.endswith(".qzeros"):
                    zero = torch.full((tensors[name].shape[1] * 32 // bits, tensors[name].shape[0]), 1 << (bits - 1))
                    tensors[name] = pack_qzeros(zero.to(torch.uint8), bits, "gptq_v2")

        edit(folder, as_v2)
    for label in ("gptq", "gptq_v2"):
        relabel(folder, checkpoint_format=label)
        again = gptq.read(folder)
        assert_same_model(again, model)
        wrong = f"labelled {label}, but its zero points, all symmetric, are those of {stored}"
        assert [wrong in note for note in again.notes] == ([] if label == stored else [True])


def test_asymmetric_zeros_are_read_as_the_label_says_unless_the_user_does(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantized(tiny_untied, zeros="integer")
    folder = tmp_path / "gptq"
    written(model, folder)
    relabel(folder)
    again = load(folder)
    assert_same_model(again, model)
    assert "asymmetric zero points, stored as its label says: gptq_v2" in again.notes[0]
    relabel(folder, checkpoint_format="gptq")
    assert "label says: gptq;" in load(folder).notes[0]
    overridden = load(folder, checkpoint_format="gptq_v2")
    assert overridden.notes == ()
    assert_same_model(overridden, model)
    with pytest.raises(InputError, match=r"checkpoint_format: expected gptq or gptq_v2, got 'v1'"):
        load(folder, checkpoint_format="v1")


def test_a_label_of_ours_is_believed(tiny_untied: Path, tmp_path: Path) -> None:
    """Asymmetric zero points that are all 7 look like symmetric v1; our own name in meta says that they are not."""
    model = quantized(tiny_untied, zeros="integer", change=lambda tensor: replace(tensor, min=-tensor.scale * 7))
    positive = replace(model, tensors={name: without_zero_scales(lazy) for name, lazy in model.tensors.items()})
    written(positive, tmp_path / "gptq")
    assert_same_model(gptq.read(tmp_path / "gptq"), positive)


def without_zero_scales(lazy: LazyTensor) -> LazyTensor:
    if lazy.spec is None:
        return lazy
    tensor = lazy.load_quantized()
    scale = torch.where(tensor.scale == 0, 0.5, tensor.scale)
    return replace(lazy, read=replace(tensor, scale=scale, min=-scale * 7).rows)


def test_a_late_asymmetric_layer_is_refused_not_guessed(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    written(quantized(tiny_untied, zeros="symmetric"), folder)
    relabel(folder)
    last = "model.layers.1.self_attn.v_proj"  # the last by name; the first eight are looked at

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{last}.qzeros"] += 1

    edit(folder, change)
    model = gptq.read(folder)
    model.tensors[f"{Q_PROJ}.weight"].load()
    with pytest.raises(FormatError, match=r"v_proj.qzeros: expected symmetric zero points, as in the first layers"):
        model.tensors[f"{last}.weight"].load()
    gptq.read(folder, checkpoint_format="gptq").tensors[f"{last}.weight"].load()


# ---- what lies beside


def test_an_index_tells_which_weights_are_the_models(tiny_untied: Path, tmp_path: Path) -> None:
    """vLLM loads every safetensors of a folder without one, the LoRA too, and fails."""
    plan = written(quantized(tiny_untied), tmp_path / "gptq")
    index = json.loads((tmp_path / "gptq" / "model.safetensors.index.json").read_text("utf-8"))
    words = load_file(tmp_path / "gptq" / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(words, "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in words.values())
    assert "vLLM opens it" in plan.vllm and "enable_lora=True, max_lora_rank=8, " in plan.vllm  # rows of 2 and 4 groups
    assert plan.vllm in plan.notes
    assert plan.vllm in (tmp_path / "gptq" / "README.md").read_text("utf-8")


def test_another_adapter_beside_is_noted_and_not_folded(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    written(quantized(tiny_untied), folder)
    expected = gptq.read(folder)
    (folder / "adapter_model.safetensors").rename(folder / "kept.safetensors")
    note = "is an adapter of its own"
    assert note in gptq.read(folder).notes[0]  # weights missing
    (folder / "kept.safetensors").rename(folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for change in ({"lora_alpha": 4}, {"use_rslora": True}, {"peft_type": "LOHA"}, {"r": 3}, {"rank_pattern": {}}):
        path.write_text(json.dumps({**config, **change}), encoding="utf-8")
        model = gptq.read(folder)
        assert note in model.notes[0], change
        spec = model.tensors[f"{Q_PROJ}.weight"].spec
        assert spec is not None and spec.zeros == "integer"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert_same_model(gptq.read(folder), expected)


def test_a_changed_pooling_matrix_is_found(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    written(quantized(tiny_untied), folder)
    late = "model.layers.1.mlp.up_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{late}.lora_A.weight"][0, 0] = 0.5

    edit(folder, change, "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"up_proj.*lora_A: expected the pooling matrix"):
        gptq.read(folder).tensors[f"{late}.weight"].load()


def adapter_for(
    model: Checkpoint, *, pool_size: int = 32, ranks: tuple[int, ...] = (4,), factor: float = 0.75
) -> Adapter:
    return random_adapter(
        model,
        rank=ranks,
        pool_size=pool_size,
        seed=1,
        a_size=1.0,
        b_size=1.0,
        minima=None,
        convention="official",
        scaling=2.0,
        factor=factor,
    )


@pytest.mark.parametrize(("pool_size", "ranks"), [(32, (4,)), (16, (4, 3)), (64, (2, 2, 5)), (1, (3,))])
@pytest.mark.parametrize("factor", [0.75, 2.0 * 3 / 32])
def test_an_adapter_ships_as_a_plain_lora_that_adds_the_same(
    tiny_untied: Path, tmp_path: Path, pool_size: int, ranks: tuple[int, ...], factor: float
) -> None:
    """A and B are the adapter's, bit for bit, whatever its factor is made of: alpha over rank is the factor."""
    model = quantized(tiny_untied, zeros="integer")
    adapter = adapter_for(model, pool_size=pool_size, ranks=ranks, factor=factor)
    assert gptq.ships_adapter(model)
    plan = written(model, tmp_path / "gptq", ExportOptions(adapter=adapter))
    assert f"plain LoRA of rank {max(ranks)}" in plan.notes[0]
    stored = load_file(tmp_path / "gptq" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "gptq" / "adapter_config.json").read_text("utf-8"))
    for module, layer in adapter.layers.items():
        a, b = (stored[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(a, layer.a.repeat_interleave(pool_size, dim=1))
        assert torch.equal(b, layer.b)
        pattern = {key: config[f"{key}_pattern"] for key in ("alpha", "rank")}
        found = {
            key: next((of for name, of in names.items() if f".{module}".endswith(f".{name}")), config[default])
            for (key, names), default in zip(pattern.items(), ("lora_alpha", "r"), strict=True)
        }
        assert found["alpha"] / found["rank"] == factor
    again = gptq.read(tmp_path / "gptq")
    assert_same_model(again, model)
    assert "is an adapter of its own" in again.notes[0]


def test_an_adapter_needs_integer_zeros_and_its_own_model(tiny_untied: Path) -> None:
    model = quantized(tiny_untied, zeros="integer")
    adapter = adapter_for(model)
    with pytest.raises(InputError, match=r"expected a base with integer zero points, got real zero points; fold it"):
        gptq.plan(quantized(tiny_untied), ExportOptions(adapter=adapter))
    layer = adapter.layers[Q_PROJ]
    for module, got in ((Q_PROJ.replace("q_proj", "k_proj"), r"shape \[32, 64\]"), ("lm_head", r"shape")):
        wrong = replace(adapter, layers={module: layer})
        with pytest.raises(AdapterError, match=rf"adapter layer .*: expected a linear layer \[64, 64\], got {got}"):
            gptq.plan(model, ExportOptions(adapter=wrong))


def test_an_adapter_that_cannot_be_folded_ships_beside(tiny_untied: Path, tmp_path: Path) -> None:
    """An ordinary LoRA has no groups to fold into: where GPTQ is the only format, nothing has to be folded."""
    model = quantized(tiny_untied, zeros="integer")
    plain = to_plain_lora(adapter_for(model))
    (job,) = export_jobs(model, ["gptq"], ExportOptions(), adapter=plain)
    run_jobs([job], tmp_path)
    stored = load_file(tmp_path / "gptq" / "adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{Q_PROJ}.lora_A.weight"], plain.layers[Q_PROJ].a)
    with pytest.raises(InputError, match="ordinary LoRA"):
        export_jobs(model, ["gptq", "gguf"], ExportOptions(), adapter=plain)


# ---- other people's habits


def test_settings_may_lie_in_quantize_config_alone(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    model = quantized(tiny_untied, zeros="integer")
    written(model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["quantization_config"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert_same_model(load(folder), model)


def test_layers_of_their_own_width_are_read_where_config_allows_it(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    model = quantized(tiny_untied, zeros="integer")
    written(model, folder)
    other = random_tensor(64, 64, bits=8, group_size=64, zeros="integer")
    layer = encode(other, "own")
    relabel(folder, dynamic={r"+:.*\.0\..*q_proj": {"bits": 8, "group_size": 64}})

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.qweight"] = pack_qweight(layer.packed)
        tensors[f"{Q_PROJ}.qzeros"] = pack_qzeros(layer.zero, 8, "gptq_v2")
        tensors[f"{Q_PROJ}.scales"] = layer.scale.t().contiguous()
        tensors[f"{Q_PROJ}.g_idx"] = torch.zeros(64, dtype=torch.int32)

    edit(folder, change)
    again = gptq.read(folder)
    assert_same_tensor(again.tensors[f"{Q_PROJ}.weight"].load_quantized(), other)
    with pytest.raises(InputError, match="one width in all layers"):
        gptq.plan(again, ExportOptions())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_biases_that_a_family_has_not_count_for_nothing(family: str, tmp_path: Path) -> None:
    """As in GPTQModel; those of zeros, which old AutoGPTQ writes for all layers, are not worth a note."""
    folder, bias = tmp_path / "gptq", f"{Q_PROJ}.bias"
    model = quantized(tiny_model(tmp_path / "model", family), zeros="integer")
    written(model, folder)
    plain = open_artifact(folder, 1).logits([1, 2, 3])
    edit(folder, lambda tensors: tensors.update({bias: torch.zeros(64, dtype=torch.float16)}))
    assert_same_model(gptq.read(folder), model)
    assert not any(bias in note for note in gptq.read(folder).notes)
    edit(folder, lambda tensors: tensors.update({bias: torch.ones(64, dtype=torch.float16)}))
    assert torch.equal(open_artifact(folder, 1).logits([1, 2, 3]), plain)
    assert_same_model(gptq.read(folder), model)
    assert any(f"'{bias}': passed over" in note for note in gptq.read(folder).notes)


def test_settings_that_stand_twice_count_as_in_transformers(tiny_untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    model = quantized(tiny_untied, zeros="integer")
    written(model, folder)
    plain = open_artifact(folder, 1).logits([1, 2, 3])
    settings = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
    other = {**settings, "bits": 8, "group_size": 64, "damp_percent": 0.5}
    (folder / "quantize_config.json").write_text(json.dumps(other), encoding="utf-8")
    assert torch.equal(open_artifact(folder, 1).logits([1, 2, 3]), plain)
    again = gptq.read(folder)
    assert_same_model(again, model)
    (note,) = [note for note in again.notes if "quantize_config.json" in note]
    assert (
        note == "gptq: config.json counts beside quantize_config.json, which has bits 8, not 4, group_size 64, not 32"
    )
