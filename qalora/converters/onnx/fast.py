"""The graph for ONNX Runtime and onnxruntime-genai: fused attention, MatMulNBits, and the pooled branch beside it.

    y = MatMulNBits(x; codes, scale, zero) + pool(x) @ residual

pool(x) is shared by q, k and v, and by gate and up. A batch of different lengths is padded on the right: the fused
attention counts the ones of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.onnx.carriers import block_size
from qalora.converters.onnx.decoder import (
    OPSET,
    SIDES,
    Decoder,
    Graph,
    cache_names,
    decoder_of,
    graph_inputs,
    graph_outputs,
)
from qalora.formats.onnx import Initializer

__all__ = ["fast_graph"]

MS = "com.microsoft"


def fast_graph(
    model: Checkpoint, data: Mapping[str, Initializer], metadata: Mapping[str, str], accuracy_level: int
) -> Any:
    """The ModelProto, its weights as stubs."""
    from onnx import helper

    decoder, graph = decoder_of(model), Graph(data=data)
    lengths = _sequence_lengths(graph)
    hidden = graph.add("Gather", ["model.embed_tokens.weight", "input_ids"], "embedded")
    norm = graph.add(
        "RMSNormalization",
        [hidden, "model.layers.0.input_layernorm.weight"],
        "layer0.normed",
        axis=-1,
        epsilon=decoder.epsilon,
    )
    for n in range(decoder.layers):
        hidden, norm = _layer(graph, model, decoder, n, hidden, norm, lengths, accuracy_level)
    _output(graph, model, norm, decoder, accuracy_level)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    return graph.model(decoder, graph_outputs(decoder), graph_inputs(decoder), metadata, opset_imports=opsets)


def _sequence_lengths(graph: Graph) -> tuple[str, str]:
    """The last position of each sequence, and the length of the longest: what GroupQueryAttention asks for."""
    axis, one = graph.constant("axis1", [1]), graph.constant("one", [1])
    total = graph.add("ReduceSum", ["attention_mask", axis], "mask_sum", keepdims=0)
    last = graph.add("Sub", [total, one], "last_position")
    from onnx import TensorProto

    seqlens = graph.add("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    shape = graph.add("Shape", ["attention_mask"], "mask_shape")
    length = graph.add("Gather", [shape, graph.constant("index1", 1)], "mask_length", axis=0)
    return seqlens, graph.add("Cast", [length], "total_length", to=TensorProto.INT32)


def _layer(
    graph: Graph,
    model: Checkpoint,
    decoder: Decoder,
    n: int,
    hidden: str,
    norm: str,
    lengths: tuple[str, str],
    accuracy_level: int,
) -> tuple[str, str]:
    """One layer; gives the hidden state before its last addition's normalisation, and the normalised one."""
    path, out = f"model.layers.{n}", f"layer{n}"

    def linear(x: str, module: str) -> str:
        return _linear(graph, model, x, f"{path}.{module}", accuracy_level)

    heads = [linear(norm, f"self_attn.{name}_proj") for name in "qkv"]
    past = [cache_names(n, side)[0] for side in SIDES]
    present = [cache_names(n, side)[1] for side in SIDES]
    attended = graph.add(
        "GroupQueryAttention",
        [*heads, *past, *lengths, "rotary.cos", "rotary.sin"],
        f"{out}.attended",
        domain=MS,
        outputs=[f"{out}.attended", *present],
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
    )
    mixed = linear(attended, "self_attn.o_proj")
    hidden, norm = _add_norm(graph, decoder, hidden, mixed, f"{path}.post_attention_layernorm.weight", f"{out}.middle")
    gate, up = linear(norm, "mlp.gate_proj"), linear(norm, "mlp.up_proj")
    active = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"{out}.sigmoid")], f"{out}.silu")
    down = linear(graph.add("Mul", [active, up], f"{out}.gated"), "mlp.down_proj")
    last = n + 1 == decoder.layers
    weight = "model.norm.weight" if last else f"model.layers.{n + 1}.input_layernorm.weight"
    return _add_norm(graph, decoder, hidden, down, weight, f"{out}.end")


def _add_norm(graph: Graph, decoder: Decoder, hidden: str, change: str, weight: str, out: str) -> tuple[str, str]:
    """hidden + change, and its normalisation, in one node."""
    graph.add(
        "SkipSimplifiedLayerNormalization",
        [hidden, change, weight],
        f"{out}.normed",
        domain=MS,
        outputs=[f"{out}.normed", "", "", f"{out}.sum"],
        epsilon=decoder.epsilon,
    )
    return f"{out}.sum", f"{out}.normed"


def _linear(graph: Graph, model: Checkpoint, x: str, module: str, accuracy_level: int) -> str:
    """A linear layer of either kind, with its bias."""
    lazy = model.tensors[f"{module}.weight"]
    y = f"{module}.out"
    if lazy.spec is None:
        product = graph.add("MatMul", [x, f"{module}.weight"], y)
    else:
        block, (out, columns) = block_size(module, lazy.spec), lazy.shape
        halves = [
            graph.add(
                "MatMulNBits",
                [x, *(f"{module}.{part}{half}" for part in ("codes", "scale", "zero"))],
                f"{y}{half}",
                domain=MS,
                K=columns,
                N=out,
                bits=4,
                block_size=block,
                accuracy_level=accuracy_level,
            )
            for half in (("", "_high") if lazy.spec.bits > 4 else ("",))
        ]
        product = halves[0] if len(halves) == 1 else graph.add("Add", halves, f"{y}.halves")
        if lazy.spec.zeros == "real":
            pooled = graph.pooled(x, lazy.spec.group_size, columns // lazy.spec.group_size)
            branch = graph.add("MatMul", [pooled, f"{module}.residual"], f"{y}.branch")
            product = graph.add("Add", [product, branch], f"{y}.sum")
    if f"{module}.bias" in model.tensors:
        product = graph.add("Add", [product, f"{module}.bias"], f"{y}.biased")
    return product


def _output(graph: Graph, model: Checkpoint, norm: str, decoder: Decoder, accuracy_level: int) -> None:
    """The logits; a tied output multiplies with the embedding as it is stored, [vocabulary, hidden]."""
    if not model.tied and model.tensors["lm_head.weight"].spec is not None:
        graph.add("Identity", [_linear(graph, model, norm, "lm_head", accuracy_level)], "logits")
        return
    weight = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    add_table_product(graph, norm, weight, decoder)


def add_table_product(graph: Graph, norm: str, weight: str, decoder: Decoder) -> None:
    """logits = norm @ weight^T by Gemm, which takes the table as it is and needs no transposed copy."""
    rows = graph.add("Reshape", [norm, graph.constant("rows", [-1, decoder.hidden])], "output_rows")
    product = graph.add("Gemm", [rows, weight], "output_product", transB=1)
    shape = graph.add("Shape", ["input_ids"], "input_shape")
    wanted = graph.add("Concat", [shape, graph.constant("vocabulary", [decoder.vocabulary])], "logits_shape", axis=0)
    graph.add("Reshape", [product, wanted], "logits")
