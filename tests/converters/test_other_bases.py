"""Bases that other projects' tools have packed, on their way: trained, an adapter folded in, exported and proven."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packed import by_auto_round, by_compressed_tensors, by_gptqmodel_awq, by_torchao
from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.demo import demo_text
from qalora.folding import fold
from qalora.inspection import inspect
from qalora.parity import verify
from qalora.testing import assert_same_model, byte_tokenizer, random_adapter, tiny_llama
from qalora.training import TrainOptions, train

pytestmark = pytest.mark.filterwarnings("ignore")

GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
}

BASES: dict[str, Callable[[Path, Path], object]] = {
    "compressed-tensors": lambda source, folder: by_compressed_tensors(source, folder, {"group_0": GROUP}, moved=False),
    "awq": lambda source, folder: by_gptqmodel_awq(source, folder, moved=False),
    "auto-round": lambda source, folder: by_auto_round(source, folder, "auto_round", moved=False),
    "torchao": lambda source, folder: by_torchao(source, folder, moved=False),
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("base")
    source = tiny_llama(root / "float", tokenizer=byte_tokenizer())
    BASES[request.param](source, root / "packed")
    model = load(root / "packed")
    assert (model.layout, model.quantized, model.tied) == (request.param, True, True)
    return model


def test_a_fold_is_the_same_in_every_format(base: Checkpoint, tmp_path: Path) -> None:
    adapter = random_adapter(base, seed=1, a_size=0.05, scaling=2.0)
    folded = fold(base, adapter)
    export(folded, ("gptq", "gguf", "onnx"), tmp_path)
    places = [tmp_path / "gptq", next((tmp_path / "gguf").glob("*.gguf")), tmp_path / "onnx"]
    for place in places:
        assert_same_model(load(place), folded)
    report = verify(base, places[1:], adapter=adapter, level="logits", tokens=list(range(3, 40)), threads=1)
    assert report.passed(), report.failure()


def test_a_training_lowers_the_loss(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(demo_text()[:4000], encoding="utf-8")
    out, data = tmp_path / "adapter", str(tmp_path / "text.txt")
    settings: dict[str, Any] = {"max_steps": 5, "rank": 4, "batch_size": 4, "max_length": 32, "learning_rate": 0.01}
    train(base, TrainOptions(data=data, out=out, **settings))
    log = json.loads((out / "training.json").read_text("utf-8"))["held_out"]
    assert log[-1]["loss"] < log[0]["loss"]


def test_inspect_knows_it_and_warns_of_nothing(base: Checkpoint) -> None:
    report = inspect(base.path)
    assert report.layout == base.layout
    assert {finding.code for finding in report.warnings} == {"no-chat-template"}
