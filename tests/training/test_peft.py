"""An adapter trained here, opened by PEFT over the GPTQ base it was trained on: PEFT's QA-LoRA forward, our logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import qalora
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.demo import demo_text
from qalora.parity.runtimes import open_runtime
from qalora.tensor import GroupQuantTensor, integer_zeros
from qalora.testing import random_model


def coarse(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """Scales that are powers of two: the kernel's float16 weights scale * (q - z) are then exact."""
    zero = integer_zeros(tensor)
    assert zero is not None
    scale = torch.full_like(tensor.scale, 2.0**-6)
    return replace(tensor, scale=scale, min=-scale * zero)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of gptqmodel and peft
@pytest.mark.parametrize("minima", ["float32", "float16"])
def test_peft_computes_what_was_trained(tiny: Path, tmp_path: Path, minima: Any) -> None:
    model = random_model(load(tiny), zeros="integer", change=coarse)
    qalora.export(model, "gptq", tmp_path)
    (tmp_path / "text.txt").write_text(demo_text()[:8000], encoding="utf-8")
    base = load(tmp_path / "gptq")
    settings = {"max_steps": 8, "rank": 4, "batch_size": 2, "max_length": 32, "learning_rate": 0.01}
    adapter = qalora.train(
        base, tmp_path / "text.txt", tmp_path / "adapter", convention="peft", minima=minima, **settings
    )
    tokens = [(11 * n) % 300 for n in range(30)]
    runtime: Any = open_runtime("gptqmodel", tmp_path / "gptq")
    bare = runtime.logits(tokens).double()
    runtime._module = peft.PeftModel.from_pretrained(runtime._module, str(tmp_path / "adapter")).eval()
    assert any(config.use_qalora for config in runtime._module.peft_config.values())
    theirs = runtime.logits(tokens).double()

    ids = torch.tensor([tokens])
    module = build(qalora.fold(base, adapter))
    single = module(input_ids=ids).logits[0].detach().double()
    trained = module.double()(input_ids=ids).logits[0].detach()
    noise = float((single - trained).abs().max())
    effect = float((trained - bare).norm())
    assert effect > 1
    error = theirs - trained
    if minima == "float32":
        # the fold rounds to float32, PEFT's side branch sums in float32: both are noise like torch's own
        assert float(error.abs().max()) <= 8 * noise
    else:
        # float16 minima of -2^-6 * z, up to 2^-2 in size: 2^-13 of rounding at most, against what was learned
        assert float(error.norm()) <= 0.02 * effect
        assert float(error.abs().max()) > 8 * noise, "the rounding is there, and PEFT does not know it"
