"""Helpers for tests, ours and other people's: small models made on the spot, asserts that collect every difference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from qalora.adapter import Adapter, AdapterLayer, Convention, convention_factor
from qalora.chat_layouts import CHAT_LAYOUTS, ChatLayout, chat_layout
from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.families import FAMILIES
from qalora.demo import demo_text
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec

__all__ = [
    "CHAT_LAYOUTS",
    "ChatLayout",
    "assert_parity",
    "assert_same_model",
    "assert_same_tensor",
    "byte_tokenizer",
    "chat_layout",
    "chat_model",
    "lazily",
    "random_adapter",
    "random_model",
    "random_tensor",
    "small_tokenizer",
    "tiny_llama",
    "tiny_model",
]


def random_tensor(
    out: int, columns: int, *, bits: int, group_size: int, seed: int = 0, zeros: str = "real"
) -> GroupQuantTensor:
    """A random canonical tensor with scale and min (or scale and an integer zero) that float16 holds.

    The first rows hold the hard cases: a scale of 0, a constant group, and negative scales.
    """
    assert bits in BITS
    rng = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    codes = torch.randint(0, 1 << bits, (out, columns), generator=rng, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=rng) * 0.02 + 1e-3).half().float()
    scale[0] = 0
    if out > 2:
        scale[2] = -scale[2]
    if zeros == "real":
        minimum = (-scale * (1 << (bits - 1)) + 0.01 * torch.randn(out, groups, generator=rng)).half().float()
    else:
        minimum = -scale * torch.randint(0, 1 << bits, (out, groups), generator=rng)
    return GroupQuantTensor.from_codes(codes, scale, minimum, bits, group_size)


def assert_same_tensor(got: GroupQuantTensor, expected: GroupQuantTensor) -> None:
    """Fail once, with every field of two canonical tensors that differs and in how many places."""
    problems = [
        f"{name}: expected {getattr(expected, name)}, got {getattr(got, name)}"
        for name in ("bits", "group_size", "shape")
        if getattr(got, name) != getattr(expected, name)
    ]
    if not problems:
        for name in ("packed", "scale", "min"):
            differing = int((getattr(got, name) != getattr(expected, name)).sum())
            problems += [f"{name}: {differing} values differ"] if differing else []
    if (got.g_idx is None) != (expected.g_idx is None):
        problems.append("g_idx: one tensor has it, the other has not")
    elif got.g_idx is not None and expected.g_idx is not None and not torch.equal(got.g_idx, expected.g_idx):
        problems.append("g_idx: differs")
    if problems:
        raise AssertionError("; ".join(problems))


def lazily(
    name: str,
    tensor: GroupQuantTensor,
    *,
    zeros: Literal["integer", "real"] = "real",
    scale_dtype: torch.dtype = torch.float16,
    min_dtype: torch.dtype = torch.float16,
) -> LazyTensor:
    """A canonical tensor as a lazy one, with the promises of its spec as they are given."""
    spec = QuantSpec(
        bits=tensor.bits,
        group_size=tensor.group_size,
        zeros=zeros,
        scale_dtype=scale_dtype,
        min_dtype=min_dtype,
        act_order=tensor.g_idx is not None,
    )
    return LazyTensor(name=name, shape=tensor.shape, spec=spec, read=tensor.rows)


def random_model(
    source: Checkpoint,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    zeros: Literal["real", "integer", "symmetric"] = "real",
    min_dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype = torch.float16,
    change: Callable[[GroupQuantTensor], GroupQuantTensor] = lambda tensor: tensor,
) -> Checkpoint:
    """A model with its linear weights replaced by random canonical tensors, a different seed each, then changed.

    group_size None makes one group of each row; min_dtype is what the specs promise, float16 where zeros are real.
    """
    kind: Literal["integer", "real"] = "real" if zeros == "real" else "integer"
    tensors = dict(source.tensors)
    for seed, name in enumerate(source.linears):
        out, columns = tensors[name].shape
        random = random_tensor(out, columns, bits=bits, group_size=group_size or columns, seed=seed, zeros=kind)
        if zeros == "symmetric":
            random = replace(random, min=-random.scale * (1 << (bits - 1)))
        promised = min_dtype or (torch.float16 if kind == "real" else torch.float32)
        tensors[name] = lazily(name, change(random), zeros=kind, scale_dtype=scale_dtype, min_dtype=promised)
    return replace(source, tensors=tensors)


def random_adapter(
    model: Checkpoint,
    *,
    rank: int | Sequence[int] = 4,
    pool_size: int | None = 32,
    seed: int = 0,
    a_size: float = 0.3,
    b_size: float = 0.05,
    minima: Literal["float16", "float32"] | None = "float16",
    convention: Convention = "paper",
    scaling: float = 1.0,
    factor: float | None = None,
    modules: Collection[str] | None = None,
) -> Adapter:
    """A random adapter on a model's linear layers, in the order of `model.linears`.

    Each layer has an a [rank, in/pool_size] with standard deviation a_size and a b [out, rank] with b_size, drawn in
    this order. Several ranks go to the layers in turn; pool_size None takes each quantized tensor's own group size;
    factor None is what the convention makes of the scaling; modules (`q_proj`, `up_proj`) leaves out all others.
    """
    rng = torch.Generator().manual_seed(seed)
    ranks = (rank,) if isinstance(rank, int) else tuple(rank)
    names = [name for name in model.linears if modules is None or module_of(name).rpartition(".")[2] in modules]
    layers = {}
    for number, name in enumerate(names):
        lazy, size, pool = model.tensors[name], ranks[number % len(ranks)], pool_size
        if pool is None:
            assert lazy.spec is not None, f"{name} is float: give a pool size"
            pool = lazy.spec.group_size
        out, columns = lazy.shape
        layers[module_of(name)] = AdapterLayer(
            a=torch.randn(size, columns // pool, generator=rng) * a_size,
            b=torch.randn(out, size, generator=rng) * b_size,
            pool_size=pool,
            scaling=scaling,
            factor=convention_factor(convention, scaling, columns, pool) if factor is None else factor,
        )
    return Adapter(layers=layers, convention=convention, minima=minima)


def assert_same_model(got: Checkpoint, expected: Checkpoint) -> None:
    """Fail where two models have other tensors, or a tensor that is not the same bit for bit."""
    if set(got.tensors) != set(expected.tensors):
        raise AssertionError(f"tensors of one model only: {sorted(set(got.tensors) ^ set(expected.tensors))}")
    for name, lazy in expected.tensors.items():
        if lazy.spec is not None:
            assert_same_tensor(got.tensors[name].load_quantized(), lazy.load_quantized())
        elif not torch.equal(got.tensors[name].load_float(), lazy.load_float()):
            raise AssertionError(f"{name} differs")


def assert_parity(
    reference: Checkpoint | str | Path,
    artifacts: Sequence[Path | str],
    *,
    allow_unproven: bool = False,
    **options: Any,
) -> None:
    """Fail, with the first gate that did not pass, where artefacts do not compute what the reference does.

    options are those of `qalora.verify`: adapter, level, text, max_tokens and so on.
    """
    import qalora

    report = qalora.verify(reference, artifacts, **options)
    if not report.passed(allow_unproven=allow_unproven):
        raise AssertionError(report.failure())


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes and an end token, 257 tokens, that cuts text as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


def small_tokenizer(*, size: int = 512) -> Any:
    """A byte-level BPE with SmolLM2's rules, special tokens and chat template, trained on Python's own help texts.

    It cuts text as SmolLM2's tokenizer does and has `size` tokens instead of 49,152: what takes seconds with that one
    takes milliseconds with this one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([demo_text()[:60_000]], trainer)
    backend.add_special_tokens(["<|tool|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


TINY: dict[str, Mapping[str, Any]] = {name: family.tiny for name, family in FAMILIES.items()}
"""What a tiny model of each family has beside `_SIZES`: transformers' config keys, windows small enough to matter."""

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}


def tiny_model(
    folder: Path, family: str, *, seed: int = 0, tokenizer: Any = None, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a tiny random model of a family (float32) as transformers saves it; `config` overrides its keys.

    With a tokenizer, its vocabulary and its own end token are the model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {} if tokenizer is None else {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    settings: dict[str, Any] = {"vocab_size": 256, **_SIZES, **TINY[family], **own, **(config or {})}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and small weights would hide mistakes
            value = torch.randn_like(parameter) * (0.1 if parameter.ndim == 2 else 0.2) + (parameter.ndim == 1)
            parameter.copy_(
                value.bfloat16() if parameter.ndim == 1 else value
            )  # as checkpoints have them: 1 + w is exact
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, seed: int = 0, tokenizer: Any = None, config: Mapping[str, Any] | None = None) -> Path:
    """A tiny random Llama, as `tiny_model` makes it."""
    return tiny_model(folder, "llama", seed=seed, tokenizer=tokenizer, config=config)


def chat_model(folder: Path, layout: ChatLayout | str, *, says: str | None = None, seed: int = 0) -> Path:
    """Write a tiny random model with all that stands around it in a chat layout, given or by its name.

    says  the text of the token that is always the next one, whatever came before, by far
    """
    from safetensors.torch import load_file, save_file

    chat = chat_layout(layout) if isinstance(layout, str) else layout
    tiny_model(folder, chat.family, seed=seed, tokenizer=chat.tokenizer, config=chat.config)
    chat.write(folder)
    if says is not None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        _always(tensors, chat.token(says), plus_one=FAMILIES[chat.family].adds_one("model.norm.weight"))
        save_file(tensors, path, {"format": "pt"})
    return folder


def _always(tensors: dict[str, torch.Tensor], token: int, *, plus_one: bool) -> None:
    """Make a model say one token: the first element of a hidden state, which no layer changes, counts far more than
    the others, which make the logits that they make. An adapter changes it little where no bias is large."""
    for name, values in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values[0] = 0
        elif name.endswith("v_proj.bias"):
            values[:] = 0
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    embedding[:, 0] = 1
    output = tensors.get("lm_head.weight", embedding)
    output[:, 0] = 1
    output[token, 0] = 4
    norm[0] = 8 - plus_one
