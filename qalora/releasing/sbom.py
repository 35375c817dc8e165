"""sbom.cdx.json: what a release is made of, as a CycloneDX 1.6 ML-BOM; a pure function of the manifest.

Specification: https://cyclonedx.org/docs/1.6/json/. The model is the BOM's subject, a machine-learning-model with a
modelCard; its parts are the base, the adapter, every file of every artefact with its SHA-256, and the libraries that
wrote or proved them. The dependencies say what was made of what. The serial number is made of the manifest's content,
and there is a time only where the manifest has one.

The digests of base and adapter are over their tensors (`qalora.releasing.digests`), not over a file: they are
properties of their components, not hashes. Written here without a library, so that the bytes are the same wherever a
release is made; `validate_sbom` holds them against the official schema where cyclonedx-python-lib is installed.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from qalora.errors import FormatError, MissingLibraryError
from qalora.formats.output import json_bytes
from qalora.formats.record_json import encode
from qalora.releasing.records import Manifest

__all__ = ["SBOM", "sbom_bytes", "validate_sbom"]

SBOM = "sbom.cdx.json"
SPACE = uuid.UUID("9b0d1b9a-6f4f-5d0e-8a41-52b5a4f2f7a3")
"""The name space of serial numbers."""

MODEL, BASE, ADAPTER = "model", "base", "adapter"
"""Components by their bom-ref; a file's is "file:" and its path, a library's its purl."""

_SPDX_WORDS = """
    AFL-3.0 Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC-BY-4.0 CC-BY-NC-4.0 CC-BY-NC-SA-4.0
    CC-BY-SA-4.0 CC0-1.0 EPL-2.0 EUPL-1.2 ISC MIT MPL-2.0 MS-PL NCSA OFL-1.1 PostgreSQL Unlicense WTFPL Zlib
"""
SPDX = {word.lower(): word for word in _SPDX_WORDS.split()}
"""Licences that SPDX knows by the same word as models do; others are named, not identified."""


def sbom_bytes(manifest: Manifest) -> bytes:
    """The BOM of a manifest: JSON with sorted keys."""
    content = hashlib.sha256(json_bytes(encode(manifest))).hexdigest()
    files = list(_files(manifest))
    libraries = list(_libraries(manifest))
    parts = [_base(manifest), *_adapter(manifest), *files, *libraries]
    metadata: dict[str, Any] = {
        "component": _model(manifest),
        "tools": {"components": [_library("qalora", manifest.versions.get("qalora", ""), kind="application")]},
    }
    if manifest.created is not None:
        metadata["timestamp"] = manifest.created
    return json_bytes(
        {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{uuid.uuid5(SPACE, content)}",
            "version": 1,
            "metadata": metadata,
            "components": parts,
            "dependencies": _dependencies(manifest, [part["bom-ref"] for part in libraries]),
        }
    )


def validate_sbom(content: bytes, name: str = SBOM) -> None:
    """FormatError where the bytes are no CycloneDX 1.6 by its strict schema; MissingLibraryError without it."""
    if find_spec("cyclonedx") is None:
        raise MissingLibraryError("cyclonedx-python-lib", "checking a bill of materials against its schema", "sbom")
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode("utf-8"))
    except MissingOptionalDependencyException as missing:
        raise MissingLibraryError(
            "cyclonedx-python-lib[json-validation]", "checking a bill of materials against its schema", "sbom"
        ) from missing
    except (UnicodeDecodeError, ValueError, RecursionError) as broken:
        raise FormatError(name, expected="JSON", got="text that is no JSON") from broken
    if error is not None:
        reason = (str(error.data.message if hasattr(error.data, "message") else error.data).splitlines() or [""])[0]
        raise FormatError(name, expected="a bill of materials by the schema of CycloneDX 1.6", got=reason[:200])


def _model(manifest: Manifest) -> dict[str, Any]:
    adapted, card = manifest.adapter is not None, manifest.options.card
    weights = ", ".join(f"{bits}-bit codes in groups of {size}" for bits, size in manifest.base.grids) or "floats"
    datasets = [{"type": "dataset", "name": name} for name in card.datasets]
    return {
        "bom-ref": MODEL,
        "type": "machine-learning-model",
        "name": manifest.name,
        "description": f"a decoder in {weights}" + (", a QA-LoRA adapter folded into its minima" if adapted else ""),
        **_licences(manifest),
        "modelCard": {
            "bom-ref": "model-card",
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "inputs": [{"format": "token ids"}],
                "outputs": [{"format": "logits"}],
                **({"datasets": datasets} if datasets else {}),
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(manifest))},
            "properties": _properties(manifest),
        },
    }


def _metrics(manifest: Manifest) -> Iterator[dict[str, str]]:
    """Sizes, and the gates with their verdict; the figures behind them are in report.json."""
    for artifact in manifest.artifacts:
        yield {"type": "bits per weight", "value": str(artifact.bits_per_weight), "slice": artifact.folder}
        if artifact.device_load is not None:
            for name, share in (
                ("linear layers", artifact.device_load.linear),
                ("embedding", artifact.device_load.embedding),
            ):
                value = str(round(share.bits, 3))
                yield {"type": f"bits per weight, {name}", "value": value, "slice": artifact.folder}
    for gate in manifest.gates:
        yield {"type": f"gate: {gate.gate}", "value": gate.status, "slice": gate.at}


def _properties(manifest: Manifest) -> list[dict[str, str]]:
    properties = {
        "parameters": str(manifest.base.parameters),
        "passed": str(manifest.passed).lower(),
        "losses accepted": ", ".join(sorted(manifest.options.allow_loss)) or "none",
    }
    return [_property(key, value) for key, value in sorted(properties.items())]


def _property(key: str, value: str) -> dict[str, str]:
    return {"name": f"qalora:{key}", "value": value}


def _base(manifest: Manifest) -> dict[str, Any]:
    base = manifest.base
    source = manifest.options.card.base_model or base.source
    files = [_property(f"file {name}", digest) for name, digest in sorted(base.files.items())]
    component = {
        "bom-ref": BASE,
        "type": "machine-learning-model",
        "name": base.name,
        **_licences(manifest),
        "properties": [_property("digest", base.digest), _property("config", base.config), *files],
    }
    if source is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII):
        component["externalReferences"] = [{"type": "distribution", "url": f"https://huggingface.co/{source}"}]
    return component


def _adapter(manifest: Manifest) -> Iterator[dict[str, Any]]:
    adapter = manifest.adapter
    if adapter is not None:
        yield {
            "bom-ref": ADAPTER,
            "type": "data",
            "name": "QA-LoRA adapter",
            "data": [{"type": "other", "name": "QA-LoRA adapter"}],
            "properties": [
                _property("convention", adapter.convention),
                _property("digest", adapter.digest),
                _property("layers", str(len(adapter.layers))),
            ],
        }


def _files(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for artifact in manifest.artifacts:
        for name, file in sorted(artifact.files.items()):
            yield {
                "bom-ref": f"file:{name}",
                "type": "file",
                "name": name,
                "hashes": [{"alg": "SHA-256", "content": file.sha256.removeprefix("sha256:")}],
                "properties": [_property("bytes", str(file.nbytes)), _property("format", artifact.target)],
            }


def _libraries(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Python, and packages of PyPI: of a runtime that is several, as {"a + b": "1 + 2"} or {"a": "1, b 2"}, each."""
    versions: dict[str, str] = {}
    for name, version in sorted(manifest.versions.items()):
        for one, number in zip(name.split(" + "), version.split(" + "), strict=False):
            first, *others = number.split(", ")
            parts = [first if " " in first else f"{one} {first}", *others]  # "0.32.2, mlx 0.32.4", "xllamacpp 2026.10"
            versions |= {text.partition(" ")[0]: text.partition(" ")[2] for text in parts if " " in text}
    for name, version in sorted(versions.items()):
        if name == "python":
            yield {"bom-ref": f"python@{version}", "type": "platform", "name": "Python", "version": version}
        elif name != "qalora":
            yield _library(name, version)


def _library(name: str, version: str, kind: str = "library") -> dict[str, Any]:
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    purl = f"pkg:pypi/{plain}@{quote(version, safe='')}"
    return {"bom-ref": purl, "type": kind, "name": name, "version": version, "purl": purl}


def _licences(manifest: Manifest) -> dict[str, Any]:
    name = manifest.license
    if name is None:
        return {}
    known = SPDX.get(name.lower())
    entry: dict[str, Any] = {"id": known} if known else {"name": name}
    return {"licenses": [{"license": entry}]}


def _dependencies(manifest: Manifest, libraries: list[str]) -> list[dict[str, Any]]:
    """Every artefact's files are made of base and adapter, and of them the model consists; libraries made them."""
    sources = [BASE, *([ADAPTER] if manifest.adapter is not None else [])]
    files = [f"file:{name}" for artifact in manifest.artifacts for name in artifact.files]
    dependencies = {MODEL: [*sources, *files, *libraries], **dict.fromkeys(files, sources)}
    dependencies |= {name: [] for name in [*sources, *libraries]}
    return [{"ref": ref, "dependsOn": sorted(dependencies[ref])} for ref in sorted(dependencies)]
