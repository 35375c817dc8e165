"""Every family: its adapters as GGUF LoRA and in ONNX slots, and our own folder in transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.families import FAMILIES
from qalora.converters.gguf.lora import read_lora, write_lora
from qalora.converters.onnx.slots import write_adapter_file
from qalora.converters.plan import ExportOptions
from qalora.converters.torch_module import build
from qalora.parity.foldcheck import compare_adapters
from qalora.parity.runtimes import open_runtime
from qalora.parity.runtimes.llamacpp import LlamaCpp
from qalora.quantization import quantize
from qalora.testing import assert_same_model, byte_tokenizer, random_adapter, tiny_model

TOKENS = [(7 * n) % 200 for n in range(11)]
"""Fewer than the tiny models' windows, which llama.cpp does not have for every family."""


@dataclass(frozen=True)
class Case:
    """A family's tiny float model, an adapter on every linear layer, and what both give in float64 and float32."""

    model: Checkpoint
    adapter: Adapter
    base: torch.Tensor
    adapted: torch.Tensor
    noise: float


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = load(tiny_model(tmp_path_factory.mktemp("model"), request.param, tokenizer=byte_tokenizer()))
    adapter = random_adapter(model, seed=1, a_size=0.1, b_size=0.1, minima=None, scaling=0.5)
    module = build(model).double()
    base = module(input_ids=torch.tensor([TOKENS])).logits[0].detach()
    for name, layer in adapter.layers.items():
        change = 0.5 * (layer.b.double() @ layer.a.double())
        module.get_submodule(name).weight.add_(change.repeat_interleave(32, dim=1))
    adapted = module(input_ids=torch.tensor([TOKENS])).logits[0].detach()
    single = module.float()(input_ids=torch.tensor([TOKENS])).logits[0].detach()
    noise = float((single - adapted).abs().max())
    return Case(model, adapter, base, adapted, noise)


def test_llama_cpp_applies_the_lora(case: Case, tmp_path: Path) -> None:
    """Within torch's noise in float32; where gelu is a table of float16, within twice what it costs the base alone."""
    export(case.model, ["gguf"], tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    write_lora(case.adapter, case.model, tmp_path / "lora.gguf")
    assert compare_adapters(read_lora(tmp_path / "lora.gguf", case.model), case.adapter) == ()
    plain, adapted = LlamaCpp(file, 1), LlamaCpp(file, 1, lora=tmp_path / "lora.gguf")
    table = float((plain.logits(TOKENS).double() - case.base).abs().max())
    bound = max(16 * case.noise, 2 * table)
    assert float((adapted.logits(TOKENS).double() - case.adapted).abs().max()) <= bound
    assert float((plain.logits(TOKENS).double() - case.adapted).abs().max()) > 20 * bound
    plain.close()
    adapted.close()


def test_onnx_runtime_fills_the_slots(case: Case, tmp_path: Path) -> None:
    export(case.model, ["onnx"], tmp_path, ExportOptions(lora_slots=frozenset(case.adapter.layers)))
    write_adapter_file(case.adapter, None, tmp_path / "a.onnx_adapter")
    adapter, run = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(tmp_path / "a.onnx_adapter"))
    run.add_active_adapter(adapter)
    for graph in ("model.onnx", "portable/model.onnx"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / graph), options, ["CPUExecutionProvider"])
        for used, wanted in ((run, case.adapted), (None, case.base)):
            found = torch.from_numpy(session.run(["logits"], _feed(session), used)[0][0]).double()
            assert float((found - wanted).abs().max()) <= 16 * case.noise


def _feed(session: Any) -> dict[str, Any]:
    feed: dict[str, Any] = {}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values"):
            feed[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32)
        else:
            ids = node.name == "input_ids"
            feed[node.name] = np.array([TOKENS]) if ids else np.ones((1, len(TOKENS)), dtype=np.int64)
    return feed


def test_transformers_opens_our_folder(case: Case, tmp_path: Path) -> None:
    model = quantize(case.model, bits=4, group_size=32)
    export(model, ["qalora"], tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "qalora")
    with torch.inference_mode():
        found = module(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert torch.equal(found, open_runtime("torch", tmp_path / "qalora").logits(TOKENS))
    module.save_pretrained(tmp_path / "copy")
    assert_same_model(load(tmp_path / "copy"), model)
