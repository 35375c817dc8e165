"""A GGUF base and a GGUF LoRA beside it, proven as one artefact in llama.cpp; and what is wrong with a pair."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters.gguf.lora import write_lora
from qalora.errors import InputError
from qalora.parity import verify
from qalora.parity.artifacts import recognize

TOKENS = [(7 * n) % 300 for n in range(64)]


@pytest.fixture
def pair(base: Checkpoint, adapter: Adapter, made: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A folder with the base as a GGUF file, and the adapter as a LoRA."""
    folder = tmp_path / "gguf"
    shutil.copytree(made("gguf", "base"), folder)
    write_lora(adapter, base, folder / "adapter.gguf")
    return folder


def test_the_pair_is_one_artefact(pair: Path) -> None:
    (artifact,) = recognize([pair])
    assert (artifact.kind, artifact.lora) == ("gguf", pair / "adapter.gguf")


def test_base_and_adapter_are_read_back(pair: Path, base: Checkpoint, adapter: Adapter) -> None:
    report = verify(base, [pair], adapter=adapter, level="weights")
    assert report.passed()
    assert report.artifacts[0].holds == "base and adapter"


@pytest.mark.slow
def test_it_is_proven_in_llama_cpp(pair: Path, base: Checkpoint, adapter: Adapter) -> None:
    report = verify(base, [pair], adapter=adapter, tokens=TOKENS, generate=4, threads=1)
    assert report.passed(), report.failure()
    (run,) = report.artifacts[0].runs
    assert run.lost is not None
    assert run.lost < 0.2  # 8-bit activations; 1 without the adapter


@pytest.mark.slow
def test_another_adapter_beside_it_fails(pair: Path, base: Checkpoint, adapter: Adapter) -> None:
    """B's rows in transformers' order: what forgetting the permutation would give."""
    module = "model.layers.0.self_attn.q_proj"
    layers = {**adapter.layers, module: replace(adapter.layers[module], b=adapter.layers[module].b.flip(0))}
    (pair / "adapter.gguf").unlink()
    other = replace(adapter, layers=layers)
    write_lora(other, base, pair / "adapter.gguf")
    report = verify(base, [pair], adapter=adapter, tokens=TOKENS, generate=4, threads=1)
    assert not report.passed()
    assert module in report.failure()
    assert any(gate.status == "fail" for run in report.artifacts[0].runs for gate in run.gates)


def test_a_lora_without_a_word_about_it(pair: Path, base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.gguf is an adapter beside the model; give it as `adapter`"):
        verify(base, [pair], level="weights")


def test_two_loras_or_no_model(pair: Path, base: Checkpoint, adapter: Adapter) -> None:
    write_lora(adapter, base, pair / "second.gguf")
    with pytest.raises(InputError, match="expected one GGUF model, and one LoRA, in its folder"):
        recognize([pair])
    (pair / "second.gguf").unlink()
    next(path for path in pair.glob("*.gguf") if path.name != "adapter.gguf").unlink()
    with pytest.raises(InputError, match="is a LoRA"):
        recognize([pair])
