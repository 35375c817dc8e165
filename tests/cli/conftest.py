"""Valid things of every kind, which the tests of bad input damage."""

import shutil
from pathlib import Path

import pytest

from qalora.adapter import write_adapter
from qalora.converters import load
from qalora.converters.exports import export
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama
from targets import OF_REAL_ZEROS

pytest.register_assert_rewrite("bad_input")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid things: float, qalora, a folder of each other format, adapter, other_adapter, data.txt."""
    root = tmp_path_factory.mktemp("good")
    tiny_llama(root / "float", tokenizer=byte_tokenizer(), config={"num_hidden_layers": 1})
    model = quantize(load(root / "float"), bits=4, group_size=32)
    export(model, OF_REAL_ZEROS, root)
    next((root / "gguf").glob("*.gguf")).rename(root / "gguf" / "model.gguf")
    write_adapter(random_adapter(model, rank=2, a_size=1.0, b_size=1e-3), root / "adapter")
    other = tiny_llama(root / "other", config={"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 128})
    foreign = random_adapter(quantize(load(other), group_size=32), rank=2, a_size=1.0, b_size=1e-3)
    write_adapter(foreign, root / "other_adapter")
    (root / "data.txt").write_text("some text to learn from. " * 200, encoding="utf-8")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy of the valid things, to be damaged."""
    shutil.copytree(good, tmp_path / "in")
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "letters").write_text("dear", encoding="utf-8")
    return tmp_path
