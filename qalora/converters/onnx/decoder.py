"""What both graphs of a decoder share: its numbers, rotary tables, names of inputs and outputs, and a list of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import InputError
from qalora.formats.onnx import Initializer, stub

__all__ = ["DATA", "IR_VERSION", "OPSET", "Decoder", "Graph", "decoder_of", "rotary_tables"]

OPSET = 23
IR_VERSION = 11
DATA = "model.onnx.data"

MAX_POSITIONS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The numbers of a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float


def decoder_of(model: Checkpoint) -> Decoder:
    """The numbers from transformers' config; InputError for what the graphs do not do."""
    config = model.config
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{model.path}: hidden_act", expected="silu", got=repr(config.get("hidden_act")))
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_size = int(config.get("head_dim") or hidden // heads)
    if head_size % 16:
        raise InputError(f"{model.path}: head size", expected="a multiple of 16", got=str(head_size), todo="use gguf")
    positions = int(config["max_position_embeddings"])
    if not 0 < positions <= MAX_POSITIONS:
        raise InputError(f"{model.path}: max_position_embeddings", expected=f"1..{MAX_POSITIONS}", got=str(positions))
    return Decoder(
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=head_size,
        vocabulary=int(config["vocab_size"]),
        positions=positions,
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
    )


def rotary_tables(model: Checkpoint) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, head size / 2], by transformers' own module, which knows every rope scaling."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {key: value for key, value in model.config.items() if key != "architectures"}
    rotary = LlamaRotaryEmbedding(AutoConfig.for_model(**plain))
    positions = torch.arange(decoder_of(model).positions)[None]
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


@dataclass(slots=True, kw_only=True)
class Graph:
    """Nodes one behind the other; each method that adds one gives its output's name."""

    data: Mapping[str, Initializer]
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    _pools: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        output: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; `outputs` names all of them where there are several."""
        from onnx import helper

        names = [output] if outputs is None else list(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"/{output}", domain=domain, **attributes))
        return output

    def constant(self, name: str, values: Sequence[int] | int, dtype: str = "INT64") -> str:
        """A small constant in the model itself, added once; gives its name there."""
        from onnx import TensorProto, helper

        name = f"constant.{name}"
        if all(proto.name != name for proto in self.constants):
            shape = [] if isinstance(values, int) else [len(values)]
            flat = [values] if isinstance(values, int) else list(values)
            self.constants.append(helper.make_tensor(name, getattr(TensorProto, dtype), shape, flat))
        return name

    def pooled(self, x: str, group_size: int, groups: int) -> str:
        """The sum of an activation [batch, sequence, in] over each group, made once for each activation and size."""
        key = (x, group_size)
        if key not in self._pools:
            shape = self.constant(f"groups_{groups}x{group_size}", [0, 0, groups, group_size])
            axis = self.constant("last_axis", [-1])
            grouped = self.add("Reshape", [x, shape], f"{x}.groups{group_size}")
            self._pools[key] = self.add("ReduceSum", [grouped, axis], f"{x}.pooled{group_size}", keepdims=0)
        return self._pools[key]

    def model(
        self, decoder: Decoder, outputs: Sequence[Any], inputs: Sequence[Any], metadata: Mapping[str, str], **extra: Any
    ) -> Any:
        """The ModelProto: stubs for the weights, IR and opsets that every supported ONNX Runtime loads."""
        from onnx import helper

        stubs = [stub(item, DATA) for item in self.data.values()]
        graph = helper.make_graph(self.nodes, "decoder", list(inputs), list(outputs), [*stubs, *self.constants])
        model = helper.make_model(graph, producer_name="qalora", ir_version=IR_VERSION, **extra)
        helper.set_model_props(model, dict(sorted(metadata.items())))
        return model


def cache_names(layer: int, side: str) -> tuple[str, str]:
    """The input and output of a layer's cache; side is "key" or "value"."""
    return f"past_key_values.{layer}.{side}", f"present.{layer}.{side}"


def graph_inputs(decoder: Decoder) -> list[Any]:
    """input_ids, attention_mask and the cache."""
    from onnx import TensorProto, helper

    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    return inputs + [
        _cache(decoder, n, side, 0, "past_sequence_length") for n in range(decoder.layers) for side in SIDES
    ]


def graph_outputs(decoder: Decoder) -> list[Any]:
    """Logits and the cache."""
    from onnx import TensorProto, helper

    shape = ["batch_size", "sequence_length", decoder.vocabulary]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    return [logits] + [
        _cache(decoder, n, side, 1, "total_sequence_length") for n in range(decoder.layers) for side in SIDES
    ]


SIDES = ("key", "value")


def _cache(decoder: Decoder, layer: int, side: str, which: int, length: str) -> Any:
    from onnx import TensorProto, helper

    shape = ["batch_size", decoder.kv_heads, length, decoder.head_size]
    return helper.make_tensor_value_info(cache_names(layer, side)[which], TensorProto.FLOAT, shape)
