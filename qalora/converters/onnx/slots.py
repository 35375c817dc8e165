"""Slots for LoRAs in a graph, and the file that fills them: ONNX Runtime's adapters (`.onnx_adapter`).

A graph with slots has two more inputs for each module that may be adapted, with a default of rank 0, so that it runs as
before where nothing is given:

    <module>.lora_A   FLOAT [in, rank]
    <module>.lora_B   FLOAT [rank, out]          y = W x + (x @ lora_A) @ lora_B

An adapter file holds tensors of these names; RunOptions.add_active_adapter, or Adapters of onnxruntime-genai, puts
them in. It has no scaling: a layer's factor is multiplied into its A, which rounds to float32 once, unless the factor
is a power of two. A QA-LoRA layer's A repeats its columns over the pool, which rounds nothing.

The slots are put into a finished graph, whichever builder made it: a module's product is read from `x`, the first input
of the nodes that take its weight (what was gathered for act-order, where x was), and ends at the one output named
`<module>.out...` that no other such node takes.

Source: onnxruntime, docs/Lora.md and its Python class AdapterFormat.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.adapter import Adapter, AdapterLayer, check_plain
from qalora.checkpoint import Checkpoint
from qalora.converters.format import LoraContent
from qalora.converters.onnx.order import ungathered
from qalora.errors import AdapterError, FormatError, InputError, OutputError, first_line
from qalora.formats.files import check_content

__all__ = ["RANK", "add_slots", "content", "read_adapter_file", "rounded_modules", "slot_names", "write_adapter_file"]

RANK = "lora_rank"


def slot_names(module: str) -> tuple[str, str]:
    """The inputs of a module's slot."""
    return f"{module}.lora_A", f"{module}.lora_B"


def add_slots(proto: Any, model: Checkpoint, modules: Collection[str]) -> Any:
    """Put slots for the modules into a graph of the model, in place; gives the graph.

    InputError for a module whose product the graph does not have.
    """
    from onnx import TensorProto, helper

    for module in sorted(modules):
        lazy = model.tensors.get(f"{module}.weight")
        if lazy is None or f"{module}.weight" not in model.linears:
            raise InputError(
                f"`lora_slots`: {module} is no linear layer of {model.path}",
                field="lora_slots",
                todo="give an adapter of this model",
            )
        rows, columns = lazy.shape
        a, b = slot_names(module)
        for name, shape, default in ((a, [columns, RANK], (columns, 0)), (b, [RANK, rows], (0, rows))):
            proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            proto.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, default, b"", raw=True))
        _insert(proto.graph, module, helper)
    return proto


def _insert(graph: Any, module: str, helper: Any) -> None:
    """Add the branch behind the module's product, before the nodes that take it."""
    prefix = f"{module}.out"
    own = [n for n, node in enumerate(graph.node) if any(out.startswith(prefix) for out in node.output)]
    inner = {name for n in own for name in graph.node[n].input}
    ends = [out for n in own for out in graph.node[n].output if out.startswith(prefix) and out not in inner]
    weight = {f"{module}.weight", f"{module}.codes"}
    x = next((node.input[0] for node in graph.node if weight & set(node.input)), None)
    if len(ends) != 1 or x is None:
        raise InputError(f"onnx: {module} has no place for a LoRA in this graph", todo="leave it out of `lora_slots`")
    (end,) = ends
    x, (a, b) = ungathered(graph, x), slot_names(module)
    for node in graph.node:
        for n, name in enumerate(node.input):
            if name == end:
                node.input[n] = f"{module}.adapted"
    made = [
        helper.make_node("MatMul", [x, a], [f"{module}.lora_inner"], name=f"/{module}.lora_inner"),
        helper.make_node("MatMul", [f"{module}.lora_inner", b], [f"{module}.lora"], name=f"/{module}.lora"),
        helper.make_node("Add", [end, f"{module}.lora"], [f"{module}.adapted"], name=f"/{module}.adapted"),
    ]
    for offset, node in enumerate(made):
        graph.node.insert(own[-1] + 1 + offset, node)


def rounded_modules(adapter: Adapter) -> tuple[str, ...]:
    """The modules whose A is rounded when their factor is multiplied into it."""
    return tuple(module for module, layer in adapter.layers.items() if math.frexp(abs(layer.factor))[0] not in (0, 0.5))


def _matrices(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """lora_A [in, rank] and lora_B [rank, out], float32."""
    a = layer.a if layer.factor == 1 else (layer.a.double() * layer.factor).float()
    return a.repeat_interleave(layer.pool_size, dim=1).t().contiguous(), layer.b.t().contiguous()


def write_adapter_file(adapter: Adapter, model: Checkpoint | None, path: Path) -> tuple[str, ...]:
    """Write an .onnx_adapter file of the whole adapter, whichever model it is of; gives `rounded_modules`.

    AdapterError for one without layers, OutputError where ONNX Runtime cannot write it.
    """
    import onnxruntime

    if not adapter.layers:
        raise AdapterError("adapter", expected="at least one layer", got="none")
    check_plain(adapter, "an ONNX Runtime adapter")
    parameters: dict[str, Any] = {}
    for module, layer in sorted(adapter.layers.items()):
        for name, matrix in zip(slot_names(module), _matrices(layer), strict=True):
            parameters[name] = onnxruntime.OrtValue.ortvalue_from_numpy(matrix.numpy())
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(parameters)
    try:
        made.export_adapter(str(path))
    except RuntimeError as error:
        raise OutputError(f"{path} could not be written", todo="free some space") from error
    return rounded_modules(adapter)


def content(path: Path) -> LoraContent:
    """What an .onnx_adapter file holds; raises as `read_adapter_file`."""
    slots = read_adapter_file(path)
    matrices = [pair for module, both in slots.items() for pair in zip(slot_names(module), both, strict=True)]
    return LoraContent(
        ranks=tuple(a.shape[1] for a, _ in slots.values()),
        parameters=sum(values.numel() for _, values in matrices),
        matrices=iter(matrices),
    )


def read_adapter_file(path: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of each module in an .onnx_adapter file, as copies; FormatError for what is none."""
    import onnxruntime

    check_content(path)
    try:
        values = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as error:  # onnxruntime has no error tree that could be named
        reason = first_line(error)
        raise FormatError(f"{path}", expected="an ONNX Runtime adapter", got=reason) from error
    found = {name: torch.from_numpy(value.numpy().copy()) for name, value in values.items()}
    modules = sorted({name.rpartition(".lora_")[0] for name in found})
    slots = {module: slot_names(module) for module in modules}
    if not slots or {name for pair in slots.values() for name in pair} != set(found):
        raise FormatError(f"{path}", expected="<module>.lora_A and <module>.lora_B", got=", ".join(sorted(found)[:3]))
    return {module: (found[a], found[b]) for module, (a, b) in slots.items()}
