"""What a decoder's numbers and tensors give by a forward that is written out: the room's slow obvious loop."""

import math
from collections.abc import Callable

import pytest
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters.decoder import decoder_of
from qalora.converters.rope import rotary_table


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
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    tables = {kind: rotary_table(rope, size, decoder.positions, "here") for kind, rope in decoder.ropes.items()}
    distance = torch.arange(count)[:, None] - torch.arange(count)
    x = tensors["model.embed_tokens.weight"][tokens] * decoder.embedding_scale
    for n, layer in enumerate(decoder.layers):
        path = f"model.layers.{n}"
        normed = norm(x, f"{path}.input_layernorm")
        sizes = [count * size for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        if layer.parts.has("self_attn.qkv_proj"):
            parts = list(linear(normed, f"{path}.self_attn.qkv_proj").split(sizes, dim=-1))
        else:
            parts = [linear(normed, f"{path}.self_attn.{name}_proj") for name in "qkv"]
        q, k, v = (part.view(count, -1, size).transpose(0, 1) for part in parts)
        if layer.parts.has("self_attn.q_norm"):
            q, k = norm(q, f"{path}.self_attn.q_norm"), norm(k, f"{path}.self_attn.k_norm")
        if layer.rope is not None:
            q, k = rotated(q, layer.rope), rotated(k, layer.rope)
        k, v = (part.repeat_interleave(decoder.heads // decoder.kv_heads, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * decoder.scale
        if decoder.softcap is not None:
            scores = decoder.softcap * torch.tanh(scores / decoder.softcap)
        seen = (distance >= 0) & (distance < (layer.window or count))
        found = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        found = linear(found.transpose(0, 1).reshape(count, -1), f"{path}.self_attn.o_proj")
        around = layer.parts.has("pre_feedforward_layernorm")
        x = x + (norm(found, f"{path}.post_attention_layernorm") if around else found)
        normed = norm(x, f"{path}.{'pre_feedforward' if around else 'post_attention'}_layernorm")
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
        x = x + (norm(found, f"{path}.post_feedforward_layernorm") if around else found)
    head = "model.embed_tokens" if model.tied else "lm_head"
    logits = linear(norm(x, "model.norm"), head)
    cap = decoder.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
