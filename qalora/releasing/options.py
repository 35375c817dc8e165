"""What a release depends on, beside the model, the adapter and the versions of libraries.

Every file that the user's options name has been read. The JSON is the "options" of a manifest: a release can be made
again from it. A text is there as its digest only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qalora.adapter.records import Convention
from qalora.converters.exports import writing
from qalora.converters.plan import ExportOptions
from qalora.errors import about
from qalora.formats.record_json import encode
from qalora.formats.text import read_utf8
from qalora.options import fields_of
from qalora.options.export import Export, Writing
from qalora.options.release import Card, Package
from qalora.options.verify import Verify
from qalora.parity.text import verify_arguments
from qalora.releasing.digests import content_digest
from qalora.releasing.records import OptionsEntry, ReleaseChoices

__all__ = ["ReleaseOptions"]

TEMPLATE_BYTES = 1 << 20
CHECK_KEYS = ("level", "max_tokens", "generate", "threads", "dynamic_int8")
OF_THE_MACHINE = ("memory", "device")
"""What `qalora.parity.verify` is told and no manifest holds."""

OWN = tuple(one.name for one in fields(ReleaseChoices))


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions(ReleaseChoices):
    """export    what the writers are told; provenance and adapter are added by the release
    text      what is computed on; None: the one that comes with qalora
    template  the card's template, likewise
    """

    export: ExportOptions = field(default_factory=ExportOptions)
    text: str | None = None
    template: str | None = None

    @classmethod
    def of(cls, export: Export, verify: Verify, package: Package, convention: Convention | None) -> ReleaseOptions:
        """What a user chose, with its files read."""
        checked = verify_arguments(verify)
        for name in OF_THE_MACHINE:
            checked.pop(name)
        return cls(
            targets=export.targets,
            export=writing(export),
            convention=convention,
            minima=export.minima,
            with_adapter=package.with_adapter,
            card=Card(**{one.name: getattr(package, one.name) for one in fields_of(Card)}),
            template=_template(package),
            prompts=tuple(checked.pop("prompts")),
            **checked,
        )

    def verification(self) -> dict[str, Any]:
        """Arguments for `qalora.parity.verify`."""
        return {
            "minima": self.minima,
            "text": self.text,
            "prompts": list(self.prompts),
            **{key: getattr(self, key) for key in CHECK_KEYS},
        }

    def entry(self) -> OptionsEntry:
        """Everything, as a manifest holds it."""
        text, template = (None if one is None else content_digest(one.encode()) for one in (self.text, self.template))
        settings = {one.name: getattr(self.export, one.name) for one in fields_of(Writing)}
        own = {name: getattr(self, name) for name in OWN}
        return OptionsEntry(lora_slots=self.export.lora_slots, text=text, template=template, **settings, **own)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON."""
        content: dict[str, Any] = encode(self.entry())
        return content

    @classmethod
    def of_entry(cls, entry: OptionsEntry, *, text: str | None = None, template: str | None = None) -> ReleaseOptions:
        """The options of a manifest; text and template are given, as only their digests are in it."""
        settings = {one.name: getattr(entry, one.name) for one in fields_of(Writing)}
        export = ExportOptions(lora_slots=entry.lora_slots, **settings)
        return cls(export=export, text=text, template=template, **{name: getattr(entry, name) for name in OWN})

    def with_provenance(self, provenance: Mapping[str, str]) -> ExportOptions:
        """What the writers are told, and where their files come from."""
        return replace(self.export, provenance=provenance)


def _template(package: Package) -> str | None:
    if package.card_template is None:
        return None
    with about("card_template"):
        return read_utf8(package.card_template, TEMPLATE_BYTES)
