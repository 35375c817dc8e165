"""inspect, of adapters: what their files say, what PEFT and the base make of that."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qalora.adapter import Adapter, to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.inspection import AdapterReport, inspect
from qalora.quantization import quantize
from qalora.testing import random_adapter, tiny_llama
from warned import Q_PROJ, edit, warned


def made(model: Checkpoint, pool: int, *, modules: tuple[str, ...] = ()) -> Adapter:
    return random_adapter(
        model, pool_size=pool, seed=1, a_size=1.0, b_size=1.0, minima=None, scaling=2.0, modules=modules or None
    )


@pytest.fixture
def written(artefacts: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter for the model; without our record, and with other settings, as others write them."""

    def write(pool: int = 32, *, foreign: bool = False, modules: tuple[str, ...] = (), **settings: object) -> Path:
        folder = tmp_path / "adapter"
        write_adapter(made(load(artefacts / "qalora"), pool, modules=modules), folder)
        if foreign:
            (folder / "qalora_adapter.json").unlink()
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}), "utf-8")
        return folder

    return write


@pytest.mark.parametrize("based", [True, False])
def test_an_adapter_that_is_right_has_no_warning(written: Callable[..., Path], artefacts: Path, based: bool) -> None:
    report = inspect(written(), base=artefacts / "qalora" if based else None)
    assert isinstance(report, AdapterReport)
    assert report.warnings == ()
    assert (report.convention, report.layers) == ("paper", {(4, 32): 14})
    found = report.to_json()
    assert set(found) == {
        *("kind", "path", "layout", "convention", "minima", "use_qalora", "base", "parameters", "bytes", "layers"),
        *("notes", "warnings"),
    }
    assert found["layers"] == [{"count": 14, "rank": 4, "pool_size": 32}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("modules", "based"),
    [((), True), ((), False), (("q_proj", "v_proj"), False), (("up_proj", "down_proj"), False), (("k_proj",), True)],
)
def test_use_qalora_that_peft_ignored(
    source: Path, artefacts: Path, tmp_path: Path, modules: tuple[str, ...], based: bool
) -> None:
    """PEFT itself makes the adapter, over a float model, with the flag."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = list(modules or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    config = LoraConfig(r=4, target_modules=targets, use_qalora=True, qalora_group_size=16, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(tmp_path / "adapter")
    found = warned(tmp_path / "adapter", base=artefacts / "qalora" if based else None)
    assert "where pools of 16 would give" in found["qalora-ignored"].evidence
    assert f"{2 * len(targets)} of {2 * len(targets)} modules" in found["qalora-ignored"].evidence or not based


def test_use_qalora_that_peft_heeded(written: Callable[..., Path], artefacts: Path) -> None:
    folder = written(foreign=True, use_qalora=True, qalora_group_size=32)
    for base in (artefacts / "qalora", None):
        report = inspect(folder, base=base)
        assert isinstance(report, AdapterReport)
        assert (report.warnings, report.convention, report.use_qalora) == ((), "peft", True)


def test_pools_that_the_fold_takes(written: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    export(quantize(load(source), bits=4, group_size=64), ["qalora"], tmp_path)
    folder = written(pool=32)
    report = inspect(folder, base=tmp_path / "qalora")
    assert isinstance(report, AdapterReport)
    assert report.warnings == ()
    assert "splits the groups of 14 of 14 modules, 64 columns into 32" in report.notes[0]
    export(quantize(load(source), bits=4, group_size=16), ["qalora"], tmp_path / "fine")
    assert warned(folder, base=tmp_path / "fine" / "qalora") == {}  # a pool of two groups is exact


def test_a_pool_and_groups_without_a_common_measure(tmp_path: Path) -> None:
    wide = tiny_llama(tmp_path / "wide", config={"hidden_size": 96, "intermediate_size": 192, "head_dim": 24})
    export(quantize(load(wide), bits=4, group_size=32), ["qalora"], tmp_path)
    write_adapter(made(load(tmp_path / "qalora"), 48), tmp_path / "adapter")
    found = warned(tmp_path / "adapter", base=tmp_path / "qalora")
    assert (
        "a pool size that divides the group size 32 or is a multiple of it, got 48" in found["pool-mismatch"].evidence
    )


def test_what_the_base_refuses(written: Callable[..., Path], artefacts: Path, source: Path, gptq: Path) -> None:
    folder = written()
    assert "14 of 14 modules are float" in warned(folder, base=source)["float-base"].evidence
    edit(gptq, lambda tensors: tensors[f"{Q_PROJ}.g_idx"].copy_(tensors[f"{Q_PROJ}.g_idx"].flip(0)))
    assert "1 of 14 modules" in warned(folder, base=gptq)["act-order"].evidence


def test_an_ordinary_lora(artefacts: Path, tmp_path: Path) -> None:
    write_adapter(to_plain_lora(made(load(artefacts / "qalora"), 32)), tmp_path / "plain")
    assert warned(tmp_path / "plain") == {}
    assert set(warned(tmp_path / "plain", base=artefacts / "qalora")) == {"ordinary-lora"}


def test_an_adapter_of_another_model(written: Callable[..., Path], tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", config={"hidden_size": 128, "num_attention_heads": 8})
    assert "modules do not fit" in warned(written(), base=other)["other-base"].evidence


def test_an_unknown_convention(written: Callable[..., Path], artefacts: Path) -> None:
    folder = written(foreign=True)
    found = warned(folder, base=artefacts / "qalora")
    assert "2 (paper), 0.0625 (official)" in found["convention-unknown"].evidence
    assert warned(folder, base=artefacts / "qalora", convention="paper") == {}
    assert set(warned(written_again(folder, modules=("k_proj",)))) >= {"pool-unknown"}


def written_again(folder: Path, modules: tuple[str, ...]) -> Path:
    """The adapter with some modules only, so that no other tells how wide their inputs are."""

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.split(".")[-3] not in modules]:
            del tensors[name]

    edit(folder, keep, "adapter_model.safetensors")
    return folder


def test_values_of_an_adapter(written: Callable[..., Path]) -> None:
    folder = written()

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"][0, 0] = torch.nan
        tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"].zero_()

    edit(folder, damage, "adapter_model.safetensors")
    found = warned(folder)
    assert found["not-finite"].evidence == f"lora_A of {Q_PROJ}: 1 of 8 values"
    assert found["all-zero"].evidence == f"lora_B of {Q_PROJ}"
