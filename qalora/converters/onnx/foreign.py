"""Read ONNX decoders that others made: onnxruntime-genai's builder, and graphs whose nodes are named alike.

A weight is found by the node that uses it, and named as transformers names it:

    /model/layers.N/attn/q_proj/MatMulNBits    also self_attn and mlp; MatMul_Q4 as ONNX Runtime's quantizer names it,
                                               MatMul for floats; qkv_proj and gate_up_proj are cut into their parts
    /lm_head/MatMulNBits                       the same
    the Gather or GatherBlockQuantized of input_ids, whose table may be the output layer's

MatMulNBits, of a weight [N, K] in G = K/block_size groups (source: ONNX Runtime, docs/ContribOperators.md):

    B            uint8 [N, G, block_size*bits/8]   codes along K, lowest bits first
    scales       float32 or float16 [N, G], or flat
    zero_points  uint8 [N, ceil(G*bits/8)], or flat, packed as the codes are; or floats [N, G]; absent: 2**(bits-1)
    g_idx        int32 [K], the group of each column
    bias         float [N]

GatherBlockQuantized has data, indices, scales and zero points of the same form; its data may be INT4 too, whose zero
point is 0 where none is given, and which is held here with 8 added to both.

Opening reads the graph and two rows of the rope tables, no weights. Not read: other quantized forms (QDQ, QMoE),
fused attention weights of other layouts, scaled rope but linear without config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.essentials import differences
from qalora.converters.families import family_of
from qalora.converters.huggingface import HEAD as OUTPUT
from qalora.converters.huggingface import announced, check_shapes, companion_files, read_config, zero_biases
from qalora.converters.onnx.foreign_config import config_of, whole_attribute
from qalora.converters.settings import check_config, linear_names
from qalora.errors import FormatError, InputError, shown
from qalora.formats.onnx import Stored, read_stored
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["read"]

FLOATS = {"FLOAT": torch.float32, "FLOAT16": torch.float16}
BITS = (2, 4, 8)
LARGEST = 1 << 28

PLACE = re.compile(r"/?model/layers[./](\d{1,5})/(self_attn|attn|mlp)/([a-z_]+_proj)/(MatMul(?:NBits|_Q\d)?|Add)")
HEAD = re.compile(r"/?lm_head/MatMul(?:NBits|_Q\d)?")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """A graph's nodes and weights, and the sizes that cut fused weights."""

    file: Path
    nodes: Sequence[Any]
    stored: Mapping[str, Stored]
    config: Mapping[str, Any]

    def weight(self, node: Any, name: str, dtypes: Sequence[str], count: int | None = None) -> Stored:
        """An initializer of one of the types, with so many elements; FormatError if it is not there or another."""
        item = self.stored.get(name)
        size = "" if count is None else f" of {count} elements"
        if item is None or item.dtype not in dtypes or (count is not None and math.prod(item.shape) != count):
            got = "none" if item is None else f"{item.dtype} {list(item.shape)}"
            raise FormatError(
                f"{self.file}: {node.name}: {name!r}", expected=f"a {' or '.join(dtypes)} initializer{size}", got=got
            )
        return item

    def rows(self, module: str, total: int) -> tuple[int, ...]:
        """How a fused weight's rows are cut."""
        if module == "gate_up_proj":
            return total // 2, total - total // 2
        size = _whole(self, "head_dim") if self.config.get("head_dim") else _head_dim(self)
        return tuple(_whole(self, key) * size for key in _HEADS)


_HEADS = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")


def _whole(graph: _Graph, key: str) -> int:
    value = graph.config.get(key)
    if type(value) is not int or not 0 < value <= LARGEST:
        raise FormatError(f"{graph.file}: {key}", expected=f"a whole number up to {LARGEST}", got=shown(value))
    return value


def _head_dim(graph: _Graph) -> int:
    return _whole(graph, "hidden_size") // _whole(graph, "num_attention_heads")


def read(file: Path, proto: Any, stored: Mapping[str, Stored]) -> Checkpoint:
    """The checkpoint of a parsed graph (`qalora.formats.onnx.read_initializers`).

    Raises InputError for a form or a family that is not read here, FormatError for a graph without nodes that are
    known, and for weights that are not what the nodes say.
    """
    nodes = list(proto.graph.node)
    for node in nodes:  # protobuf gives a string that is no UTF-8 as bytes
        if not all(isinstance(text, str) for text in (node.name, node.op_type, *node.input, *node.output)):
            raise FormatError(f"{file}: a node's names", expected="UTF-8", got="bytes that are no UTF-8")
    graph = _Graph(file=file, nodes=nodes, stored=stored, config=config_of(file, nodes, stored))
    tensors: dict[str, LazyTensor] = {}
    for node in nodes:
        tensors |= _of_node(graph, node)
    if not tensors:
        raise FormatError(
            f"{file}: no node is named as onnxruntime-genai's builder names a decoder's linear layers",
            expected="ours, or nodes such as /model/layers.0/attn/q_proj/MatMulNBits",
        )
    embedding, shared = _embedding(graph)
    tensors |= {embedding.name: embedding}
    head = next((node for node in nodes if HEAD.fullmatch(node.name) and node.op_type != "Add"), None)
    if head is not None and _input(head, 1) == shared:
        tensors.pop("lm_head.weight", None)
    config = _completed(graph, tensors)
    tensors |= _norms(graph, config)
    linears = linear_names(config, file)
    unknown = sorted(set(tensors) - {*announced(config, file), OUTPUT})
    if unknown:
        raise InputError(f"{file}: a node adds {unknown[0]}, which a {config['model_type']} does not have")
    tensors |= zero_biases(file, config, tensors)
    check_shapes(file, config, tensors, "the graph")
    note = f"{file}: not written by qalora; its tensors are told by the names of its nodes"
    return Checkpoint(
        path=file,
        layout="onnx",
        config=config,
        tensors=tensors,
        linears=linears,
        files=companion_files(file.parent),
        notes=(note, *_differs(file, config)),
    )


def _differs(file: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where the config.json beside a graph says something else."""
    if not (file.parent / "config.json").exists():
        return ()
    said = read_config(file.parent)
    try:
        check_config(said, file.parent)
    except InputError:
        return ()
    differ = "; ".join(differences(config, said))
    return (f"{file}: the graph counts, not the config.json beside it: {differ}",) if differ else ()


def _completed(graph: _Graph, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The config with what the weights tell."""
    config = dict(graph.config)
    up = tensors.get("model.layers.0.mlp.up_proj.weight")
    if up is not None:
        config["intermediate_size"] = up.shape[0]
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    for key, part in (("attention_bias", ".self_attn."), ("mlp_bias", ".mlp.")):
        config[key] = any(part in name and name.endswith(".bias") for name in tensors)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return config


def _input(node: Any, n: int) -> str:
    """The name of an input, empty where the node has none."""
    return str(node.input[n]) if n < len(node.input) else ""


def _of_node(graph: _Graph, node: Any) -> dict[str, LazyTensor]:
    """The tensors, by transformers' names, that a node uses; none of a node that is no linear layer."""
    if HEAD.fullmatch(node.name):
        return _named(graph, node, "lm_head", None)
    place = PLACE.fullmatch(node.name)
    if place is None:
        return {}
    layer, part, module, _ = place.groups()
    prefix = f"model.layers.{int(layer)}.{'mlp' if part == 'mlp' else 'self_attn'}"
    return _named(graph, node, prefix, module)


def _named(graph: _Graph, node: Any, prefix: str, module: str | None) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    if node.op_type == "Add":
        found["bias"] = _bias(graph, node, next((name for name in node.input if name in graph.stored), ""), None)
    elif node.op_type == "MatMul":
        found["weight"] = _float(graph, node, _input(node, 1))
    elif node.op_type == "MatMulNBits":
        found["weight"] = _nbits(graph, node)
        if _input(node, 5):
            found["bias"] = _bias(graph, node, _input(node, 5), found["weight"].shape[0])
    else:
        raise InputError(f"{graph.file}: {node.name}", expected="MatMulNBits or MatMul", got=node.op_type)
    named: dict[str, LazyTensor] = {}
    for kind, lazy in found.items():
        if module in FUSED:
            named |= _cut(graph, node, lazy, [f"{prefix}.{part}.{kind}" for part in FUSED[module]], module)
        else:
            name = f"{prefix}.{module}.{kind}" if module is not None else f"{prefix}.{kind}"
            named[name] = replace(lazy, name=name)
    return named


def _cut(graph: _Graph, node: Any, lazy: LazyTensor, names: Sequence[str], module: str) -> dict[str, LazyTensor]:
    sizes = graph.rows(module, lazy.shape[0])
    if sum(sizes) != lazy.shape[0]:
        raise FormatError(
            f"{graph.file}: {node.name}", expected=f"{' + '.join(map(str, sizes))} rows", got=str(lazy.shape[0])
        )
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return {
        name: replace(lazy, name=name, shape=(size, *lazy.shape[1:]), read=_shifted(lazy, start))
        for name, start, size in zip(names, starts, sizes, strict=True)
    }


def _shifted(lazy: LazyTensor, first: int) -> Any:
    return lambda start, stop: lazy.read(first + start, first + stop)


def _bias(graph: _Graph, node: Any, name: str, count: int | None) -> LazyTensor:
    item = graph.weight(node, name, tuple(FLOATS), count)
    return _plain(name, item)


def _plain(name: str, item: Stored) -> LazyTensor:
    """A float initializer as it lies."""
    return LazyTensor(
        name=name, shape=item.shape, dtype=FLOATS[item.dtype], read=lambda start, stop: read_stored(item, start, stop)
    )


def _float(graph: _Graph, node: Any, name: str) -> LazyTensor:
    """MatMul's weight [in, out], transposed."""
    item = graph.weight(node, name, tuple(FLOATS))
    if len(item.shape) != 2 or 0 in item.shape:
        raise FormatError(f"{graph.file}: {node.name}: {name!r}", expected="a matrix", got=str(list(item.shape)))
    return LazyTensor(
        name=name,
        shape=tuple(reversed(item.shape)),
        dtype=FLOATS[item.dtype],
        read=lambda start, stop: read_stored(item).T[start:stop].contiguous(),
    )


def _nbits(graph: _Graph, node: Any) -> LazyTensor:
    defaults = {"N": 0, "K": 0, "bits": 4, "block_size": 0}
    rows, columns, bits, block = (whole_attribute(graph.file, node, key, value) for key, value in defaults.items())
    _check_sizes(graph, node, rows, columns, bits, block)
    codes = graph.weight(node, _input(node, 1), ("UINT8",), rows * columns * bits // 8)
    order = graph.weight(node, _input(node, 4), ("INT32",), columns) if _input(node, 4) else None
    return _quantized(graph, node, (rows, columns, bits, block), codes, (_input(node, 2), _input(node, 3)), order)


def _check_sizes(graph: _Graph, node: Any, rows: int, columns: int, bits: int, block: int) -> None:
    where = f"{graph.file}: {node.name}"
    if bits not in BITS:
        raise InputError(f"{where}: bits", expected=f"one of {', '.join(map(str, BITS))}", got=str(bits))
    if not (0 < rows <= LARGEST and 0 < columns <= LARGEST) or columns % 8:
        raise FormatError(where, expected="N and K, K a multiple of 8", got=f"N = {rows}, K = {columns}")
    if not 0 < block <= columns or columns % block:
        raise InputError(where, expected=f"a block_size that divides K = {columns}", got=str(block))


def _quantized(
    graph: _Graph,
    node: Any,
    sizes: tuple[int, int, int, int],
    codes: Stored,
    names: tuple[str, str],
    order: Stored | None,
) -> LazyTensor:
    """The lazy tensor of codes [rows, columns*bits/8] with the scales and zero points that are named."""
    rows, columns, bits, block = sizes
    groups, middle = columns // block, 1 << (bits - 1)
    scales = graph.weight(node, names[0], tuple(FLOATS), rows * groups)
    zeros = _zeros(graph, node, names[1], rows, groups, bits, codes.dtype)
    signed = codes.dtype == "INT4"
    default = 0 if codes.dtype == "UINT4" else middle  # of INT4: 0, to which 8 is added
    kind: Literal["integer", "real"] = "real" if zeros is not None and zeros.dtype in FLOATS else "integer"

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        start, stop, _ = slice(start, stop).indices(rows)
        packed = _lines(codes, rows, start, stop)
        scale = _lines(scales, rows, start, stop).float()
        zero = torch.tensor(float(default)) if zeros is None else _zero(zeros, rows, (start, stop), groups, bits)
        return GroupQuantTensor(
            packed=packed ^ 0x88 if signed else packed,
            scale=scale,
            min=-scale * zero,
            bits=bits,
            group_size=block,
            g_idx=None if order is None else read_stored(order),
        )

    spec = QuantSpec(
        bits=bits,
        group_size=block,
        zeros=kind,
        scale_dtype=FLOATS[scales.dtype],
        min_dtype=torch.float32,
        act_order=order is not None,
        zero=default if zeros is None else None,
    )
    return LazyTensor(name=node.name, shape=(rows, columns), spec=spec, read=read_rows)


def _zeros(graph: _Graph, node: Any, name: str, rows: int, groups: int, bits: int, codes: str) -> Stored | None:
    if not name:
        return None
    item = graph.weight(node, name, (codes, *FLOATS))
    wanted = rows * groups if item.dtype in FLOATS else rows * -(-groups * bits // 8)
    held = math.prod(item.shape) if item.dtype != codes or codes == "UINT8" else item.nbytes
    if held != wanted:
        raise FormatError(
            f"{graph.file}: {node.name}: {name!r}", expected=f"{wanted} zero points or bytes", got=str(held)
        )
    return item


def _zero(item: Stored, rows: int, span: tuple[int, int], groups: int, bits: int) -> Tensor:
    """Zero points [rows, groups], float32."""
    lines = _lines(item, rows, *span)
    if item.dtype in FLOATS:
        return lines.float()
    lines = lines ^ 0x88 if item.dtype == "INT4" else lines
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((lines[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :groups].float()


def _lines(item: Stored, rows: int, start: int, stop: int) -> Tensor:
    """Rows start..stop-1 of an initializer, whatever shape it is kept in, as [rows, the rest]."""
    return read_stored(replace(item, shape=(rows, math.prod(item.shape) // rows)), start, stop)


def _embedding(graph: _Graph) -> tuple[LazyTensor, str]:
    """The embedding, and the name of the initializer that it is kept in."""
    name = "model.embed_tokens.weight"
    node = next((node for node in graph.nodes if "input_ids" in node.input and "Gather" in node.op_type), None)
    if node is None:
        raise InputError(f"{graph.file}", expected="a Gather of input_ids", got="none")
    source = node.input[0]
    via = next((other for other in graph.nodes if source in other.output), None)
    if node.op_type == "Gather":
        if via is not None and via.op_type == "Transpose":
            return replace(_float(graph, node, _input(via, 0)), name=name), _input(via, 0)
        item = graph.weight(node, source, tuple(FLOATS))
        return replace(_plain(name, item), name=name), source
    if node.op_type != "GatherBlockQuantized" or (via is not None and via.op_type != "Reshape"):
        raise InputError(f"{graph.file}: {node.name}", expected="Gather or GatherBlockQuantized", got=node.op_type)
    source = source if via is None else _input(via, 0)
    bits, block = (whole_attribute(graph.file, node, key, value) for key, value in (("bits", 4), ("block_size", 128)))
    scales = graph.weight(node, _input(node, 2), tuple(FLOATS))
    rows = _whole(graph, "vocab_size")
    columns = math.prod(scales.shape) // rows * block
    _check_sizes(graph, node, rows, columns, bits, block)
    codes = graph.weight(node, source, ("UINT8", "UINT4", "INT4"))
    if codes.nbytes != rows * columns * bits // 8:
        raise FormatError(f"{graph.file}: {source}", expected=f"{rows} rows of {columns} codes", got=str(codes.shape))
    names = _input(node, 2), _input(node, 3)
    lazy = _quantized(graph, node, (rows, columns, bits, block), codes, names, None)
    return replace(lazy, name=name), source


def _norms(graph: _Graph, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Norms, which the builder names as transformers does, but for the last, and for those of queries and keys."""
    layers = config["num_hidden_layers"] if type(config.get("num_hidden_layers")) is int else 0
    wanted = {"model.norm.weight": [f"model.layers.{layers}.final_norm_layernorm.weight"]}
    for n in range(min(layers, 10_000)):
        for module, _ in family_of(config, graph.file).norms:
            short = module.replace("self_attn.", "attn.")
            wanted[f"model.layers.{n}.{module}.weight"] = [f"model.layers.{n}.{short}.layernorm.weight"]
    found = {}
    for name, others in wanted.items():
        item = next((graph.stored[other] for other in (name, *others) if other in graph.stored), None)
        if item is None or item.dtype not in FLOATS:
            raise FormatError(f"{graph.file}: {name}", expected="a float initializer", got="none")
        found[name] = _plain(name, item)
    return found
