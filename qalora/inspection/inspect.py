"""Recognise what lies at a path, and inspect it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qalora.adapter import Convention
from qalora.converters import load, loras
from qalora.errors import InputError
from qalora.formats.output import Progress
from qalora.inspection.adapter import inspect_adapter, inspect_lora
from qalora.inspection.model import inspect_model
from qalora.inspection.records import AdapterReport, FolderReport, ModelReport, Report
from qalora.inspection.unknown import unknown_family

__all__ = ["inspect"]


def inspect(
    path: str | Path,
    *,
    base: str | Path | None = None,
    convention: Convention | None = None,
    quick: bool = False,
    checkpoint_format: str | None = None,
    progress: Callable[[int], Progress] | None = None,
) -> Report:
    """Inspect a model, an adapter's folder or file, an artefact, a folder of artefacts, or a model's Hub id.

    base        the model that an adapter belongs to: shapes, pools and groups are held against it
    convention  what an adapter's scaling means, where its file does not say
    quick       read headers, labels and zero points only; else every value is read, a layer at a time
    checkpoint_format   what a GPTQ folder's zero points are stored as, where its label is wrong
    progress    called with the weights of a model that is going to be read; gives what to call with (name, weights)

    Raises InputError for what is not there, is not recognised, or is so damaged that it has no header to read.
    """
    place = Path(path)
    if place.is_dir() and (place / "adapter_config.json").exists() and not (place / "config.json").exists():
        return inspect_adapter(place, base, convention)
    if place.is_dir() and not (place / "config.json").exists():
        return _folder(place, quick, progress)
    return _one(path, quick, progress, checkpoint_format)


def _one(
    path: str | Path,
    quick: bool,
    progress: Callable[[int], Progress] | None,
    checkpoint_format: str | None = None,
) -> ModelReport | AdapterReport:
    """A single file, a model's folder, or a Hub id."""
    place = Path(path)
    for kind in loras().values() if place.is_file() else ():
        if kind.holds(place):
            return inspect_lora(place, kind)
    try:
        model = load(path, checkpoint_format=checkpoint_format)
    except InputError as error:
        if place.is_dir():
            raise unknown_family(place, error) from error
        raise
    counted = sum(_size(lazy.shape) for lazy in model.tensors.values())
    return inspect_model(model, Path(path), quick=quick, progress=None if progress is None else progress(counted))


def _folder(path: Path, quick: bool, progress: Callable[[int], Progress] | None) -> Report:
    """What lies in a folder that is no model itself."""
    from qalora.parity.artifacts import recognize

    artifacts = recognize([path])
    places = [place for artifact in artifacts for place in (artifact.path, artifact.lora) if place is not None]
    reports = [_one(place, quick, progress) for place in places]
    return reports[0] if len(reports) == 1 else FolderReport(path=path, artifacts=tuple(reports))


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
