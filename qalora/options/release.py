"""What a user may choose of a release, beside what is exported and verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qalora.options.fields import Options, option

__all__ = ["Card", "Package"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card(Options):
    """What the model card is told that the model does not say; its JSON has what was told alone."""

    SPARSE: ClassVar[bool] = True

    base_model: str | None = option(
        None, "Card: Hub id of the base, if the model does not say.", metavar="HUB_ID", expert=True
    )
    license: str | None = option(None, "Card: the licence, if the model does not say.", metavar="NAME", expert=True)
    license_link: str | None = option(
        None, "Card: link to a licence that the Hub has no name for.", metavar="URL", expert=True
    )
    language: tuple[str, ...] = option(
        (), "Card: language code, such as en.", metavar="CODE", example="en", expert=True
    )
    datasets: tuple[str, ...] = option(
        (),
        "Card: dataset that the model was trained on.",
        spelled="dataset",
        metavar="HUB_ID",
        example="owner/name",
        expert=True,
    )
    quantized_by: str | None = option(None, "Card: who quantized it.", metavar="WHO", expert=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package(Card):
    """The folder that is released."""

    out: Path = option(
        help="The folder to write. It appears only if every gate passes.",
        spelled="output",
        place="output",
        metavar="DIR",
        example="dist",
        matters=False,
    )
    with_adapter: bool = option(True, "Include the adapter in the release, the default, or not.")
    sign: Path | None = option(
        None,
        "Sign with this private key (model.sig). QALORA_SIGN_PASSWORD: the password of an encrypted key.",
        place="input",
        metavar="KEY",
    )
    card_template: Path | None = option(
        None,
        "Card: Markdown template with {{ card_data }}, {{ artifacts }} and so on, see docs/card.md.",
        place="input",
        metavar="FILE",
        expert=True,
    )
