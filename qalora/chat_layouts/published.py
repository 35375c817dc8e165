"""What is published of each family's chat model, in terms of tokens' texts; chat templates in shape, not in words."""

from __future__ import annotations

from typing import Any

from qalora.chat_layouts.facts import CHATML, SPACE, Facts
from qalora.chat_layouts.later import LATER

__all__ = ["LAYOUTS"]

_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif"
    " %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_PHI4_MINI_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_PLAIN = _MISTRAL.replace("[/INST]", " [/INST]").replace("' ' + m", "m")
_NEMO = _MISTRAL.replace("'[INST] '", "'[INST]'").replace("' ' + m", "m")
_QWEN3 = CHATML.replace(
    "assistant\n' }}{% endif",
    "assistant\n' + ('' if enable_thinking | default(true) else '<think>\n\n</think>\n\n') }}{% endif",
)

_LLAMA3_FIRST = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>")
_LLAMA3_LAST = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
_QWEN_ENDS = ["<|im_end|>", "<|endoftext|>"]
_THOUGHTS = ("<think>", "</think>")
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>")
_GEMMA_PLAIN = ("<unused0>", "\n", "\n\n", SPACE * 2, SPACE * 3, "<table>", "</table>")
_PHI3_STRIPPED = ("<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")
_PHI4_TOKENS = ("<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_85|>")
_PHI4_MINI = ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>", "<|/tool|>", "<|tag|>")
_MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]")

_LLAMA3_FACTS: dict[str, Any] = {
    "family": "llama",
    "cut": "llama-bpe",
    "template": _LLAMA3,
    "last": (*_LLAMA3_FIRST, *_LLAMA3_LAST),
    "bos": "<|begin_of_text|>",
    "begins": True,
}
_LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_QWEN_FACTS: dict[str, Any] = {
    "cut": "qwen2",
    "pad": "<|endoftext|>",
    "kind": "Qwen2Tokenizer",
    "adds": True,
    "rows": 32,
    "settings": {"use_sliding_window": False, "sliding_window": 256, "max_window_layers": 2},
}
_GEMMA_FACTS: dict[str, Any] = {
    "cut": "gemma",
    "template": _GEMMA,
    "plain": ("<mask>", *_GEMMA_PLAIN),
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "begins": True,
    "kind": "GemmaTokenizer",
    "adds": True,
}
_MISTRAL_FACTS: dict[str, Any] = {
    "family": "mistral",
    "bos": "<s>",
    "eos": "</s>",
    "begins": True,
    "adds": True,
    "config": {"bos": "<s>", "eos": "</s>"},
    "generation": {"bos": "<s>", "eos": "</s>"},
}

LAYOUTS: dict[str, Facts] = {
    "llama3": Facts(
        **_LLAMA3_FACTS,
        eos="<|eot_id|>",
        config={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        generation={"bos": "<|begin_of_text|>", "eos": ["<|end_of_text|>", "<|eot_id|>"]},
    ),
    "llama3.1": Facts(
        **_LLAMA3_FACTS,
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        config={"bos": "<|begin_of_text|>", "eos": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
        generation={"bos": "<|begin_of_text|>", "eos": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
        settings={"rope_scaling": {**_LLAMA3_ROPE, "original_max_position_embeddings": 64}, "rope_theta": 500000.0},
    ),
    "llama3-base": Facts(
        **_LLAMA3_FACTS,
        eos="<|end_of_text|>",
        config={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        generation={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
    ),
    "gemma2": Facts(
        family="gemma2",
        first=(*_GEMMA_TOKENS, *_GEMMA_PLAIN[1:]),
        **_GEMMA_FACTS,
        config={"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
        generation={"bos": "<bos>", "eos": ["<eos>", "<end_of_turn>"], "pad": "<pad>"},
        settings={"sliding_window": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": Facts(
        family="gemma3_text",
        first=(*_GEMMA_TOKENS, "<start_of_image>", *_GEMMA_PLAIN[1:]),
        **_GEMMA_FACTS,
        apart=True,
        config={"bos": "<bos>", "eos": ["<eos>", "<end_of_turn>"], "pad": "<pad>"},
        generation={"bos": "<bos>", "eos": ["<eos>", "<end_of_turn>"], "pad": "<pad>"},
    ),
    "phi3": Facts(
        family="phi3",
        cut="llama",
        template=_PHI3,
        first=("<unk>", "<s>", "</s>"),
        last=("<|endoftext|>", *_PHI3_STRIPPED),
        plain=("</s>",),
        right=("</s>", *_PHI3_STRIPPED),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        kind="LlamaTokenizer",
        adds=True,
        config={"bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        generation={"bos": "<s>", "eos": ["<|endoftext|>", "<|assistant|>", "<|end|>"], "pad": "<|endoftext|>"},
        settings={"sliding_window": 255},
    ),
    "phi4": Facts(
        family="phi3",
        cut="smaug-bpe",
        template=_PHI4,
        last=_PHI4_TOKENS,
        right=_PHI4_TOKENS,
        left=_PHI4_TOKENS,
        bos="<|endoftext|>",
        eos="<|im_end|>",
        pad="<|dummy_85|>",
        kind="GPT2Tokenizer",
        config={"bos": "<|endoftext|>", "eos": "<|im_end|>", "pad": "<|dummy_85|>"},
        generation={"bos": "<|endoftext|>", "eos": "<|im_end|>", "pad": "<|dummy_85|>"},
        settings={"sliding_window": None},
    ),
    "phi4-mini": Facts(
        family="phi3",
        cut="gpt-4o",
        template=_PHI4_MINI_CHAT,
        last=("<|endoftext|>", "<|endofprompt|>", *_PHI4_MINI),
        plain=("<|tool|>", "<|/tool|>"),
        right=_PHI4_MINI,
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        kind="GPT2Tokenizer",
        adds=True,
        rows=32,
        config=dict.fromkeys(("bos", "eos", "pad"), "<|endoftext|>"),
        generation={"bos": "<|endoftext|>", "eos": ["<|end|>", "<|endoftext|>"], "pad": "<|endoftext|>"},
        settings={"partial_rotary_factor": 0.75, "sliding_window": 262144},
    ),
    "qwen2.5": Facts(
        family="qwen2",
        **_QWEN_FACTS,
        template=CHATML,
        last=(*_QWEN_SPECIAL, *_QWEN_PLAIN),
        plain=_QWEN_PLAIN,
        eos="<|im_end|>",
        config={"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        generation={"bos": "<|endoftext|>", "eos": _QWEN_ENDS, "pad": "<|endoftext|>"},
    ),
    "qwen2.5-base": Facts(
        family="qwen2",
        **_QWEN_FACTS,
        template=CHATML,
        last=(*_QWEN_SPECIAL, *_QWEN_PLAIN),
        plain=_QWEN_PLAIN,
        eos="<|endoftext|>",
        config={"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
        generation={"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    ),
    "qwen3": Facts(
        family="qwen3",
        **_QWEN_FACTS,
        template=_QWEN3,
        last=(*_QWEN_SPECIAL, *_QWEN_PLAIN, *_THOUGHTS),
        plain=(*_QWEN_PLAIN, *_THOUGHTS),
        eos="<|im_end|>",
        config={"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        generation={"bos": "<|endoftext|>", "eos": _QWEN_ENDS, "pad": "<|endoftext|>"},
    ),
    "mistral": Facts(
        **_MISTRAL_FACTS,
        cut="mistral",
        template=_MISTRAL,
        first=_MISTRAL_TOKENS,
        kind="LlamaTokenizer",
        settings={"sliding_window": None},
    ),
    "mistral-v0.1": Facts(
        **_MISTRAL_FACTS,
        cut="llama",
        template=_MISTRAL_PLAIN,
        first=("<unk>", "<s>", "</s>"),
        kind="LlamaTokenizer",
        settings={"sliding_window": 256},
    ),
    "mistral-nemo": Facts(
        **_MISTRAL_FACTS,
        cut="tekken",
        template=_NEMO,
        first=_MISTRAL_TOKENS,
        kind="GPT2Tokenizer",
        settings={"sliding_window": None, "head_dim": 32},
    ),
    "smollm2": Facts(
        family="llama",
        cut="smollm",
        template=CHATML,
        first=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",
        kind="GPT2Tokenizer",
        config={"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"},
        generation={"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"},
    ),
    "smollm3": Facts(
        family="smollm3",
        cut="llama-bpe",
        template=CHATML,
        last=(*_LLAMA3_FIRST, *_LLAMA3_LAST, "<|im_start|>", "<|im_end|>", *_THOUGHTS),
        plain=_THOUGHTS,
        bos=None,
        eos="<|im_end|>",
        pad="<|im_end|>",
        apart=True,
        config={"bos": "<|begin_of_text|>", "eos": "<|im_end|>", "pad": "<|finetune_right_pad_id|>"},
        generation={"bos": "<|begin_of_text|>", "eos": "<|im_end|>", "pad": "<|finetune_right_pad_id|>"},
    ),
    **LATER,
}
