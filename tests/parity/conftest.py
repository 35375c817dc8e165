"""A quantized tiny Llama, an adapter for it, and both folded: what the tests of parity compare."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qalora.adapter import Adapter, AdapterLayer
from qalora.checkpoint import Checkpoint
from qalora.converters import load, native
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.folding import fold
from qalora.quantization import quantize


@pytest.fixture(scope="session")
def base(tiny: Path) -> Checkpoint:
    """The tiny Llama at 4 bits in groups of 32, real zero points."""
    return quantize(load(tiny), bits=4, group_size=32)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """Makes a random adapter of rank 4 on every linear layer of a model."""

    def make(model: Checkpoint, *, minima: str | None = "float16", size: float = 0.05, pool: int = 32) -> Adapter:
        rng = torch.Generator().manual_seed(1)
        layers = {}
        for name in model.linears:
            rows, columns = model.tensors[name].shape
            a = torch.randn(4, columns // pool, generator=rng) * size
            b = torch.randn(rows, 4, generator=rng) * size
            layers[name.removesuffix(".weight")] = AdapterLayer(a=a, b=b, pool_size=pool, scaling=2.0, factor=2.0)
        return Adapter(layers=layers, convention="paper", minima=minima)

    return make


@pytest.fixture(scope="session")
def adapter(base: Checkpoint, make_adapter: Callable[..., Adapter]) -> Adapter:
    """An adapter trained with float16 minima, or so it says."""
    return make_adapter(base)


@pytest.fixture(scope="session")
def folded(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Base and adapter, folded into float16 minima."""
    return fold(base, adapter, minima="float16")


@pytest.fixture(scope="session")
def write() -> Callable[[str, Checkpoint, Path], Path]:
    """Writes a model in a format, our own folder or one of TARGETS, below a folder; gives the artefact's place."""

    def write_as(form: str, model: Checkpoint, folder: Path) -> Path:
        if form == "qalora":
            (folder / form).mkdir(parents=True)
            native.write(native.plan(model, ExportOptions()), model, folder / form, lambda name, nbytes: None)
        else:
            export(model, [form], folder)
        return folder / form

    return write_as
