"""What verify runs and says of a right artefact in each format, of a wrong one, and where memory is short."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qalora.adapter import write_adapter
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.errors import InputError
from qalora.parity import verify
from qalora.parity.html import to_html
from qalora.parity.reference import Forward, Reference
from qalora.parity.runtimes.padding import pad, positions, unpad
from qalora.testing import assert_parity

RUNS = {
    "qalora": ["torch"],
    "onnx": ["onnxruntime", "onnxruntime", "onnx.reference"],
    "openvino": ["openvino"],
    "gguf": ["llama.cpp"],
    "gptq": ["gptqmodel"],
    "mlx": ["mlx"],
    "hqq": ["hqq"],
    "torchao": ["torchao"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", RUNS)
def test_a_right_artefact_passes_in_every_way_of_running_it(form: str, base, adapter, made) -> None:
    """Whole, a token at a time, in a batch of several lengths, and layer by layer."""
    report = verify(base, [made(form, "folded")], adapter=adapter, level="logits", max_tokens=96)
    assert report.passed(), report.failure()
    runs = [run for found in report.artifacts for run in found.runs]
    cuda = ["onnxruntime-cuda"] * (2 if form == "onnx" and torch.cuda.is_available() else 0)
    assert sorted(run.kind for run in runs) == sorted(RUNS[form] + cuda)
    for run in runs:
        assert run.stepwise is not None and run.stepwise.tokens == 32
        assert run.batch is not None and run.batch.tokens == 32 + 21 + 8
        assert {"cache", "batch"} <= {result.gate for result in run.gates}
        assert len(run.layers) == 2
        assert all(0 <= layer.error <= layer.bound < 0.1 for layer in run.layers)
        assert run.fault is None


def test_a_fault_behind_the_last_layer_is_put_there(base: Checkpoint, write, tmp_path: Path) -> None:
    lazy = base.tensors["model.norm.weight"]
    values = lazy.load_float() * 1.01
    norm = LazyTensor(name=lazy.name, shape=lazy.shape, dtype=torch.float32, read=lambda a, b: values[a:b])
    wrong = replace(base, tensors={**base.tensors, lazy.name: norm})
    report = verify(base, [write("qalora", wrong, tmp_path)], level="logits", max_tokens=40)
    fault = report.artifacts[0].runs[0].fault
    assert fault is not None
    assert fault.startswith("every layer is within its bound: what follows the last one")


def test_short_of_memory_is_not_proven_and_the_reference_reads_anew(base: Checkpoint, made) -> None:
    report = verify(base, [made("qalora", "base")], level="logits", max_tokens=16, memory=100_000)
    (gate,) = report.artifacts[0].runs[0].gates
    assert (gate.gate, gate.status) == ("memory", "not proven")
    assert "of memory, and there are 0.0" in gate.detail
    assert not report.passed()
    assert report.passed(allow_unproven=True)
    tokens = list(range(5, 25))
    kept, streamed = Reference(base), Reference(base, memory=100_000)
    assert (kept.streamed, streamed.streamed) == (False, True)
    assert torch.equal(kept.logits(tokens, Forward()), streamed.logits(tokens, Forward()))


def test_a_suite_of_the_user_s_own_asserts_it(base, adapter, folded, write, tmp_path: Path) -> None:
    write_adapter(adapter, tmp_path / "adapter")
    base_place, right = write("qalora", base, tmp_path / "base"), write("qalora", folded, tmp_path / "right")
    assert_parity(base_place, [right], adapter=tmp_path / "adapter", level="weights")
    with pytest.raises(AssertionError, match=r"base/qalora: minima [\d,]+, bound 0 \(model\.layers\.0\."):
        assert_parity(base_place, [base_place.parent], adapter=tmp_path / "adapter", level="weights")


def test_every_prompt_is_continued(base: Checkpoint, made) -> None:
    place = made("qalora", "base")
    report = verify(base, [place], prompts=["The first", "A second one"], generate=5, max_tokens=16)
    (run,) = report.artifacts[0].runs
    assert [len(made.tokens) for made in run.generations] == [5, 5]
    assert run.generations[0].tokens != run.generations[1].tokens
    with pytest.raises(InputError, match="prompt: expected at least one token, got an empty one"):
        verify(base, [place], prompts=[""], max_tokens=16)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8_is_a_row_to_compare_with(base, adapter, made) -> None:
    """It loses what our artefacts keep, and no gate judges it."""
    place = made("qalora", "folded")
    report = verify(base, [place], adapter=adapter, level="logits", max_tokens=40, dynamic_int8=True)
    assert report.passed(), report.failure()
    ours, theirs = report.artifacts[0].runs[0], report.comparison
    assert theirs is not None and theirs.runtime is not None
    assert theirs.runtime.backend.startswith("dynamic INT8")
    assert theirs.gates == ()
    assert ours.lost is not None and theirs.lost is not None
    assert theirs.lost > 100 * ours.lost
    assert report.runs()[-1] == ("reference", theirs)
    assert report.to_json()["comparison"]["kind"] == "dynamic INT8"
    assert "not judged" in to_html(report)
    assert verify(base, [place], adapter=adapter, level="weights").comparison is None


def test_progress_goes_up_to_all_of_it(base: Checkpoint, made) -> None:
    seen: list[tuple[str, float]] = []
    place = made("onnx", "base").parent
    verify(base, [place], level="logits", max_tokens=16, progress=lambda stage, share: seen.append((stage, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert {"reference", f"running {place.name}/onnx"} <= {stage for stage, _ in seen}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_filled_up_on_one_side_and_comes_back(side) -> None:
    sequences = [[5, 6, 7], [8], [9, 10]]
    ids, mask = pad(sequences, side)
    assert mask.sum(dim=1).tolist() == [3, 1, 2]
    assert ids[1].tolist() == ([0, 0, 8] if side == "left" else [8, 0, 0])
    assert [row.tolist() for row in unpad(ids, sequences, side)] == sequences
    assert [row.tolist() for row in unpad(positions(mask), sequences, side)] == [[0, 1, 2], [0], [0, 1]]
