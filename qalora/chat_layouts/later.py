"""What is published of the chat models of the later families, in terms of tokens' texts.

From what public code has of them: ERNIE 4.5 (transformers' conversion of its tokenizer), Seed-OSS (llama.cpp: its chat
template, its rule), Hunyuan (its rule in llama.cpp, templates in several runtimes), EXAONE 4 (tokens and template in
Ollama's renderer), and of all of them what llama.cpp's converter calls their rules. From memory: the flags and the
order of tokens, the special tokens of OLMo, Granite and GLM-4, templates of these and of Ministral 3, whether BOS
stands before a text, and which end tokens generation_config.json lists.
"""

from __future__ import annotations

from typing import Any

from qalora.chat_layouts.facts import Facts

__all__ = ["LATER"]

_OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if m['role'] != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_OLMO3 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GRANITE_TURNS = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
_GRANITE_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>' + "
_GRANITE3 = (
    _GRANITE_SYSTEM
    + "'Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.\nYou are Granite.<|end_of_text|>\n' }}{% endif %}"
    + _GRANITE_TURNS
)
_GRANITE4 = _GRANITE_SYSTEM + "'You are a helpful assistant.<|end_of_text|>\n' }}{% endif %}" + _GRANITE_TURNS
_SEED = (
    "{% for m in messages %}{{ '<seed:bos>' + m['role'] + '\n' }}"
    "{{ (m['content'] | trim if m['role'] == 'assistant' else m['content']) + '<seed:eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<seed:bos>assistant\n' }}"
    "{% if thinking_budget is defined and thinking_budget == 0 %}{{ '<seed:think><seed:cot_budget_reflect>' }}"
    "{% endif %}{% endif %}"
)
_HUNYUAN = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '<\uff5chy_place\u2581holder\u2581no\u25813\uff5c>' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<\uff5chy_User\uff5c>' + m['content'] + '<\uff5chy_Assistant\uff5c>' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_ERNIE = (
    "{%- if not cls_token is defined -%}{%- set cls_token = '<|begin_of_sentence|>' -%}{%- endif -%}"
    "{%- if not sep_token is defined -%}{%- set sep_token = '<|end_of_sentence|>' -%}{%- endif -%}"
    "{{ cls_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + sep_token }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
_GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_EXAONE4 = (
    "{% for m in messages %}{{ '[|' + m['role'] + '|]\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '[|endofturn|]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]\n' }}{% if enable_thinking is defined and enable_thinking %}"
    "{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_MINISTRAL3 = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '[SYSTEM_PROMPT]You are Ministral.[/SYSTEM_PROMPT]' }}"
    "{% endif %}{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def _split(regex: str, **behavior: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **behavior}


def _then_bytes(*splits: dict[str, Any]) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}


_CL100K = _then_bytes(
    _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        behavior="Removed",
        invert=True,
    )
)
_SEED_RULE = _then_bytes(  # with line ends themselves in it, where others write what stands for them
    _split(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
        "|\\s+(?!\\S)|\\s+"
    )
)
_HUNYUAN_RULE = _then_bytes(  # DeepSeek-V3's
    _split(r"\p{N}{1,3}"),
    _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    _split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)

_OLMO_TOKENS = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_OLMO_PLAIN = ("|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||")
_OLMO_LAST = ("<|im_start|>", "<|im_end|>", "<|endofprompt|>", "<|pad|>")
_OLMO_FACTS: dict[str, Any] = {
    "cut": "smaug-bpe",
    "rule": _CL100K,
    "last": (*_OLMO_TOKENS, *_OLMO_PLAIN, *_OLMO_LAST),
    "plain": _OLMO_PLAIN,
    "bos": "<|endoftext|>",
    "eos": "<|endoftext|>",
    "pad": "<|pad|>",
    "kind": "GPT2Tokenizer",
    "rows": 32,
}
_STARCODER = (
    "<|end_of_text|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<reponame>",
)
_ROLES = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
_GRANITE4_TOKENS = ("<|pad|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_pad|>", "<|filename|>", "<|reponame|>")
_FACTORS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}
_GRANITE4_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<documents>")
_SEED_TOKENS = ("<seed:bos>", "<seed:pad>", "<seed:eos>", "<seed:think>", "</seed:think>", "<seed:cot_budget_reflect>")
_HUNYUAN_TOKENS = (
    "<\uff5chy_begin\u2581of\u2581sentence\uff5c>",
    "<\uff5chy_end\u2581of\u2581sentence\uff5c>",
    "<\uff5chy_\u2581pad\u2581\uff5c>",
    "<\uff5chy_User\uff5c>",
    "<\uff5chy_Assistant\uff5c>",
    "<\uff5chy_place\u2581holder\u2581no\u25812\uff5c>",
    "<\uff5chy_place\u2581holder\u2581no\u25813\uff5c>",
    "<\uff5chy_place\u2581holder\u2581no\u25818\uff5c>",
)
_ERNIE_LAST = ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|LOC_BEGIN|>", "<mask:4>")
_GLM4_TOKENS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_GLM4_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_EXAONE_ROLES = ("[|system|]", "[|tool|]", "[|assistant|]", "[|user|]", "[|endofturn|]")
_MINISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MINISTRAL_MORE = ("[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]")

LATER: dict[str, Facts] = {
    "olmo2": Facts(
        family="olmo2",
        **_OLMO_FACTS,
        template=_OLMO2,
        config={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"},
        generation={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"},
    ),
    "olmo3": Facts(
        family="olmo3",
        **_OLMO_FACTS,
        template=_OLMO3,
        apart=True,
        config={"eos": "<|endoftext|>", "pad": "<|pad|>"},
        generation={"eos": ["<|im_end|>", "<|endoftext|>"], "pad": "<|pad|>"},
    ),
    "granite3": Facts(
        family="granite",
        cut="smollm",
        template=_GRANITE3,
        first=_STARCODER,
        last=_ROLES,
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
        kind="GPT2Tokenizer",
        config=dict.fromkeys(("bos", "eos", "pad"), "<|end_of_text|>"),
        generation=dict.fromkeys(("bos", "eos", "pad"), "<|end_of_text|>"),
        settings=_FACTORS,
    ),
    "granite4": Facts(
        family="granite",
        cut="smaug-bpe",
        rule=_CL100K,
        template=_GRANITE4,
        last=(*_GRANITE4_TOKENS, *_ROLES[:2], *_GRANITE4_PLAIN),
        plain=_GRANITE4_PLAIN,
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|pad|>",
        kind="GPT2Tokenizer",
        apart=True,
        rows=32,
        config={"bos": "<|end_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"},
        generation={"bos": "<|end_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"},
        settings=_FACTORS,
    ),
    "seed-oss": Facts(
        family="seed_oss",
        cut="seed-coder",
        rule=_SEED_RULE,
        template=_SEED,
        first=(*_SEED_TOKENS, "</seed:cot_budget_reflect>", "<seed:tool_call>", "</seed:tool_call>"),
        bos="<seed:bos>",
        eos="<seed:eos>",
        pad="<seed:pad>",
        apart=True,
        rows=32,
        config={"bos": "<seed:bos>", "eos": "<seed:eos>", "pad": "<seed:pad>"},
        generation={"bos": "<seed:bos>", "eos": "<seed:eos>", "pad": "<seed:pad>"},
    ),
    "hunyuan": Facts(
        family="hunyuan_v1_dense",
        cut="deepseek-v3",
        rule=_HUNYUAN_RULE,
        template=_HUNYUAN,
        last=_HUNYUAN_TOKENS,
        bos=_HUNYUAN_TOKENS[0],
        eos=_HUNYUAN_TOKENS[5],
        pad=_HUNYUAN_TOKENS[2],
        apart=True,
        config={"bos": _HUNYUAN_TOKENS[0], "eos": _HUNYUAN_TOKENS[5], "pad": _HUNYUAN_TOKENS[2]},
        generation={"eos": [_HUNYUAN_TOKENS[5], _HUNYUAN_TOKENS[7]], "pad": _HUNYUAN_TOKENS[2]},
    ),
    "ernie4.5": Facts(
        family="ernie4_5",
        cut="ernie",
        template=_ERNIE,
        first=("<unk>", "<s>", "</s>"),
        last=_ERNIE_LAST,
        bos="<s>",
        eos="</s>",
        pad="<unk>",
        kind="LlamaTokenizer",
        adds=True,
        rows=32,
        config={"bos": "<s>", "eos": "</s>", "pad": "<unk>"},
        generation={"bos": "<s>", "eos": "</s>", "pad": "<unk>"},
        more={
            "cls_token": "<|begin_of_sentence|>",
            "sep_token": "<|end_of_sentence|>",
            "add_prefix_space": False,
            "legacy": True,
        },
    ),
    "glm4": Facts(
        family="glm4",
        cut="smaug-bpe",
        template=_GLM4,
        last=(*_GLM4_TOKENS, *_GLM4_ROLES),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        rows=32,
        config={"eos": ["<|endoftext|>", "<|user|>", "<|observation|>"], "pad": "<|endoftext|>"},
        generation={"eos": ["<|endoftext|>", "<|user|>", "<|observation|>"], "pad": "<|endoftext|>"},
    ),
    "exaone4": Facts(
        family="exaone4",
        cut="gpt-2",
        template=_EXAONE4,
        first=("[PAD]", "[BOS]", "[EOS]", "[UNK]", *_EXAONE_ROLES, "<think>", "</think>"),
        plain=("<think>", "</think>"),
        bos="[BOS]",
        eos="[|endofturn|]",
        pad="[PAD]",
        kind="GPT2Tokenizer",
        apart=True,
        config={"bos": "[BOS]", "eos": "[|endofturn|]", "pad": "[PAD]"},
        generation={"bos": "[BOS]", "eos": "[|endofturn|]", "pad": "[PAD]"},
    ),
    "ministral3": Facts(
        family="ministral3",
        cut="tekken",
        template=_MINISTRAL3,
        first=(*_MINISTRAL_TOKENS, *_MINISTRAL_MORE),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        begins=True,
        kind="TokenizersBackend",
        apart=True,
        config={"bos": "<s>", "eos": "</s>", "pad": "<pad>"},
        generation={"bos": "<s>", "eos": "</s>", "pad": "<pad>"},
    ),
}
