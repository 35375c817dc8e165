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
        None, "Card: the base on the Hub, where the model does not say.", metavar="HUB_ID", expert=True
    )
    license: str | None = option(None, "Card: the licence, where the model does not say.", metavar="NAME", expert=True)
    license_link: str | None = option(
        None, "Card: where a licence is that the Hub has no word for.", metavar="URL", expert=True
    )
    language: tuple[str, ...] = option((), "Card: such as en.", metavar="CODE", example="en", expert=True)
    datasets: tuple[str, ...] = option(
        (), "Card: trained on.", spelled="dataset", metavar="HUB_ID", example="owner/name", expert=True
    )
    quantized_by: str | None = option(None, "Card: who quantized it.", metavar="WHO", expert=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package(Card):
    """The folder that is released."""

    out: Path = option(
        help="The folder to write; it appears only when every gate has passed.",
        spelled="output",
        place="output",
        metavar="DIR",
        example="dist",
        matters=False,
    )
    with_adapter: bool = option(True, "Whether the adapter lies beside it all.")
    sign: Path | None = option(
        None,
        "Write model.sig with this private key; the password of an encrypted one is in QALORA_SIGN_PASSWORD.",
        place="input",
        metavar="KEY",
    )
    card_template: Path | None = option(
        None,
        "Card: Markdown with {{ card_data }}, {{ artifacts }} and so on, see docs/card.md.",
        place="input",
        metavar="FILE",
        expert=True,
    )
