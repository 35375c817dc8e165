"""Open an MNN folder of ours: bytes by what the graph says of them, and what each weight was by llm_config.json.

A graph counts by what it computes, which names do not tell: `verify` runs it. Here what it says of the weights is held
against their specs and shapes, and the rotary frequencies against config.json. A folder that llmexport wrote is refused
by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of, used_ropes
from qalora.converters.huggingface import model_of, read_config
from qalora.converters.mnn.carriers import container, decode, from_float_table, middle, table_of_codes
from qalora.converters.mnn.decoder import EMBEDDING, FREQUENCIES, engine_config
from qalora.converters.mnn.files import CONFIG, LIMIT, MODEL, OPTIONS, TABLE, VERSION, VERSION_KEY, WEIGHTS
from qalora.converters.rope import wide_frequencies
from qalora.converters.settings import bias_names, check_config
from qalora.converters.specs import TENSORS, check_values, parse_specs
from qalora.errors import FormatError, shown
from qalora.formats.files import InputFile, contained, read_limited
from qalora.formats.json_text import read_json_object
from qalora.formats.mnn import WIDE, Item, header_bytes, stream_shape
from qalora.formats.mnn_graph import read_graph
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec, check_finite

__all__ = ["read"]

CLOSE = 2.0**-19


def read(path: Path) -> Checkpoint:
    """Open a folder with llm.mnn, or the file, with its configs beside it. Reads no weights.

    Raises FormatError for a folder that qalora did not write, and for places that do not fit the shapes.
    """
    folder = path if path.is_dir() else path.parent
    said = read_json_object(contained(folder, CONFIG), LIMIT)
    if said.get(VERSION_KEY) != VERSION or not isinstance(said.get(TENSORS), str):
        got = shown(said.get(VERSION_KEY))
        todo = "start from the model that it was made of"
        raise FormatError(f"{folder / CONFIG}: {VERSION_KEY}", expected=VERSION, got=got, todo=todo)
    config = {key: value for key, value in read_config(folder).items() if key not in OPTIONS}
    file = contained(folder, MODEL)
    graph = _Graph(file, contained(folder, WEIGHTS), read_graph(read_limited(file, LIMIT), str(file)))
    tensors, biases = dict[str, LazyTensor](), dict[str, LazyTensor]()
    check_config(config, folder)
    announced = bias_names(config, folder)
    specs = parse_specs(said[TENSORS], str(folder / CONFIG))
    products = graph.of("Convolution")
    for name, main in products.items():
        if name == EMBEDDING and EMBEDDING not in specs:
            continue  # the float output layer that is tied to the table
        tensors[f"{name}.weight"] = graph.matrix(name, main, specs.get(name))
        bias = graph.bias(name, main)
        if bias is not None and (bias.name in announced or bool(bias.load_float().any())):
            biases[bias.name] = bias  # zeros are what stands for none
    for name, main in graph.of("LayerNorm").items():
        tensors[f"{name}.weight"] = graph.norm(name, main)
    if f"{EMBEDDING}.weight" in tensors:
        graph.check_table(said, tensors[f"{EMBEDDING}.weight"], products[EMBEDDING])
    else:
        table = graph.table(said, products, specs.get(EMBEDDING), folder)
        if EMBEDDING in products:  # the output layer, which holds the same numbers
            own = graph.matrix(EMBEDDING, products[EMBEDDING], None)
            table = replace(table, nbytes=(table.nbytes or 0) + (own.nbytes or 0))
        tensors[table.name] = table
    absent = sorted(set(specs) - {name.removesuffix(".weight") for name in tensors})
    if absent:
        raise FormatError(f"{folder / CONFIG}: {TENSORS}", expected="layers of the graph", got=shown(absent[0]))
    model = model_of(folder, "mnn", config, {**tensors, **biases}, others="refuse")
    for key, value in engine_config(decoder_of(model.config, folder)).items():
        if said.get(key) != value:
            raise FormatError(f"{folder / CONFIG}: {key}", expected=shown(value), got=shown(said.get(key)))
    graph.check_rotary(model)
    return replace(model, path=path)


@dataclass(frozen=True, slots=True)
class _Graph:
    """What the graph of a file says of the weights beside it."""

    path: Path
    weights: Path
    net: Mapping[str, Any]

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """{name: table} of the operators of a kind."""
        found: dict[str, dict[str, Any]] = {}
        for op in self.net.get("oplists", []):
            if op.get("type") == kind:
                name = op.get("name", "")
                if name in found or not isinstance(op.get("main"), dict):
                    raise FormatError(f"{self.path}: two operators, or one of nothing, are called {shown(name)}")
                found[name] = op["main"]
        return found

    def matrix(self, module: str, main: Mapping[str, Any], spec: QuantSpec | None) -> LazyTensor:
        """The weight of a convolution."""
        common, external = main.get("common", {}), main.get("external", [])
        shape = (common.get("outputCount", 0), common.get("inputCount", 0))
        quantization = main.get("quanParameter")
        if (spec is None) != (quantization is None):
            raise self._not(module, "codes" if spec else "floats", "codes" if quantization else "floats")
        if min(shape) < 1 or len(external) != (3 if spec is None else 5):
            raise self._not(module, "a shape and a place in the file of weights", f"{list(shape)}, {external}")
        if spec is None or quantization is None:
            item = Item(name=f"{module}.weight", dtype=torch.float32, shape=shape, offset=external[0])
            if external[1] != item.nbytes:
                raise self._not(module, f"{item.nbytes} bytes", str(external[1]))
            return self._float(item)
        return self._quantized(module, shape, spec, quantization, external)

    def _quantized(
        self,
        module: str,
        shape: tuple[int, int],
        spec: QuantSpec,
        quantization: Mapping[str, Any],
        external: list[int],
    ) -> LazyTensor:
        parts = self._parts(module, shape, spec, external[0])
        bits, moved = container(module, spec.bits), middle(module, container(module, spec.bits))
        wanted = {
            "type": 1,
            "aMaxOrBits": bits,
            "aMin": 1 if moved else -(1 << (bits - 1)),
            "readType": shape[0] * shape[1] // spec.group_size,
            "shapeInt32": max(shape) > WIDE,
            "scaleStorage": "FP32",
        }
        got = {key: quantization.get(key) for key in wanted}
        if got != wanted:
            raise self._not(module, str(wanted), str(got))
        header, codes, alpha = parts
        if external[1:3] != [header.nbytes + codes.nbytes, alpha.nbytes]:
            raise self._not(module, f"{header.nbytes + codes.nbytes} and {alpha.nbytes} bytes", str(external[1:3]))
        return self._lazy(module, shape, spec, parts)

    def _parts(self, module: str, shape: tuple[int, int], spec: QuantSpec, offset: int) -> tuple[Item, Item, Item]:
        if spec.group_size < 1 or shape[1] % spec.group_size or shape[1] % 8 or spec.bits not in BITS:
            raise self._not(module, f"groups of {spec.group_size} columns", f"{shape[1]} columns")
        bits = container(module, spec.bits)
        header = Item(
            name=f"{module}.header", dtype=torch.uint8, shape=(len(header_bytes(shape, bits)),), offset=offset
        )
        codes = Item(
            name=f"{module}.codes", dtype=torch.uint8, shape=stream_shape(shape, bits), offset=offset + header.nbytes
        )
        groups = (shape[0], shape[1] // spec.group_size, 2)
        alpha = Item(name=f"{module}.alpha", dtype=torch.float32, shape=groups, offset=codes.offset + codes.nbytes)
        return header, codes, alpha

    def _lazy(self, module: str, shape: tuple[int, int], spec: QuantSpec, parts: tuple[Item, Item, Item]) -> LazyTensor:
        header, codes, alpha = parts
        expected = header_bytes(shape, container(module, spec.bits))

        def read_rows(start: int, stop: int) -> GroupQuantTensor:
            found = bytes(_read(self.weights, header).numpy())
            if found != expected:
                raise self._not(module, f"a header of {list(shape)} at {spec.bits} bits", shown(found[:8]))
            stream, sums = (_read(self.weights, item, start, stop) for item in (codes, alpha))
            tensor = decode(module, stream, sums, spec)
            check_values(tensor, spec)
            return tensor

        size = sum(item.nbytes for item in parts)
        return LazyTensor(name=f"{module}.weight", shape=shape, spec=spec, nbytes=size, by_rows=True, read=read_rows)

    def bias(self, module: str, main: Mapping[str, Any]) -> LazyTensor | None:
        """The bias of a convolution, which lies behind its weight."""
        external, rows = main["external"], main["common"]["outputCount"]
        size = external[3] if len(external) == 5 else external[2]
        if not size:
            return None
        before = sum(external[:3]) if len(external) == 5 else sum(external[:2])
        item = Item(name=f"{module}.bias", dtype=torch.float32, shape=(rows,), offset=before)
        if size != item.nbytes:
            raise self._not(f"{module}.bias", f"{item.nbytes} bytes", str(size))
        return self._float(item)

    def norm(self, module: str, main: Mapping[str, Any]) -> LazyTensor:
        """The weight of a norm."""
        external = main.get("external", [])
        if len(external) != 3 or external[1] != external[2] or external[1] % 4 or external[1] < 4:
            raise self._not(module, "a place in the file of weights", str(external))
        shape = (external[1] // 4,)
        lazy = self._float(Item(name=f"{module}.weight", dtype=torch.float32, shape=shape, offset=external[0]))
        return replace(lazy, nbytes=external[1] + external[2])  # with the zeros behind it

    def table(
        self, said: Mapping[str, Any], products: Mapping[str, Any], spec: QuantSpec | None, folder: Path
    ) -> LazyTensor:
        """The embedding, where no convolution holds it; its shape is that of the output layer."""
        name, where = f"{EMBEDDING}.weight", said.get("tie_embeddings")
        common = products.get("lm_head", products.get(EMBEDDING, {})).get("common", {})
        shape = (common.get("outputCount", 0), common.get("inputCount", 0))
        if min(shape) < 1:
            raise self._not("lm_head", "an output layer", "none")
        if where is None:
            item = Item(name=name, dtype=torch.bfloat16, shape=shape)
            return self._float(item, contained(folder, TABLE))
        if not isinstance(where, list) or len(where) != 5 or any(type(n) is not int for n in where):
            raise FormatError(f"{folder / CONFIG}: tie_embeddings", expected="five numbers", got=shown(where))
        if spec is not None:
            header = len(header_bytes(shape, container(EMBEDDING, spec.bits)))
            parts = self._parts(EMBEDDING, shape, spec, where[0] - header)
            wanted = table_of_codes(*parts[1:], spec)
            if where != wanted:
                raise self._not("tie_embeddings", str(wanted), str(where))
            return self._lazy(EMBEDDING, shape, spec, parts)
        if where[3] == 16:
            return self._float(Item(name=name, dtype=torch.float16, shape=shape, offset=where[0]))
        item = Item(name=name, dtype=torch.float32, shape=shape, offset=where[1])
        if where != [where[1] - item.nbytes // 4, where[1], item.nbytes, 8, 1]:
            raise self._not("tie_embeddings", "a table of floats", str(where))
        return self._float(item, scales=True)

    def check_table(self, said: Mapping[str, Any], lazy: LazyTensor, main: Mapping[str, Any]) -> None:
        """Refuse a table of embeddings that is another than the weight of the output layer."""
        if lazy.spec is None:
            return
        _, codes, alpha = self._parts(EMBEDDING, (lazy.shape[0], lazy.shape[1]), lazy.spec, main["external"][0])
        wanted = table_of_codes(codes, alpha, lazy.spec)
        if said.get("tie_embeddings") != wanted:
            raise self._not("tie_embeddings", str(wanted), shown(said.get("tie_embeddings")))

    def check_rotary(self, model: Checkpoint) -> None:
        """Refuse a graph whose frequencies are not those of the config."""
        decoder, constants = decoder_of(model.config, model.path), self.of("Const")
        for kind in used_ropes(decoder):
            rope = decoder.ropes[kind]
            wanted = wide_frequencies(rope, decoder.head_size, decoder.positions)[0][0]
            got = torch.tensor(constants.get(FREQUENCIES.format(kind), {}).get("float32s", [])).double()
            if got.shape != wanted.shape or not bool(((got - wanted).abs() <= CLOSE * wanted).all()):
                raise FormatError(
                    f"{self.path}: {FREQUENCIES.format(kind)}",
                    expected=f"rotary positions as config.json says, {rope.parameters()!s:.120}",
                    got="different positions",
                    todo="the graph counts: put back the config.json that was written with it",
                )

    def _float(self, item: Item, path: Path | None = None, *, scales: bool = False) -> LazyTensor:
        file = path or self.weights

        def read_rows(start: int, stop: int) -> Tensor:
            rows = _read(file, item, start, stop)
            check_finite(item.name, rows)
            return from_float_table(rows) if scales else rows

        return LazyTensor(
            name=item.name, shape=item.shape, dtype=item.dtype, nbytes=item.nbytes, by_rows=True, read=read_rows
        )

    def _not(self, name: str, expected: str, got: str) -> FormatError:
        return FormatError(f"{self.path}: {name}", expected=expected, got=got)


def _read(path: Path, item: Item, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start..stop-1 of an item, of its dtype and shape."""
    rows = item.shape[0]
    stop = rows if stop is None else stop
    begin = item.row_at(start)
    with InputFile(path) as file:
        data = file.tensor(item.offset + begin, item.row_at(stop) - begin)
    return data.view(item.dtype).view(stop - start, *item.shape[1:])
