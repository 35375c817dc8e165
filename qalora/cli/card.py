"""What the model card of a release is told: options as a decorator, and what they say as a record's values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["card_options", "card_settings"]

F = TypeVar("F", bound=Callable[..., Any])

KEYS = {
    "base_model": "base_model",
    "license_": "license",
    "license_link": "license_link",
    "quantized_by": "quantized_by",
}
LISTS = {"languages": "language", "datasets": "datasets"}
LIMIT = 1 << 20
"""Bytes of a template."""


def card_options(function: F) -> F:
    """What the card may be told that the model does not say; `card_settings` makes arguments of it."""
    decorators = (
        click.option("--base-model", metavar="HUB_ID", help="Card: the base on the Hub, where the model does not say."),
        click.option("--license", "license_", metavar="NAME", help="Card: the licence, where the model does not say."),
        click.option("--license-link", metavar="URL", help="Card: where a licence is that the Hub has no word for."),
        click.option("--language", "languages", multiple=True, metavar="CODE", help="Card: such as en. Repeatable."),
        click.option("--dataset", "datasets", multiple=True, metavar="HUB_ID", help="Card: trained on. Repeatable."),
        click.option("--quantized-by", metavar="WHO", help="Card: who quantized it."),
        click.option(
            "--card-template",
            type=click.Path(path_type=Path),
            help="Card: Markdown with {{ card_data }}, {{ artifacts }} and so on, see docs/card.md.",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def card_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Take what `card_options` added out of a command's settings: `card` and `template` of ReleaseOptions."""
    from qalora.formats.text import read_utf8

    card: dict[str, Any] = {key: value for name, key in KEYS.items() if (value := settings.pop(name)) is not None}
    card |= {key: list(value) for name, key in LISTS.items() if (value := settings.pop(name))}
    path = settings.pop("card_template")
    return {"card": card, "template": None if path is None else read_utf8(path, LIMIT)}
