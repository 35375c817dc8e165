"""The records of manifest.json, schema "qalora.release/1": what a release was made of, how, and what came out, so that
it can be checked and made again. Later versions of the schema add keys and rename none.

Digests are those of `qalora.releasing.digests`. Nothing in it depends on the machine; the time is there on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from qalora.converters.device_load import DeviceLoad
from qalora.converters.plan import PlannedTensor
from qalora.formats.record_json import Finite, Key, like
from qalora.options.export import Writing
from qalora.options.release import Card
from qalora.options.words import Convention, Level, Minima
from qalora.parity.gates import Status

__all__ = [
    "AdapterEntry",
    "ArtifactEntry",
    "BaseEntry",
    "Digest",
    "FileEntry",
    "FloatDigest",
    "GateEntry",
    "LayerDigest",
    "Manifest",
    "OptionsEntry",
    "QuantizedDigest",
    "ReleaseChoices",
    "TensorDigest",
    "TensorEntry",
]

Digest = Annotated[str, like("sha256:[0-9a-f]{64}", "sha256: and 64 hexadecimal digits")]
Size = Annotated[int, Key("bytes")]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedDigest:
    """A quantized tensor of the base. g_idx: None where the columns are in order."""

    SPARSE: ClassVar[bool] = True

    bits: int
    group_size: int
    shape: tuple[int, ...]
    codes: Digest
    scale: Digest
    min: Digest
    g_idx: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatDigest:
    """A float tensor of the base."""

    dtype: str
    shape: tuple[int, ...]
    values: Digest


TensorDigest = QuantizedDigest | FloatDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseEntry:
    """The base.

    source   its Hub id, and license, where they are known
    layout   the format it was read from
    digest   of all tensors; config: of the JSON of its config; files: of its companion files
    """

    name: str
    source: str | None
    license: str | None
    layout: str
    parameters: int
    digest: Digest
    config: Digest
    files: Mapping[str, Digest]
    tensors: Mapping[str, TensorDigest]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Bits and group size of its quantized tensors, each pair once, in order."""
        return sorted({(row.bits, row.group_size) for row in self.tensors.values() if isinstance(row, QuantizedDigest)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDigest:
    """One layer of the adapter; `a` and `b` are the digests of A and B."""

    rank: int
    pool_size: int
    factor: Finite
    a: Digest
    b: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """The adapter. saved: the tensors and rows that it brings whole, and the files of its tokenizer."""

    digest: Digest
    convention: Convention
    minima: Minima | None
    layers: Mapping[str, LayerDigest]
    saved: Mapping[str, Digest]


@dataclass(frozen=True, kw_only=True)
class ReleaseChoices:
    """What a user chose for a release, but for how weights are written, and for texts.

    targets      formats, in the order in which they are written
    convention, minima   how the adapter is read and folded; None: what the adapter says
    level, max_tokens, prompts, generate, threads, dynamic_int8   see `qalora.parity.verify`
    with_adapter whether a copy of the adapter lies beside the artefacts
    """

    targets: tuple[str, ...]
    convention: Convention | None = None
    minima: Minima | None = None
    level: Level = "generation"
    max_tokens: int = 256
    prompts: tuple[str, ...] = ()
    generate: int = 24
    threads: int | None = None
    dynamic_int8: bool = False
    with_adapter: bool = True
    card: Card = field(default_factory=Card)


@dataclass(frozen=True, kw_only=True)
class OptionsEntry(ReleaseChoices, Writing):
    """Everything that a user chose for the release; text and template are their digests."""

    WHOLE: ClassVar[bool] = True

    lora_slots: frozenset[str]
    text: Digest | None
    template: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of an artefact."""

    nbytes: Size
    sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry(PlannedTensor):
    """What was planned for one tensor, and the digest of its bytes in its file."""

    WHOLE: ClassVar[bool] = True

    nbytes: Size
    sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactEntry:
    """What came out for one target.

    nbytes   of all its files, which are named as in the release; a tensor's `file` is named as in the folder
    bits_per_weight  of all its files, whatever a device loads of them
    longest  tokens up to which its runtime computes what the model does; None: as far as the model reaches
    device_load   what a device loads; None in a release of an earlier version
    """

    SPARSE: ClassVar[bool] = True

    target: str
    folder: str
    nbytes: Size
    bits_per_weight: Finite
    longest: int | None
    notes: tuple[str, ...]
    files: Mapping[str, FileEntry]
    tensors: tuple[TensorEntry, ...]
    device_load: DeviceLoad | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GateEntry:
    """Where a gate was applied, its name and its status; figures and derivations are in report.json."""

    at: str
    gate: str
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of it.

    name      the model's, as --name gives it, or the base's
    created   None, or the time that SOURCE_DATE_EPOCH gives
    versions  of qalora, of Python, of the libraries that write the files, of the runtimes that proved them
    passed    whether the report passed
    licences  the files of the base that say what may be done with it
    """

    schema: Literal["qalora.release/1"] = "qalora.release/1"
    name: str
    created: str | None
    versions: Mapping[str, str]
    base: BaseEntry
    adapter: AdapterEntry | None
    options: OptionsEntry
    artifacts: tuple[ArtifactEntry, ...]
    gates: tuple[GateEntry, ...]
    passed: bool
    licences: tuple[str, ...]

    @property
    def license(self) -> str | None:
        """What the card was told, or the base says."""
        return self.options.card.license or self.base.license
