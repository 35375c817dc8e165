"""A model whose output layer is its own, and what a decoder's numbers and tensors give by a forward that is written
out: the room's slow obvious loop."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.decoder import decoder_of
from qalora.converters.rope import rotary_table


@pytest.fixture(scope="session")
def untied(tiny_untied: Path) -> Checkpoint:
    return load(tiny_untied)


@pytest.fixture(scope="session")
def by_decoder() -> Callable[[Checkpoint, torch.Tensor], torch.Tensor]:
    """Gives the float64 logits of a model for a list of tokens, by the numbers that `decoder_of` reads."""
    return _by_decoder


def _by_decoder(model: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Float64 logits of the numbers that `decoder_of` reads, by a forward that is written out."""
    decoder = decoder_of(model.config, "here")
    tensors = {name: lazy.load_float().double() for name, lazy in model.tensors.items()}
    size, count = decoder.head_size, tokens.numel()

    def linear(x: torch.Tensor, module: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, tensors[f"{module}.weight"], tensors.get(f"{module}.bias"))

    def norm(x: torch.Tensor, module: str) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + decoder.epsilon)
        return scaled * (tensors[f"{module}.weight"] + float(decoder.family.norm_offset))

    def rotated(x: torch.Tensor, kind: str) -> torch.Tensor:
        rope = decoder.ropes[kind]
        cos, sin = (table[-decoder.positions :][:count].double() for table in tables[kind])
        if rope.kind == "longrope" and count <= rope.original:
            cos, sin = (table[:count].double() for table in tables[kind])
        half = rope.size(size) // 2
        rest = x[..., 2 * half :]
        if decoder.family.interleaved:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def grown(x: torch.Tensor, kind: str) -> torch.Tensor:
        rope = decoder.ropes[kind]
        if rope.temperature is None:
            return x
        turns = torch.arange(count).div(rope.original, rounding_mode="floor").double()
        return x * (1 + rope.temperature * torch.log(1 + turns))[:, None]

    def named(x: torch.Tensor, path: str, module: str) -> torch.Tensor:
        return norm(x, f"{path}.{module}") if module else x

    tables = {kind: rotary_table(rope, size, decoder.positions, "here") for kind, rope in decoder.ropes.items()}
    distance = torch.arange(count)[:, None] - torch.arange(count)
    x = tensors["model.embed_tokens.weight"][tokens] * decoder.embedding_scale
    for n, layer in enumerate(decoder.layers):
        path = f"model.layers.{n}"
        normed = named(x, path, layer.parts.before[0])
        q_norm, k_norm = layer.parts.named("attn_q_norm"), layer.parts.named("attn_k_norm")
        sizes = [count * size for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        if layer.parts.has("self_attn.qkv_proj"):
            parts = list(linear(normed, f"{path}.self_attn.qkv_proj").split(sizes, dim=-1))
        else:
            parts = [linear(normed, f"{path}.self_attn.{name}_proj") for name in "qkv"]
        if decoder.family.normed == "all":
            parts[:2] = named(parts[0], path, q_norm), named(parts[1], path, k_norm)
        q, k, v = (part.view(count, -1, size).transpose(0, 1) for part in parts)
        if decoder.family.normed == "head" and not decoder.family.normed_late:
            q, k = named(q, path, q_norm), named(k, path, k_norm)
        if layer.rope is not None:
            q, k = grown(rotated(q, layer.rope), layer.rope), rotated(k, layer.rope)
        if decoder.family.normed_late:
            q, k = named(q, path, q_norm), named(k, path, k_norm)
        k, v = (part.repeat_interleave(decoder.heads // decoder.kv_heads, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * decoder.scale
        if decoder.softcap is not None:
            scores = decoder.softcap * torch.tanh(scores / decoder.softcap)
        seen = (distance >= 0) & (distance < (layer.window or count))
        found = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        found = linear(found.transpose(0, 1).reshape(count, -1), f"{path}.self_attn.o_proj")
        x = x + decoder.residual_scale * named(found, path, layer.parts.after[0])
        normed = named(x, path, layer.parts.before[1])
        if layer.parts.has("mlp.gate_up_proj"):
            gate, up = linear(normed, f"{path}.mlp.gate_up_proj").chunk(2, dim=-1)
        else:
            gate, up = linear(normed, f"{path}.mlp.gate_proj"), linear(normed, f"{path}.mlp.up_proj")
        active = {
            "relu": torch.relu,
            "silu": torch.nn.functional.silu,
            "gelu_pytorch_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        }[decoder.activation]
        found = linear(active(gate) * up, f"{path}.mlp.down_proj")
        x = x + decoder.residual_scale * named(found, path, layer.parts.after[1])
    head = "model.embed_tokens" if model.tied else "lm_head"
    logits = linear(norm(x, "model.norm"), head) / decoder.logit_divisor
    cap = decoder.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
