"""manifest.json made and read; what it holds stands in `qalora.releasing.records`."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora._version import __version__
from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import packages
from qalora.converters.folder import companions
from qalora.converters.plan import PROVENANCE, Plan, PlannedTensor
from qalora.converters.wrapping import whole_config
from qalora.errors import InputError, shown
from qalora.formats.files import files_below
from qalora.formats.json_text import read_json
from qalora.formats.output import json_bytes
from qalora.formats.record_json import decode
from qalora.releasing.digests import (
    adapter_digests,
    combined_digest,
    content_digest,
    file_digest,
    model_digests,
    range_digest,
    saved_digests,
)
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.records import (
    AdapterEntry,
    ArtifactEntry,
    BaseEntry,
    FileEntry,
    GateEntry,
    Manifest,
    TensorEntry,
)

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = [
    "MANIFEST",
    "adapter_part",
    "artifact_part",
    "base_part",
    "created",
    "gate_entries",
    "make_manifest",
    "provenance",
    "read_manifest",
]

MANIFEST = "manifest.json"
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""The libraries that have a part in what is written, whatever the format."""

LIMIT = 256 << 20
"""Bytes of a manifest that are read at most."""


def base_part(model: Checkpoint) -> BaseEntry:
    """What the manifest says of the base. Reads all of it, a tile at a time."""
    tensors = model_digests(model)
    return BaseEntry(
        name=_name(model),
        source=_source(model),
        license=_license(model),
        layout=model.layout,
        parameters=sum(math.prod(lazy.shape) for lazy in model.everything.values()),
        digest=combined_digest(tensors),
        config=content_digest(json_bytes(_portable(whole_config(model, model.config)))),
        files={name: file_digest(path) for name, path in sorted(companions(model).items())},
        tensors=tensors,
    )


def adapter_part(adapter: Adapter | None) -> AdapterEntry | None:
    """What the manifest says of the adapter."""
    if adapter is None:
        return None
    layers, saved = adapter_digests(adapter), saved_digests(adapter)
    told = {"convention": adapter.convention, "minima": adapter.minima}
    digest = combined_digest({**layers, "adapter": told, **({"saved": saved} if saved else {})})
    return AdapterEntry(digest=digest, convention=adapter.convention, minima=adapter.minima, layers=layers, saved=saved)


def provenance(base: str, adapter: str | None) -> dict[str, str]:
    """The metadata that every artefact carries, of the digests of base and adapter."""
    told = {"version": __version__, "base": base, **({} if adapter is None else {"adapter": adapter})}
    return {f"{PROVENANCE}{key}": value for key, value in told.items()}


def artifact_part(plan: Plan, folder: Path, parameters: int) -> ArtifactEntry:
    """What the manifest says of one target's folder, `folder/<target>`, which has been written."""
    root = folder / plan.target
    files = {
        name: FileEntry(nbytes=(root / name).stat().st_size, sha256=file_digest(root / name))
        for name in files_below(root)
    }
    nbytes = sum(file.nbytes for file in files.values())
    return ArtifactEntry(
        target=plan.target,
        folder=plan.target,
        nbytes=nbytes,
        bits_per_weight=round(8 * nbytes / parameters, 3),
        longest=plan.longest,
        notes=plan.notes,
        files={f"{plan.target}/{name}": file for name, file in files.items()},
        tensors=tuple(_tensor_entry(tensor, root / tensor.file) for tensor in plan.tensors),
        device_load=plan.device_load,
    )


def _tensor_entry(planned: PlannedTensor, path: Path) -> TensorEntry:
    told = {one.name: getattr(planned, one.name) for one in fields(planned)}
    return TensorEntry(**told, sha256=range_digest(path, planned.offset, planned.nbytes))


def make_manifest(
    *,
    base: BaseEntry,
    adapter: AdapterEntry | None,
    options: ReleaseOptions,
    artifacts: Sequence[ArtifactEntry],
    report: ParityReport,
    licences: Sequence[str],
) -> Manifest:
    """Put the parts together."""
    told = [run.runtime for _, run in report.runs() if run.runtime is not None]
    return Manifest(
        name=options.export.name or base.name,
        created=created(),
        versions={**_versions(), **{runtime.name: _unlabelled(runtime.version) for runtime in told}},
        base=base,
        adapter=adapter,
        options=options.entry(),
        artifacts=tuple(artifacts),
        gates=gate_entries(report),
        passed=report.passed(),
        licences=tuple(sorted(licences)),
    )


def gate_entries(report: ParityReport) -> tuple[GateEntry, ...]:
    """What the manifest says of a report's gates."""
    return tuple(GateEntry(at=where, gate=found.gate, status=found.status) for where, found in report.results())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a release. FormatError names the key that is wrong."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: {MANIFEST}", expected="the manifest of a release", got="no such file")
    return decode(Manifest, read_json(path, LIMIT, strict=True), str(path))


def created() -> str | None:
    """The time that SOURCE_DATE_EPOCH gives (https://reproducible-builds.org/specs/source-date-epoch), or None."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return None
    if not given.isdigit() or int(given) > 253402300799:  # the last second of the year 9999
        raise InputError("SOURCE_DATE_EPOCH", expected="seconds since 1970", got=shown(given))
    return datetime.fromtimestamp(int(given), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unlabelled(version: str) -> str:
    """A version without a build's local label, as in 2.13.0+cpu: it is the same code."""
    return re.sub(r"\+\w[\w.]*", "", version)


def _versions() -> dict[str, str]:
    found = {"qalora": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for name in sorted({*LIBRARIES, *packages()}):
        try:
            found[name] = _unlabelled(version(name))
        except PackageNotFoundError:
            continue
    return found


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where it was loaded from."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _name(model: Checkpoint) -> str:
    """As GGUF metadata says, or as the Hub or the folder calls it; one line of plain text."""
    given = None if model.gguf is None else model.gguf.get("general.name")
    if not isinstance(given, str):
        source = _source(model)
        given = source.partition("/")[2] if source else model.path.stem if model.path.is_file() else model.path.name
    return "".join(char for char in given if char.isalnum() or char in " -_.+")[:100] or "model"


def _source(model: Checkpoint) -> str | None:
    """The Hub id: of the cache's folder `models--<owner>--<name>/snapshots/<revision>`, or what config or GGUF say."""
    parts = model.path.absolute().parts
    cached = [part for part, after in pairwise(parts) if after == "snapshots"]
    if cached and cached[-1].startswith("models--"):
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    given = model.config.get("_name_or_path")
    if model.gguf is not None:
        given = str(model.gguf.get("general.base_model.0.repo_url") or "").removeprefix("https://huggingface.co/")
    plain = isinstance(given, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", given)
    return given if plain else None


def _license(model: Checkpoint) -> str | None:
    given = None if model.gguf is None else model.gguf.get("general.license")
    plain = isinstance(given, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", given)
    return given if isinstance(given, str) and plain else None
