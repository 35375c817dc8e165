"""Renders a chat template in a process of its own: `python -P rendering.py`, JSON in and out; imports jinja2 alone.

A chat template is a program out of an untrusted file. jinja2's sandbox keeps it from everything but its arguments; the
process keeps it from taking more than SECONDS of a core and MEMORY bytes, as far as the system can limit that.

In:  {"template": text, "tokens": {"bos_token": text, "eos_token": text},
      "chats": [{"messages": [{"role", "content"}], "add_generation_prompt": bool, ...}]}
Out: a list with a text for each chat, or null where the template raised or gave more than LONGEST characters.

The environment is that of transformers (utils/chat_template_utils.py), without the clock: a template that asks whether
there is one, as Llama 3's do, finds none and writes its own date. The text depends on nothing but the template.
"""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["render"]

SECONDS = 4
MEMORY = 1 << 30
LONGEST = 1 << 16


def render(job: dict[str, Any]) -> list[str | None]:
    """What the template makes of each chat."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, with which a template marks what a model is trained on; here its content alone counts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(job["template"])
    except Exception:  # whatever jinja2 makes of it
        return [None] * len(job["chats"])
    texts: list[str | None] = []
    for chat in job["chats"]:
        try:
            text = template.render(**job["tokens"], **chat)
        except Exception:  # a template may raise anything, and refuses a chat by raising
            texts.append(None)
        else:
            texts.append(text if len(text) <= LONGEST else None)
    return texts


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for which, amount in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY)):
        try:
            resource.setrlimit(which, (amount, amount))
        except (OSError, ValueError):  # a system that cannot, or a lower limit already
            continue


if __name__ == "__main__":
    _limit()
    json.dump(render(json.loads(sys.stdin.buffer.read())), sys.stdout)
