"""A tiny model in every format, to be inspected as it is or damaged."""

import shutil
from pathlib import Path

import pytest

from qalora.converters import load
from qalora.converters.exports import export
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_llama
from targets import OF_REAL_ZEROS

pytest.register_assert_rewrite("warned")

TEMPLATE = "{{ messages }}"


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama with tokenizer and chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_llama(tmp_path_factory.mktemp("source"), tokenizer=tokenizer)


@pytest.fixture(scope="package")
def artefacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model at 4 bits in groups of 32, with real zero points as every format, with integer ones as GPTQ."""
    root = tmp_path_factory.mktemp("artefacts")
    real = quantize(load(source), bits=4, group_size=32)
    export(real, [name for name in OF_REAL_ZEROS if name != "gptq"], root)
    export(quantize(load(source), bits=4, group_size=32, zeros="integer"), ["gptq"], root / "integer")
    export(real, ["gptq"], root / "real")
    return root


@pytest.fixture
def gptq(artefacts: Path, tmp_path: Path) -> Path:
    """A copy of the GPTQ folder with integer zero points, to be damaged."""
    return Path(shutil.copytree(artefacts / "integer" / "gptq", tmp_path / "gptq"))
