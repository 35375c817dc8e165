"""Tokenizers there and back: the very same tokens in transformers, in our GGUF files, and in llama.cpp."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qalora import export
from qalora.converters import load
from qalora.converters.tokenizer import has_tokenizer, load_tokenizer
from qalora.demo import demo_text
from qalora.errors import InputError
from qalora.parity.runtimes.llamacpp import LlamaCpp
from qalora.testing import random_model

HARD = "a  b\n\n\tc 123456 3.14 naïve 日本語 🙂 <|im_start|>user don't I'LL   \r\n x=1;//"


def gguf_of(source: Path, folder: Path) -> Path:
    export(random_model(load(source)), "gguf", folder)
    (path,) = (folder / "gguf").iterdir()
    return path


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def test_our_gguf_file_gives_llama_cpp_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    """Over 20,000 characters of English about Python, and what splits badly."""
    path = gguf_of(tiny, tmp_path)
    tokenizer = load_tokenizer(load(tiny))
    runtime = LlamaCpp(path, None)
    for text in (HARD, demo_text()[:20_000]):
        assert runtime.tokenize(text) == plain(tokenizer, text)
    runtime.close()


@pytest.mark.slow
def test_the_gguf_base_gives_the_same_tokens_over_the_whole_text(smollm2: Path) -> None:
    tokenizer = load_tokenizer(load(smollm2))
    runtime = LlamaCpp(smollm2, None)
    text = demo_text()
    tokens = runtime.tokenize(text)
    assert len(tokens) > 100_000
    assert tokens == plain(tokenizer, text)
    assert runtime.tokenize(HARD) == plain(tokenizer, HARD)
    runtime.close()


def test_from_files_to_gguf_and_back(tiny: Path, tmp_path: Path) -> None:
    before, after = load_tokenizer(load(tiny)), load_tokenizer(load(gguf_of(tiny, tmp_path)))
    for text in (HARD, demo_text()[:20_000]):
        assert plain(after, text) == plain(before, text)
    assert after.eos_token == before.eos_token
    assert after.chat_template == before.chat_template


def test_a_rule_that_is_not_known_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[aeiou]"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"its rule for cutting text is none that llama\.cpp is known to have"):
        export(random_model(load(folder)), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "{}"])
def test_a_damaged_tokenizer_is_one_sentence(tiny: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer"):
        export(random_model(load(folder)), "gguf", tmp_path / "out")


def test_a_model_without_one(tiny_untied: Path) -> None:
    model = load(tiny_untied)
    assert not has_tokenizer(model)
    with pytest.raises(InputError, match=r"no tokenizer; put tokenizer\.json beside"):
        load_tokenizer(model)
