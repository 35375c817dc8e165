"""What a chat template writes around messages, found by rendering it: never by its name, nor by its text.

Probe messages are rendered in a process of its own (`qalora.converters.gguf.rendering`), and what stands before and
after their contents is read off the result. Three shapes are known: a system message of its own, as ChatML, Llama 3 and
Phi-3 have it; one that is put before the first user message, as in Gemma and Llama 2; or before the last one, as in
Mistral's. Longer conversations, with other contents, are rendered then both by the template and by `Turns.render`; only
a template that agrees with its turns in every one of them is recognised.

What this does not see: a template that trims contents (the probes have nothing to trim), and what it does with tools,
images or reasoning, or when it is asked for anything by name. A template that writes today's date is taken with the
one that it writes where there is no clock.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qalora.converters.gguf import rendering

__all__ = ["Turns", "turns_of"]

Message = Mapping[str, str]

LARGEST = 1 << 16
"""Characters of a template; longer ones are not tried."""

_SYSTEM, _USER, _ANSWER, _NEXT = "Be terse, probe one.", "Why is 2 > 1?", "It is so: probe three.", "And 4, probe four?"
_ODD = 'A "quoted" \\ line, <b>&amp;</b> {{ 1 }}\nand a second one: \u00e9\u4e2d.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A prompt is: prefix, `without` where there is no system message, the messages, generation.

    prefix      text before everything: a BOS token that nobody else adds
    without     what stands in the place of a system message that is not there; "" is nothing
    default     the system message that is used where none is given; then `without` is made of it, and ""  here
    system      (before, after) a system message; None where the template refuses one, or leaves it out
    place       where it stands: "own", or inside the "first" or "last" user message, right before the content
    user, assistant  (before, after) the content
    generation  what stands before the answer
    """

    prefix: str
    without: str
    default: str
    system: tuple[str, str] | None
    place: Literal["own", "first", "last"]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    @property
    def end(self) -> str:
        """What ends an answer, without white space around it."""
        return self.assistant[1].strip()

    def texts(self) -> Iterator[str]:
        """Every text that a template of the same meaning has to hold."""
        yield from (self.prefix, self.without, self.default, *self.user, *self.assistant, self.generation)
        yield from self.system or ()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of messages of roles system (the first alone), user and assistant."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else self.default
        system = system if self.system is not None else ""
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        before, after = self.system or ("", "")
        parts = [self.prefix]
        if not system:
            parts.append(self.without)
        elif self.place == "own":
            parts.append(f"{before}{system}{after}")
        users = [n for n, message in enumerate(turns) if message["role"] == "user"]
        index = {"own": None, "first": users[0], "last": users[-1]}[self.place] if system else None
        for n, message in enumerate(turns):
            start, end = self.user if message["role"] == "user" else self.assistant
            inside = f"{before}{system}{after}" if n == index else ""
            parts.append(f"{start}{inside}{message['content']}{end}")
        return "".join([*parts, self.generation])


@lru_cache(maxsize=8)
def turns_of(template: str, *, bos: str, eos: str, adds_bos: bool) -> Turns | None:
    """The turns of a template, None where it has others than are known here; rendered once, since a release asks twice.

    bos, eos are the texts of these tokens. adds_bos: the tokenizer puts BOS before every prompt, so that the template's
    own is taken away.
    """
    if len(template) > LARGEST:
        return None
    for end in dict.fromkeys((eos, "")):  # templates that write EOS where no answer is asked for
        rendered = _rendered(template, _probes(), bos, eos, end)
        if rendered[0] is None:
            return None
        for cut in (True,) if adds_bos else (False, True):  # a BOS that opens every message belongs to the messages
            prefix = bos if cut and not adds_bos else ""
            for turns in _read([_without(text, bos) if cut else text for text in rendered], prefix, bos):
                if _agree(template, turns, bos=bos, eos=eos, adds_bos=adds_bos):
                    return turns
    return None


def _chat(roles: str, *contents: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=True)]


def _probes() -> list[dict[str, Any]]:
    """In the order in which `_read` takes them."""
    return [
        {"messages": _chat("u", _USER), "add_generation_prompt": True},
        {"messages": _chat("uau", _USER, _ANSWER, _NEXT), "add_generation_prompt": True},
        {"messages": _chat("su", _SYSTEM, _USER), "add_generation_prompt": True},
        {"messages": _chat("u", _USER), "add_generation_prompt": False},
        {"messages": _chat("ua", _USER, _ANSWER), "add_generation_prompt": False},
    ]


def _rendered(
    template: str, chats: Sequence[Mapping[str, Any]], bos: str, eos: str, unasked: str | None = None
) -> list[str | None]:
    """What the template makes of the chats, all None where it takes too long; `unasked` is EOS where no answer is."""
    inputs = [{**chat, "bos_token": bos, "eos_token": eos} for chat in chats]
    for chat in inputs:
        if not chat["add_generation_prompt"] and unasked is not None:
            chat["eos_token"] = unasked
    job = json.dumps({"template": template, "tokens": {}, "chats": inputs})
    command = [sys.executable, "-P", str(Path(rendering.__file__))]
    try:
        done = subprocess.run(command, input=job.encode(), capture_output=True, timeout=15 * rendering.SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        return [None] * len(chats)
    if done.returncode:
        return [None] * len(chats)
    texts: list[str | None] = json.loads(done.stdout)
    return texts


def _read(rendered: Sequence[str | None], prefix: str, bos: str) -> Iterator[Turns]:
    """Turns that explain the probes behind `prefix`; the first that explains other chats too is right."""
    one, three, system, one_unasked, two_unasked = rendered
    cut_one, cut_three = _cut(one, _USER), _cut(three, _USER, _ANSWER, _NEXT)
    if cut_one is None or cut_three is None or cut_three[0] != cut_one[0]:
        return
    head, tail = cut_one
    _, middle, back, last = cut_three
    if last != tail:
        return
    user_end = _end_of_turn(_cut(one_unasked, _USER), (middle, tail))
    answer_end = _end_of_turn(_cut(two_unasked, _USER, _ANSWER), (back,))
    start = back.removeprefix(answer_end)
    if bos and start.startswith(bos) and not head.endswith(start):  # Llama 2 opens every exchange with a BOS
        start, answer_end = start.removeprefix(bos), answer_end + bos
    if not start or not head.endswith(start):
        return
    known: dict[str, Any] = {
        "prefix": prefix,
        "user": (start, user_end),
        "assistant": (middle.removeprefix(user_end), answer_end),
        "generation": tail.removeprefix(user_end),
    }
    without = head.removesuffix(start)
    if system is None or _SYSTEM not in system:
        fixed = {**known, "prefix": known["prefix"] + without}
        yield Turns(**fixed, without="", default="", system=None, place="own")
    else:
        yield from _with_system(known, without, _cut(system, _SYSTEM, _USER), start)


def _with_system(known: Mapping[str, Any], without: str, cut: Sequence[str] | None, start: str) -> Iterator[Turns]:
    if cut is None:
        return
    before, after, _ = cut
    if after.endswith(start):
        end = after.removesuffix(start)
        default = without.removeprefix(before).removesuffix(end)
        if default and without == before + default + end:
            yield Turns(**known, without="", default=default, system=(before, end), place="own")
        yield Turns(**known, without=without, default="", system=(before, end), place="own")
    if before.startswith(start) and not without:
        inside = (before.removeprefix(start), after)
        yield Turns(**known, without="", default="", system=inside, place="first")
        yield Turns(**known, without="", default="", system=inside, place="last")


def _without(text: str | None, bos: str) -> str | None:
    return None if text is None else text.removeprefix(bos)


def _cut(text: str | None, *contents: str) -> list[str] | None:
    """What stands before, between and after the contents, each of which has to be there once, in this order."""
    if text is None or any(text.count(content) != 1 for content in contents):
        return None
    parts = []
    for content in contents:
        before, mark, text = text.partition(content)
        if not mark:
            return None
        parts.append(before)
    return [*parts, text]


def _end_of_turn(cut: Sequence[str] | None, followed: Sequence[str]) -> str:
    """What ends a message, from a conversation that stops there; or all that follows in others."""
    end = cut[-1] if cut is not None else None
    if end is not None and all(text.startswith(end) for text in followed):
        return end
    common = followed[0]
    return common if all(text.startswith(common) for text in followed) else ""


def _agree(template: str, turns: Turns, *, bos: str, eos: str, adds_bos: bool) -> bool:
    """Whether the turns give what the template does, in longer conversations and with odd contents."""
    long = ("u", "uau", "uauau", "su", "suau", "suauau")
    contents = (_NEXT, _ODD, _SYSTEM, _USER, _ANSWER, _NEXT)
    chats = [_chat(roles, *contents[: len(roles)]) for roles in long]
    inputs = [{"messages": chat, "add_generation_prompt": True} for chat in chats]
    texts = _rendered(template, inputs, bos, eos)
    expected = [turns.render(chat) for chat in chats]
    if adds_bos:
        texts = [_without(text, bos) for text in texts]
    refused = turns.system is None and texts[3:] == [None] * 3
    return texts[:3] == expected[:3] and (refused or texts[3:] == expected[3:])
