"""Quantize a model with the inputs that its layers see on a text, a decoder layer at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora._version import __version__
from qalora.calibration.streaming import LinearLayer, stream
from qalora.calibration.tensor_file import TensorFile
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.devices import CPU
from qalora.engines import Engine
from qalora.errors import InputError
from qalora.formats.output import json_bytes
from qalora.formats.workers import JOB_BYTES
from qalora.quantization.model import plan_specs
from qalora.quantization.options import QuantizeOptions, quantize_weight
from qalora.tensor import GroupQuantTensor, QuantSpec

__all__ = ["keeping", "quantize_calibrated"]


def quantize_calibrated(
    model: Checkpoint,
    windows: Tensor,
    options: QuantizeOptions | Mapping[str, QuantizeOptions],
    *,
    requantize: bool = False,
    keep: Path | None = None,
    device: torch.device = CPU,
    tick: Callable[[], None] = lambda: None,
    engine: Engine | None = None,
) -> Checkpoint:
    """The model with its linear weights quantized, each on the inputs that the quantized layers before it give.

    windows  int64 [windows, tokens], see `calibration_windows`
    options  for all linear weights, or for each by name
    keep     a file for what comes out: a later call with the same model, windows and options goes on from the decoder
             layers that are whole there; None for a temporary file without a name
    device   where the layers are computed and quantized, one at a time
    tick     called after each decoder layer
    engine   quantizes the layers of one input, such as q, k and v, at the same time, in other processes

    All the work is done when the first linear weight is read; what comes out waits in the file. Raises
    InputError, before anything is read, as `qalora.quantization.quantize` does. Deterministic with the same number of
    threads, on a CPU.
    """
    options_by_name = dict.fromkeys(model.linears, options) if isinstance(options, QuantizeOptions) else dict(options)
    specs = plan_specs(model, options_by_name, requantize=requantize)

    def compute() -> TensorFile:
        key = "" if keep is None else _key(model, windows, options_by_name, device)
        kept = TensorFile(keep, key, lazily)
        return _quantized(model, windows, options_by_name, device, tick, kept, engine)

    computed = _Once(compute)
    lazily = {name: _lazily(model.tensors[name], spec, computed) for name, spec in specs.items()}
    return replace(model, tensors={**model.tensors, **lazily})


class _Once:
    """The file of the quantized tensors, made when it is first asked for. Another process gets the file as it is."""

    def __init__(self, compute: Callable[[], TensorFile]) -> None:
        self._compute = compute
        self._file: TensorFile | None = None

    def __call__(self) -> TensorFile:
        if self._file is None:
            self._file = self._compute()
        return self._file

    def __reduce__(self) -> tuple[Any, ...]:
        return _there, (self(),)


def _there(file: TensorFile) -> Callable[[], TensorFile]:
    return lambda: file


def _quantized(
    model: Checkpoint,
    windows: Tensor,
    options: Mapping[str, QuantizeOptions],
    device: torch.device,
    tick: Callable[[], None],
    file: TensorFile,
    engine: Engine | None,
) -> TensorFile:
    def known(name: str) -> Tensor | None:
        return file.tensor(name).dequantize() if name in file else None

    work = partial(_quantized_layer, options, torch.get_num_threads())

    def visit(stage: Sequence[LinearLayer]) -> Iterator[Tensor]:
        apart = {}
        if engine is not None and len(stage) > 1:
            apart = {layer.name: tensor for layer, tensor in engine.map(work, stage)}
        for layer in stage:
            tensor = apart[layer.name] if apart else work(layer)
            file.put(layer.name, tensor.to(CPU))
            yield tensor.to(device).dequantize()

    stream(model, windows, visit, tick, known, device=device)
    return file


def keeping(
    model: Checkpoint, quantized: Checkpoint, options: QuantizeOptions, keep: Path, *, device: torch.device = CPU
) -> Checkpoint:
    """A model whose linear weights, once they were quantized, are kept in a file: a later call with the same model and
    options takes them from there.

    model, quantized  before, and what `qalora.quantization.quantize` gives for it
    """
    wanted = {name: quantized.tensors[name] for name in quantized.linears}
    key = _key(model, torch.empty(0), dict.fromkeys(quantized.linears, options), device)
    file = TensorFile(keep, key, wanted)

    def kept(lazy: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> GroupQuantTensor:
            if lazy.name not in file:
                file.put(lazy.name, _by_rows(lazy))
            return file.rows(lazy.name, start, stop)

        return replace(lazy, by_rows=True, read=read)

    return replace(quantized, tensors={**quantized.tensors, **{name: kept(lazy) for name, lazy in wanted.items()}})


def _by_rows(lazy: LazyTensor) -> GroupQuantTensor:
    """A whole tensor, made some rows at a time: a search needs many times the memory of its weights."""
    tiles = [tile for _, tile in lazy.pieces(JOB_BYTES) if isinstance(tile, GroupQuantTensor)]
    packed, scale, minimum = (torch.cat([getattr(tile, part) for tile in tiles]) for part in ("packed", "scale", "min"))
    return replace(tiles[0], packed=packed, scale=scale, min=minimum)


def _quantized_layer(options: Mapping[str, QuantizeOptions], threads: int, layer: LinearLayer) -> GroupQuantTensor:
    """A layer quantized with this number of threads, on which the order of the sums depends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return quantize_weight(layer.weight, options[layer.name], layer.moments)
    except InputError as error:
        raise InputError(f"{layer.name}: {error}") from error
    finally:
        torch.set_num_threads(before)


def _key(model: Checkpoint, windows: Tensor, options: Mapping[str, QuantizeOptions], device: torch.device) -> str:
    """A digest of all that the codes depend on: the model's files by size and time, and the libraries' sums."""
    folder = model.path if model.path.is_dir() else model.path.parent
    # names that begin with a point are of runs, this one's too where the output is in the same folder
    shown = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = [(path.name, path.stat()) for path in shown if path.is_file()]
    parts = {
        "versions": [__version__, torch.__version__, torch.get_num_threads(), device.type],
        "path": str(model.path.resolve()),
        "files": [[os.fsencode(name).hex(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in files],
        "config": model.config,
        "options": {name: asdict(each) for name, each in options.items()},
        "windows": [list(windows.shape), hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()],
    }
    return hashlib.sha256(json_bytes(parts)).hexdigest()


def _lazily(source: LazyTensor, spec: QuantSpec, computed: Callable[[], TensorFile]) -> LazyTensor:
    def read(start: int, stop: int) -> GroupQuantTensor:
        return computed().rows(source.name, start, stop)

    return LazyTensor(name=source.name, shape=source.shape, spec=spec, read=read)
