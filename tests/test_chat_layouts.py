"""The layouts that others test with: what their tokenizers make of text, and what their configs name."""

from pathlib import Path

import pytest

from qalora.converters import load
from qalora.converters.tokenizer import load_tokenizer
from qalora.testing import CHAT_LAYOUTS, chat_layout, chat_model

TEXT = "Hello there, don't  stop: 1234 naïve 日本語\n\n x = 1 🙂"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "No"}]


@pytest.mark.parametrize("name", CHAT_LAYOUTS)
def test_a_layout_is_a_tokenizer_and_its_ids(name: str) -> None:
    layout = chat_layout(name)
    tokenizer = layout.tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) > 30, "nothing is unknown"
    assert len(tokenizer) <= layout.rows == layout.config["vocab_size"]
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    turns = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert set(turns) & set(tokenizer.added_tokens_decoder), "turns are made of special tokens"
    assert layout.token(tokenizer.eos_token) == tokenizer.eos_token_id


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gemma2", "qwen2.5"])
def test_a_model_of_a_layout_says_what_it_is_told(name: str, tmp_path: Path) -> None:
    """A family whose norms add one, and one whose embedding has more rows than the tokenizer has tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    layout = chat_layout(name)
    says = layout.tokenizer.eos_token
    folder = chat_model(tmp_path, name, says=says)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(load(folder))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[0]
    assert set(logits.argmax(dim=1).tolist()) == {layout.token(says)}
    assert model.generation_config.eos_token_id == layout.generation["eos_token_id"]
