"""manifest.json: what a release was made of, how, and what came out, so that it can be checked and made again.

    schema      "qalora.release/1"; later versions of it add keys and rename none
    name        the model's, as --name gives it, or the base's
    created     null, or the time that SOURCE_DATE_EPOCH gives
    versions    of qalora, of Python, of the libraries that write the files, of the runtimes that proved them
    base        name; source (its Hub id, or null); license (null where the base does not say); layout; parameters;
                digest, of all tensors; config, the digest of its JSON; files, companion files; tensors
    adapter     null, or digest, convention, minima, layers
    options     see `qalora.releasing.options`
    artifacts   for each target: folder, bytes, bits_per_weight, notes, files with bytes and sha256, and tensors: what
                was planned for each, and the digest of its bytes
    gates       where each gate was applied, its name, and its status: figures and derivations are in report.json
    passed      whether the report passed
    licences    the files of the base that say what may be done with it

Digests are those of `qalora.releasing.digests`. Nothing in it depends on the machine; the time is there on request.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora._version import __version__
from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import packages
from qalora.converters.plan import PROVENANCE, Plan
from qalora.errors import FormatError, InputError
from qalora.formats.files import files_below
from qalora.formats.json_text import read_json
from qalora.formats.output import json_bytes
from qalora.releasing.digests import (
    adapter_digests,
    combined_digest,
    content_digest,
    file_digest,
    model_digests,
    range_digest,
    saved_digests,
)
from qalora.releasing.manifest_form import MANIFEST_FORM
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.shape import check_shape

if TYPE_CHECKING:
    from qalora.parity import ParityReport

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "adapter_part",
    "artifact_part",
    "base_part",
    "created",
    "make_manifest",
    "provenance",
    "read_manifest",
]

MANIFEST = "manifest.json"
SCHEMA = "qalora.release/1"
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""The libraries that have a part in what is written, whatever the format."""

LIMIT = 256 << 20
"""Bytes of a manifest that are read at most."""


def base_part(model: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the base. Reads all of it, a tile at a time."""
    tensors = model_digests(model)
    return {
        "name": _name(model),
        "source": _source(model),
        "license": _license(model),
        "layout": model.layout,
        "parameters": sum(math.prod(lazy.shape) for lazy in model.tensors.values()),
        "digest": combined_digest(tensors),
        "config": content_digest(json_bytes(_portable(model.config))),
        "files": {name: file_digest(path) for name, path in sorted(model.files.items())},
        "tensors": tensors,
    }


def adapter_part(adapter: Adapter | None) -> dict[str, Any] | None:
    """What the manifest says of the adapter."""
    if adapter is None:
        return None
    layers, saved = adapter_digests(adapter), saved_digests(adapter)
    record = {"convention": adapter.convention, "minima": adapter.minima}
    parts = {**layers, "adapter": record, **({"saved": saved} if saved else {})}
    return {"digest": combined_digest(parts), **record, "layers": layers, "saved": saved}


def provenance(base: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> dict[str, str]:
    """The metadata that every artefact carries."""
    told = {"version": __version__, "base": base["digest"]}
    if adapter is not None:
        told["adapter"] = adapter["digest"]
    return {f"{PROVENANCE}{key}": value for key, value in told.items()}


def artifact_part(plan: Plan, folder: Path, parameters: int) -> dict[str, Any]:
    """What the manifest says of one target's folder, `folder/<target>`, which has been written."""
    root = folder / plan.target
    files = files_below(root)
    nbytes = sum((root / name).stat().st_size for name in files)
    planned = plan.to_json()
    tensors = [
        {**row, "sha256": range_digest(root / row["file"], row["offset"], row["bytes"])} for row in planned["tensors"]
    ]
    return {
        "target": plan.target,
        "folder": plan.target,
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / parameters, 3),
        "longest": planned["longest"],
        "notes": planned["notes"],
        "files": {f"{plan.target}/{name}": _file_part(root / name) for name in files},
        "tensors": tensors,
    }


def _file_part(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def make_manifest(
    *,
    base: Mapping[str, Any],
    adapter: Mapping[str, Any] | None,
    options: ReleaseOptions,
    artifacts: Sequence[Mapping[str, Any]],
    report: ParityReport,
    licences: Sequence[str],
) -> dict[str, Any]:
    """Put the parts together."""
    told = [run.runtime for _, run in report.runs() if run.runtime is not None]
    runtimes = {runtime.name: _unlabelled(runtime.version) for runtime in told}
    return {
        "schema": SCHEMA,
        "name": options.export.name or base["name"],
        "created": created(),
        "versions": {**_versions(), **runtimes},
        "base": dict(base),
        "adapter": adapter,
        "options": options.to_json(),
        "artifacts": list(artifacts),
        "gates": [{"at": where, "gate": result.gate, "status": result.status} for where, result in report.results()],
        "passed": report.passed(),
        "licences": sorted(licences),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a release, its form checked. FormatError names the key that is wrong."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: {MANIFEST}", expected="the manifest of a release", got="no such file")
    content = read_json(path, LIMIT)
    if isinstance(content, dict) and content.get("schema") != SCHEMA:
        raise FormatError(
            f"{path}: schema", expected=SCHEMA, got=f"{content.get('schema')!r:.60}", todo="update qalora"
        )
    check_shape(content, MANIFEST_FORM, str(path))
    found: dict[str, Any] = content
    return found


def created() -> str | None:
    """The time that SOURCE_DATE_EPOCH gives (https://reproducible-builds.org/specs/source-date-epoch), or None."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return None
    if not given.isdigit() or int(given) > 253402300799:  # the last second of the year 9999
        raise InputError("SOURCE_DATE_EPOCH", expected="seconds since 1970", got=f"{given!r:.40}")
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
