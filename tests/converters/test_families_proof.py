"""Every family on its way: quantized, trained, an adapter folded in, held by every format, and proven in its runtime.

What its float model computes is the matter of test_families.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from in_node import IN_NODE, skip_without_node
from qalora import export
from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.families import FAMILIES
from qalora.converters.onnx import read as read_onnx
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build
from qalora.demo import demo_text
from qalora.errors import InputError
from qalora.folding import fold
from qalora.parity import verify
from qalora.quantization import quantize
from qalora.testing import assert_same_model, byte_tokenizer, random_adapter, tiny_model
from qalora.training import TrainOptions, train
from qalora.training.data import make_blocks, read_documents

TOKENS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(7))

FORMATS = ("qalora", "gptq", "gguf", "onnx", "openvino", "mlx", "hqq", "torchao")

IN_BROWSERS = tuple(name for name, family in FAMILIES.items() if family.transformersjs)
"""Families that transformers.js knows."""

CLIPPED = ("mistral", "phi3", "gemma2")
"""Families whose window of 12 tokens some runtime does not have, and is held to (docs/families.md)."""


@dataclass(frozen=True)
class Story:
    """A family's tiny model in floats and in 4 bits, an adapter on every linear layer, both folded, and that in every
    format below `root`, which is for reading only."""

    family: str
    floats: Checkpoint
    base: Checkpoint
    adapter: Adapter
    folded: Checkpoint
    root: Path

    @property
    def formats(self) -> tuple[str, ...]:
        return (*FORMATS, *(["transformersjs"] if self.family in IN_BROWSERS else []))

    @property
    def gguf(self) -> Path:
        return next((self.root / "gguf").glob("*.gguf"))


@pytest.fixture(scope="module", params=FAMILIES)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp(request.param)
    floats = load(tiny_model(root / "float", request.param, tokenizer=byte_tokenizer()))
    base = quantize(floats, bits=4, group_size=32)
    adapter = random_adapter(base, seed=1, a_size=0.05, scaling=2.0)
    folded = fold(base, adapter)
    made = Story(request.param, floats, base, adapter, folded, root)
    export(folded, made.formats, root)
    return made


def held(story: Story) -> Iterator[Checkpoint]:
    """The folded model as each format has it."""
    for name in story.formats:
        yield load(story.gguf if name == "gguf" else story.root / name)
    yield read_onnx(story.root / "onnx" / "portable")


def test_every_format_holds_the_same_model(story: Story) -> None:
    for model in held(story):
        assert_same_model(model, story.folded)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_the_folder_to_a_proof(story: Story) -> None:
    """Proven in each format's own runtime against base and adapter."""
    tokens = TOKENS[0, : 12 if story.family in CLIPPED else 40].tolist()
    artefacts = [story.gguf, *(story.root / name for name in ("onnx", "onnx/portable", "openvino", "mlx", "torchao"))]
    report = verify(story.base, artefacts, adapter=story.adapter, level="logits", tokens=tokens, threads=1)
    assert report.passed(), report.failure()


def test_the_tokenizer_comes_back_from_gguf(story: Story) -> None:
    again = load_tokenizer(load(story.gguf))
    words = "Was it 1859?\n\n  naïve 日本語 don't"
    assert again(words)["input_ids"] == load_tokenizer(story.floats)(words)["input_ids"]


@pytest.mark.slow
def test_from_the_folder_to_a_proof_in_node(story: Story) -> None:
    """In transformers.js and in onnxruntime-web; a family that the library does not know is refused by name."""
    if story.family not in IN_BROWSERS:
        with pytest.raises(
            InputError, match=f"model_type: expected one that transformers.js knows, got {story.family}; export to"
        ):
            export(story.folded, ["transformersjs"], story.root / "browsers")
        return
    skip_without_node()
    tokens, place = TOKENS[0].tolist(), story.root / "transformersjs"
    report = verify(story.base, [place], adapter=story.adapter, level="logits", tokens=tokens, threads=1)
    assert report.passed(), report.failure()
    assert {run.kind for run in report.artifacts[0].runs} == set(IN_NODE)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_training_minimises_the_loss_of_its_logits(story: Story, compute: Any, tmp_path: Path) -> None:
    """The held-out loss before the first step is that of transformers' logits; a step lowers it."""
    base = story.base
    (tmp_path / "text.txt").write_text(demo_text()[:4000], encoding="utf-8")
    out, data = tmp_path / "adapter", str(tmp_path / "text.txt")
    settings: dict[str, Any] = {"max_steps": 5, "rank": 4, "batch_size": 4, "max_length": 32, "learning_rate": 0.01}
    train(base, TrainOptions(data=data, out=out, dtype=compute, **settings))
    log = json.loads((out / "training.json").read_text("utf-8"))["held_out"]
    tokenizer = load_tokenizer(base)
    _, held_out = make_blocks(read_documents(data, tokenizer), tokenizer, 32).split(0.05)
    with torch.no_grad():
        logits = build(base)(input_ids=held_out.tokens).logits.double().flatten(0, 1)
    wanted = float(torch.nn.functional.cross_entropy(logits, held_out.targets.flatten(), ignore_index=-100))
    assert abs(log[0]["loss"] - wanted) <= 1e-5 * wanted
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_transformers_opens_the_gptq_folder(family: str, tmp_path: Path) -> None:
    """Integer zeros need no residual; GPTQModel rounds scale * (code - zero) to float16, 2**-11, in every layer."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    base = quantize(load(tiny_model(tmp_path / "float", family)), bits=4, group_size=32, zeros="integer")
    export(base, "gptq", tmp_path)
    config = GPTQConfig(bits=4, backend="gptq_torch")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32, quantization_config=config)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = theirs(TOKENS).logits
        wanted = build(base)(TOKENS).logits
    assert float((found - wanted).norm() / wanted.norm()) <= 2**-8
