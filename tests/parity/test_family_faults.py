"""What goes wrong where a family differs from a Llama: each fault, planted into a written artefact, fails a gate."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.parity import ParityReport, verify
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_model

TOKENS = [(7 * n) % 200 for n in range(40)]
Written = Callable[[str, str], tuple[Checkpoint, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Gives the base and the folder of a family in a target, written once."""
    made: dict[str, tuple[Checkpoint, Path]] = {}

    def get(family: str, target: str) -> tuple[Checkpoint, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = quantize(load(tiny_model(root / "float", family, tokenizer=byte_tokenizer())), group_size=32)
            export(base, ["gguf", "onnx"], root)
            made[family] = base, root
        base, root = made[family]
        return base, root / target

    return get


def failed(report: ParityReport) -> set[str]:
    return {result.gate for _, result in report.results() if result.status == "fail"}


def nodes(graph: Any, ending: str) -> list[Any]:
    """The nodes whose first output ends so, at least one."""
    found = [node for node in graph.node if node.output[0].endswith(ending)]
    assert found
    return found


def gate_and_up_swapped(graph: Any) -> None:
    for node in nodes(graph, ".gate"):
        node.output[:] = list(reversed(node.output))


def halves_rotated(graph: Any) -> None:
    for node in [*nodes(graph, ".q_rotated"), *nodes(graph, ".k_rotated")]:
        (interleaved,) = (attribute for attribute in node.attribute if attribute.name == "interleaved")
        interleaved.i = 0


def passed_over(ending: str) -> Callable[[Any], None]:
    """The nodes that end so give their first input as it is."""

    def plant(graph: Any) -> None:
        for node in nodes(graph, ending):
            del node.input[1:]
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]

    return plant


def normed_after(graph: Any) -> None:
    """Norms of keys take what is not rotated, and what they give is rotated: the other order."""
    for n in range(2):
        (rotated,) = nodes(graph, f"layer{n}.k_rotated")
        (split,) = nodes(graph, f"layer{n}.k_by_head")
        (flat,) = nodes(graph, f"layer{n}.k_flat")
        (attention,) = nodes(graph, f"layer{n}.attended")
        unrotated = rotated.input[0]
        split.input[0], rotated.input[0], attention.input[1] = unrotated, flat.output[0], rotated.output[0]
        order = [split, flat]
        at = list(graph.node).index(rotated)
        kept = [node for node in graph.node if node not in order and node.output[0] != f"layer{n}.k_normed"]
        moved = [node for node in graph.node if node in order or node.output[0] == f"layer{n}.k_normed"]
        del graph.node[:]
        graph.node.extend([*kept[:at], *moved, *kept[at:]])


GRAPHS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "gate and up swapped": ("glm4", gate_and_up_swapped),
    "halves rotated where neighbours are": ("glm4", halves_rotated),
    "a norm after attention left out": ("olmo2", passed_over("0.mixed_normed")),
    "a norm over all heads left out": ("olmo2", passed_over("1.q_normed")),
    "what is added not scaled": ("granite", passed_over("0.down_scaled")),
    "logits not divided": ("granite", passed_over("logits")),
    "queries that do not grow": ("ministral3", passed_over(".q_tempered")),
    "norms before the rotation": ("hunyuan_v1_dense", normed_after),
}


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_fault_in_a_graph_fails_a_gate(fault: str, written: Written, tmp_path: Path) -> None:
    family, plant = GRAPHS[fault]
    base, folder = written(family, "onnx")
    shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    plant(model.graph)
    onnx.save(model, tmp_path / "onnx" / "model.onnx")
    report = verify(base, [tmp_path / "onnx" / "model.onnx"], level="logits", tokens=TOKENS, threads=1)
    assert "logits" in failed(report), report.failure()


NUMBERS = {
    "granite.embedding_scale": "embedding_multiplier",
    "granite.residual_scale": "residual_multiplier",
    "granite.attention.scale": "attention scale",
    "granite.logit_scale": "logits_scaling",
    "mistral3.attention.temperature_scale": "rope.llama_4_scaling_beta",
}
"""Keys of GGUF, and what the gate says of another number there."""


@pytest.mark.parametrize("key", NUMBERS)
def test_another_number_in_a_gguf_file_fails_a_gate(key: str, written: Written, tmp_path: Path) -> None:
    base, folder = written("granite" if key.startswith("granite") else "ministral3", "gguf")
    content = bytearray(next(folder.glob("*.gguf")).read_bytes())
    at = content.index(key.encode()) + len(key)
    assert struct.unpack_from("<I", content, at) == (6,)  # a float32
    struct.pack_into("<f", content, at + 4, 0.75)
    (tmp_path / "edited.gguf").write_bytes(content)
    report = verify(base, [tmp_path / "edited.gguf"], level="weights")
    assert "config" in failed(report)
    assert f"{NUMBERS[key]}: 0.75 instead of" in report.failure()
