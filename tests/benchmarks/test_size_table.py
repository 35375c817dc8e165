"""benchmarks/size_table.py: its tables of a tiny model, each figure a plan's."""

import importlib
from pathlib import Path

import pytest

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export_jobs
from qalora.converters.plan import ExportOptions
from qalora.quantization import quantize
from qalora.testing import random_adapter, tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_row_is_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tool = importlib.import_module("size_table")
    source = load(tiny_llama(tmp_path / "tiny", config={"tie_word_embeddings": True}))
    embedding = tool.llama_1b(4, "real").tensors[tool.EMBEDDING]
    shape = source.tensors[tool.EMBEDDING].shape

    def make(bits: int, zeros: str) -> Checkpoint:
        model = quantize(source, bits=bits, group_size=32, zeros=zeros)  # type: ignore[arg-type]
        coded = tool.replace(embedding, shape=shape)
        return tool.replace(model, tensors={**model.tensors, tool.EMBEDDING: coded})

    found = tool.sizes(make)
    lines = tool.table(found)
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [row.name for row in tool.ROWS]
    size = f"{shape[0] * shape[1] * 8.5 / 8 / 1e6:.1f} MB"
    assert lines[2].startswith(f"| GGUF | 5.00 / 5.00 / 5.00 | 8.50 ({size}) |")
    own = next(line for line in lines if line.startswith("| qalora |"))
    assert own.startswith(f"| qalora | 5.00 / 4.00 / 3.00 | 8.50 ({size}) |") and " | 1.00 | " in own
    model = make(3, "real")
    (job,) = export_jobs(model, ["mlx"], ExportOptions(), adapter=random_adapter(model, rank=16, seed=1))
    assert job.plan.device_load == found["MLX", 3].device_load and job.plan.nbytes == found["MLX", 3].folder
