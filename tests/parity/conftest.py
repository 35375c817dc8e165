"""A quantized tiny Llama, an adapter for it, and both folded: what the tests of parity compare."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load, native
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.folding import fold
from qalora.formats.share import Share
from qalora.quantization import quantize
from qalora.testing import random_adapter


@pytest.fixture(scope="session")
def base(tiny: Path) -> Checkpoint:
    """The tiny Llama at 4 bits in groups of 32, real zero points."""
    return quantize(load(tiny), bits=4, group_size=32)


@pytest.fixture(scope="session")
def adapter(base: Checkpoint) -> Adapter:
    """An adapter on every linear layer, trained with float16 minima, or so it says."""
    return random_adapter(base, pool_size=None, seed=1, a_size=0.05, b_size=0.05, scaling=2.0)


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
            native.write(native.plan(model, ExportOptions()), model, folder / form, lambda name, nbytes: None, Share())
        else:
            export(model, [form], folder)
        return folder / form

    return write_as


@pytest.fixture(scope="session")
def made(
    base: Checkpoint,
    folded: Checkpoint,
    write: Callable[[str, Checkpoint, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:
    """Writes the "base" or the "folded" model in a format, once for all tests: none may change what it gets."""
    models, places = {"base": base, "folded": folded}, dict[tuple[str, str], Path]()

    def once(form: str, model: str) -> Path:
        if (form, model) not in places:
            places[form, model] = write(form, models[model], tmp_path_factory.mktemp(model))
        return places[form, model]

    return once
