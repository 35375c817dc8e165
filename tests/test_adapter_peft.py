"""Our adapters against PEFT: what it writes we read, what we write it opens silently and computes the same with.

PEFT's QA-LoRA is its GPTQLoraLinear with the QALoraLinearVariant. Registered for nn.Linear it runs that very forward
over float weights, without a GPTQ kernel and its rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qalora.adapter import Adapter, AdapterLayer, convert, read_adapter, to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

# tiny_llama's linears have in = 64 or 128 and out = 32, 64 or 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tiny_untied: Path) -> Checkpoint:
    return load(tiny_untied)


def _transformer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _as_gptq(config: Any) -> Any:
    """The config, with every nn.Linear treated as PEFT treats a GPTQ layer."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config._register_custom_module({torch.nn.Linear: GPTQLoraLinear})
    return config


def _open(folder: Path, adapter: Path, *, qalora: bool) -> Any:
    config = peft.PeftConfig.from_pretrained(str(adapter))
    if qalora:
        _as_gptq(config)
    return peft.PeftModel.from_pretrained(_transformer(folder), str(adapter), config=config)


def _lora_modules(model: Any) -> dict[str, Any]:
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if hasattr(module, "lora_A") and "default" in module.lora_A}


def _random_adapter(base: Checkpoint, convention: str, pools: tuple[int, ...], *, seed: int = 0) -> Adapter:
    """Layers with ranks 2, 3, 2, 3, ..., the pool sizes in turn, factors that no two layers share."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for n, name in enumerate(base.linears):
        out, columns = base.tensors[name].shape
        pool, rank = pools[n % len(pools)], 2 + n % 2
        layers[name.removesuffix(".weight")] = AdapterLayer(
            a=torch.randn(rank, columns // pool, generator=rng),
            b=torch.randn(out, rank, generator=rng),
            pool_size=pool,
            scaling=0.1 * (n + 1),
            factor=0.1 * (n + 1),
        )
    return convert(Adapter(layers=layers, convention="paper"), convention)  # type: ignore[arg-type]


def _delta(layer: AdapterLayer) -> torch.Tensor:
    return layer.factor * (layer.b.double() @ layer.a.double()).repeat_interleave(layer.pool_size, dim=1)


def _check_side_branch(module: Any, layer: AdapterLayer) -> None:
    """PEFT's forward, less its base layer, against x @ dW^T."""
    x = torch.randn(5, layer.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        branch = (module(x) - module.base_layer(x)).double()
    terms = layer.factor * (layer.b.double().abs() @ layer.a.double().abs()).repeat_interleave(layer.pool_size, dim=1)
    # float32: sums of in, in/pool and rank terms, and of the base layer's output, each step 2^-24 of what it sums
    size = x.abs().double() @ terms.T + module.base_layer(x).abs().double()
    assert ((branch - x.double() @ _delta(layer).T).abs() <= (layer.shape[1] + 40) * 2.0**-24 * size).all()


@pytest.mark.parametrize("pools", [(16,), (64,), (16, 64)])
def test_peft_opens_what_we_write_and_computes_the_same(
    base: Checkpoint, tiny_untied: Path, tmp_path: Path, pools: tuple[int, ...]
) -> None:
    ours = _random_adapter(base, "official", pools)
    write_adapter(ours, tmp_path / "adapter", convention="peft")
    modules = _lora_modules(_open(tiny_untied, tmp_path / "adapter", qalora=True))
    assert set(modules) == set(ours.layers)
    for name, layer in ours.layers.items():
        module = modules[name]
        pool = module.qalora_group_size["default"]
        repeated = layer.a.repeat_interleave(layer.pool_size // pool, dim=1)
        assert torch.equal(module.lora_A["default"].weight, repeated)
        assert torch.equal(module.lora_B["default"].weight, layer.b)
        # alpha/r, * in/p, / p: three roundings, and the one of alpha itself
        assert module.scaling["default"] * (layer.shape[1] // pool) / pool == pytest.approx(layer.factor, rel=2**-50)
        _check_side_branch(module, layer)


def test_a_plain_lora_is_the_same_adapter_to_peft(base: Checkpoint, tiny_untied: Path, tmp_path: Path) -> None:
    ours = _random_adapter(base, "peft", (16, 32))
    write_adapter(to_plain_lora(ours), tmp_path / "plain")
    modules = _lora_modules(_open(tiny_untied, tmp_path / "plain", qalora=False))
    for name, layer in ours.layers.items():
        got = modules[name].get_delta_weight("default").double()
        size = layer.factor * (layer.b.double().abs() @ layer.a.double().abs()).repeat_interleave(
            layer.pool_size, dim=1
        )
        assert ((got - _delta(layer)).abs() <= (layer.rank + 2) * 2.0**-24 * size).all()  # float32 sum of rank terms


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trains_we_read(base: Checkpoint, tiny_untied: Path, tmp_path: Path, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS,
        use_rslora=rslora,
        use_qalora=True,
        qalora_group_size=32,
        rank_pattern={"q_proj": 2, r"model\.layers\.1\.mlp\.(gate|up)_proj": 6, "k_proj|v_proj": 3},
        alpha_pattern={r"layers.[0-9]+.self_attn.o_proj": 5, "1.self_attn.q_proj": 7.5, ".*up_proj": 100, ".*_proj": 9},
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(_transformer(tiny_untied), _as_gptq(config))
    modules = _lora_modules(model)
    torch.manual_seed(0)
    for module in modules.values():
        torch.nn.init.normal_(module.lora_B["default"].weight)
    model.save_pretrained(str(tmp_path / "adapter"))
    # it sorts the expressions when it saves, so that another one may be the first to match: the file is what counts
    modules = _lora_modules(_open(tiny_untied, tmp_path / "adapter", qalora=True))
    for adapter in (read_adapter(tmp_path / "adapter", base), read_adapter(tmp_path / "adapter")):
        assert adapter.convention == "peft"
        assert set(adapter.layers) == set(modules)
        for name, layer in adapter.layers.items():
            module = modules[name]
            assert torch.equal(layer.a, module.lora_A["default"].weight)
            assert torch.equal(layer.b, module.lora_B["default"].weight)
            assert layer.scaling == module.scaling["default"]
            assert layer.pool_size == 32
            _check_side_branch(module, layer)


def test_peft_ignores_the_flag_on_other_layers_and_so_do_we(
    base: Checkpoint, tiny_untied: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_qalora=True, qalora_group_size=32)
    model = peft.get_peft_model(_transformer(tiny_untied), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    adapter = read_adapter(tmp_path / "adapter", base)
    assert {layer.pool_size for layer in adapter.layers.values()} == {1}
    assert {layer.factor for layer in adapter.layers.values()} == {1.5}
