"""Open an OpenVINO folder of ours: constants by their names, and what each weight was by the graph's rt_info.

A graph counts by what it computes, and a constant's name says nothing of that: `verify` runs it. Here the constants are
held against what the metadata says of them, and the rotary frequencies against config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of
from qalora.converters.families import family_of
from qalora.converters.huggingface import model_of, read_config
from qalora.converters.openvino import foreign
from qalora.converters.openvino.carriers import ORDER, constants, decode, float_constant
from qalora.converters.openvino.files import MODEL, VERSION, VERSION_KEY
from qalora.converters.openvino.rotary import check_rotary
from qalora.converters.specs import TENSORS, check_values, parse_specs
from qalora.errors import FormatError, shown
from qalora.formats.openvino import DTYPES, Ir, Stored, read_ir, read_stored
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["read"]

COMPRESSED = "nncf/version"
"""Of a graph that NNCF has changed."""


def read(path: Path) -> Checkpoint:
    """Open a folder with openvino_model.xml, or the file, with config.json beside it. Reads the graph and no weights.

    Raises FormatError for constants that are not what the graph says, and what `foreign.read` raises for a graph that
    qalora did not write.
    """
    file = path / MODEL if path.is_dir() else path
    ir = read_ir(file)
    config = read_config(file.parent)
    if TENSORS not in ir.info or COMPRESSED in ir.info:  # which may be made of a graph of ours
        return replace(foreign.read(file, ir, config), path=path)
    if ir.info.get(VERSION_KEY) != VERSION:
        got = shown(ir.info.get(VERSION_KEY))
        raise FormatError(f"{file}: {VERSION_KEY}", expected=VERSION, got=got, todo="update qalora")
    stored = _by_name(ir)
    family, tensors = family_of(config, file.parent), dict[str, LazyTensor]()
    kinds = parse_specs(ir.info[TENSORS], str(file))
    orders = _orders(ir)
    used: set[str] = set()
    for module, spec in kinds.items():
        tensors[f"{module}.weight"], names = _quantized(file, module, spec, stored, orders.get(module))
        used |= names
    for name, item in stored.items():
        if name not in used and name.startswith(("model.", "lm_head.")) and item.element in DTYPES:
            tensors[name] = float_constant(name, item, 1.0 if family.adds_one(name) else 0.0)
    model = model_of(file.parent, "openvino", config, tensors, others="refuse")
    check_rotary(file, stored, decoder_of(model.config, file.parent))
    return replace(model, path=path)


def _by_name(ir: Ir) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for item in ir.constants.values():
        if item.name in stored:
            raise FormatError(f"{ir.path}: two constants are called {shown(item.name)}")
        stored[item.name] = item
    return stored


def _orders(ir: Ir) -> dict[str, str]:
    """{module: name of the order by which the graph gathers what its codes are multiplied with}."""
    found = {}
    for layer in ir.layers.values():
        if layer.kind != "MatMul" or 0 not in layer.inputs or not layer.name.endswith(".out"):
            continue
        before = ir.layers[layer.inputs[0][0]]
        index = before.inputs.get(1)
        if before.kind == "Gather" and index is not None and ir.layers[index[0]].name.endswith(ORDER):
            found[layer.name.removesuffix(".out")] = ir.layers[index[0]].name
    return found


def _quantized(
    file: Path, module: str, spec: QuantSpec, stored: Mapping[str, Stored], order: str | None
) -> tuple[LazyTensor, set[str]]:
    """The lazy tensor, and the constants that it is made of; order: the name of its columns' order."""
    codes = stored.get(f"{module}.codes")
    if codes is None or len(codes.shape) != 3 or 0 in codes.shape:
        got = "no constant" if codes is None else f"{list(codes.shape)}"
        raise FormatError(f"{file}: {module}.codes", expected="codes [out, groups, group size]", got=got)
    shape = (codes.shape[0], codes.shape[1] * codes.shape[2])
    if codes.shape[2] != spec.group_size or shape[1] % 8:
        raise FormatError(
            f"{file}: {module}", expected=f"groups of {spec.group_size}", got=f"codes {list(codes.shape)}"
        )
    spec = replace(spec, act_order=order is not None)
    planned = {item.name: (item.element, item.shape) for item in constants(module, shape, spec)}
    if order is not None:
        planned[order] = ("i64", (shape[1],))
    for name, wanted in planned.items():
        item = stored.get(name)
        if item is None or (item.element, item.shape) != wanted:
            got = "none" if item is None else f"{item.element} {list(item.shape)}"
            raise FormatError(f"{file}: {name}", expected=f"{wanted[0]} {list(wanted[1])}", got=got)

    def fetch(name: str, start: int, stop: int) -> Tensor:
        return read_stored(stored[order if order is not None and name == f"{module}{ORDER}" else name], start, stop)

    def read_rows(start: int, stop: int) -> GroupQuantTensor:
        tensor = decode(module, fetch, spec, shape, start, stop)
        check_values(tensor, spec)
        return tensor

    nbytes = sum(stored[name].nbytes for name in planned if name.startswith(f"{module}."))  # an order may be another's
    return (
        LazyTensor(name=f"{module}.weight", shape=shape, spec=spec, nbytes=nbytes, by_rows=True, read=read_rows),
        set(planned),
    )
