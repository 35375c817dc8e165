"""A conversation through the tokenizer's chat template, and where the assistant's own tokens stand in what comes out.

An answer is learned from where the template's question for it ends (the conversation before it, asked for an answer) as
far as what ends its turn: what a model has to write itself, and nothing else. Each is found by rendering the
conversation as far as it, and has to stand in the whole conversation in the same way. Where it does not, since the
template writes a last turn otherwise than an earlier one (thoughts, a system message before the last question), each
answer makes a document of its own, the conversation as far as it, which is what a model is asked with.

Nothing is lost on the way: a turn of which the template writes nothing, an answer of which it leaves out a part, and
tools or calls that change nothing are refused; other keys that change nothing are noted.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qalora.converters.chat_template import render_chat
from qalora.errors import FormatError, InputError
from qalora.formats.text import check_text
from qalora.training.documents import Account, Document
from qalora.training.rows import Conversation, Turn, squeeze

__all__ = ["ChatTemplate"]

STRICT = ("tool_calls", "function_call")
"""Keys of a message that a template has to write."""

PROBE = "zq7zq"
"""A text in the place of another, to see whether it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """prompt: what stands before it; text: what is learned; alone: the conversation as far as it.

    bare  the text from the content on, where what is before it is the template's own
    """

    prompt: str
    text: str
    bare: str
    alone: str


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = str(tokenizer.eos_token or "")
        marks = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks |= {self._end} - {""}
        pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or "(?!)"
        self._marks = re.compile(pattern)
        self._next_mark = re.compile(rf"\s*(?:{pattern})")
        self._last_mark = re.compile(rf"(?:{pattern})\s*\Z")
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._seen: set[tuple[str, ...]] = set()
        self._always: bool | None = None

    def check(self, where: str) -> None:
        """InputError for a tokenizer without a chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise InputError(
                f"{where}: messages",
                expected="a tokenizer with a chat template",
                got="a tokenizer without a chat template",
                todo="use text, or prompt and completion",
            )

    def documents(self, chat: Conversation, account: Account) -> list[Document]:
        """The conversation as one document, or as one for each answer; InputError for what would be lost or wrong."""
        reserved = sorted(self._reserved & (set(chat.settings) - {"tools", "documents"}))
        if reserved:
            raise InputError(f"{chat.where}: chat_template_kwargs", expected="a template's own names", got=reserved[0])
        turns = chat.turns
        whole = self._render(chat, turns)
        self._check_turns(chat, whole)
        self._check_settings(chat, whole, account)
        self._check_keys(chat, whole, account)
        answers = [self._answer(chat, n, whole) for n, turn in enumerate(turns) if turn.learned]
        fitting = [_fitting(answer, whole) for answer in answers]
        if None not in fitting:
            spans = [
                (len(one.prompt), len(one.prompt) + len(text or "")) for one, text in zip(answers, fitting, strict=True)
            ]
            return [self._document(chat, whole, spans, last=turns[-1].learned)]
        account.note(
            "the chat template writes an answer otherwise when others follow: each answer is a document of its own",
            chat.where,
        )
        return [
            self._document(chat, one.alone, [(len(one.prompt), len(one.prompt) + len(one.text))], last=True)
            for one in answers
        ]

    def _render(
        self,
        chat: Conversation,
        turns: Sequence[Turn],
        *,
        ask: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        template_settings = dict(chat.settings if settings is None else settings)
        try:
            messages = [turn.message for turn in turns]
            text = render_chat(self._tokenizer, messages, add_generation_prompt=ask, **template_settings)
        except FormatError as error:
            raise FormatError(f"{chat.where}: {error}") from error
        except Exception as error:  # a template is a program; it raises what it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{chat.where}: messages", expected="what the chat template takes", got=reason) from error
        check_text(text, f"{chat.where}: the chat template's text")
        return text

    def _changes(self, chat: Conversation, text: str, turns: Sequence[Turn], **settings: Any) -> bool:
        """Whether other turns or settings give another text, or none."""
        try:
            return self._render(chat, turns, **settings) != text
        except InputError:
            return True

    def _check_turns(self, chat: Conversation, whole: str) -> None:
        """InputError for a turn of which nothing is written. By its words; once for each order of roles, by trial."""
        turns, squeezed = chat.turns, squeeze(whole)
        pattern = (*(turn.role for turn in turns), *map(str, chat.settings))
        known = pattern in self._seen
        for n, turn in enumerate(turns):
            words = squeeze(turn.content)
            if turn.learned or not words or (known and words in squeezed):
                continue
            other = replace(turn, message={**turn.message, "content": PROBE})
            if not self._changes(chat, whole, [*turns[:n], other, *turns[n + 1 :]]):
                raise InputError(
                    turn.place,
                    expected=f"a chat template that writes a turn of the role {turn.role}",
                    got="one that leaves it out",
                    todo="put its text into another turn",
                )
        self._seen.add(pattern)

    def _check_settings(self, chat: Conversation, whole: str, account: Account) -> None:
        for key in chat.settings:
            left = {name: value for name, value in chat.settings.items() if name != key}
            if self._changes(chat, whole, chat.turns, settings=left):
                continue
            if key in ("tools", "documents"):
                raise InputError(
                    f"{chat.where}: {key}",
                    expected=f"a chat template that writes {key}",
                    got="a chat template that ignores it",
                    todo="leave the key out, or take a tokenizer whose template does",
                )
            account.note(f"the chat template makes nothing of the key {key} of chat_template_kwargs", chat.where)

    def _check_keys(self, chat: Conversation, whole: str, account: Account) -> None:
        """What becomes of the keys of messages, where each is the last that is written, or in the whole."""
        for n, turn in enumerate(chat.turns):
            for key in [key for key in turn.message if key not in ("role", "content")]:
                bare = replace(turn, message={name: value for name, value in turn.message.items() if name != key})
                last, text = len(chat.turns), whole
                if turn.learned:
                    last, text = n + 1, self._render(chat, chat.turns[: n + 1])
                if self._changes(chat, text, [*chat.turns[:n], bare, *chat.turns[n + 1 : last]]):
                    continue
                if key in STRICT:
                    raise InputError(
                        f"{turn.place}: {key}",
                        expected=f"a chat template that writes {key}",
                        got="a chat template that ignores it",
                        todo="leave the key out, or take a tokenizer whose template does",
                    )
                account.note(f"the chat template makes nothing of the key {key} of a message", turn.place)

    def _answer(self, chat: Conversation, n: int, whole: str) -> _Answer:
        """Where a turn that is learned stands, and as far as what."""
        turn = chat.turns[n]
        try:
            prompt = self._render(chat, chat.turns[:n], ask=True)
        except InputError as error:
            if n:
                raise
            raise InputError(
                turn.place,
                expected="a question before the first answer, as the chat template wants it",
                got="none",
                todo='add one, or set "train": false for the answer',
            ) from error
        alone = whole if n + 1 == len(chat.turns) else self._render(chat, chat.turns[: n + 1])
        if not alone.startswith(prompt):
            raise InputError(
                turn.place,
                expected="a chat template whose generation prompt stands before its answers too",
                got=f"one that ends it with {_ending(prompt, alone)!r} and writes the answer without that",
                todo="use prompt and completion",
            )
        stop = self._stop(chat, n, alone, len(prompt))
        if stop is None:
            raise InputError(
                turn.place,
                expected="a chat template that writes a whole answer",
                got="one that leaves out a part of it, or changes it",
                todo="use prompt and completion",
            )
        text = self._own(chat, turn, alone[len(prompt) :], stop)
        begin = stop - len(turn.content.strip())
        own = set(turn.message) == {"role", "content"} and text.startswith(turn.content.strip(), begin)
        return _Answer(prompt=prompt, text=text, bare=text[begin:] if own else "", alone=alone)

    def _stop(self, chat: Conversation, n: int, alone: str, start: int) -> int | None:
        """Where the content of turn n ends in the text from `start` of the conversation as far as it; None where not
        all of the content stands there. Found by a probe behind the content, of which all else is independent.
        """
        turn = chat.turns[n]
        content = turn.content.rstrip()
        if not content and any(key in turn.message for key in STRICT):
            return 0
        message = {**turn.message, "content": content + PROBE + turn.content[len(content) :]}
        try:
            probed = self._render(chat, [*chat.turns[:n], replace(turn, message=message)])
        except InputError:
            return None
        at = probed.rfind(PROBE)
        if at < start or (content and probed[:at] + probed[at + len(PROBE) :] != alone):
            return None
        return at - start if squeeze(alone[start:at]).endswith(squeeze(content)) else None

    def _own(self, chat: Conversation, turn: Turn, answer: str, stop: int) -> str:
        """As much of what follows a prompt as the model has to write: the content, and what ends the turn."""
        calls = any(key in turn.message for key in STRICT)
        mark = self._next_mark.match(answer, stop)
        if mark is not None and not calls:
            return answer[: mark.end()]
        if self._asks_always(chat):
            raise InputError(
                turn.place,
                expected="a chat template that ends turns with a special token, or has add_generation_prompt",
                got="one that always adds it",
                todo="use prompt and completion",
            )
        return answer.rstrip() if self._last_mark.search(answer) else answer  # else white space may be what ends it

    def _asks_always(self, chat: Conversation) -> bool:
        """Whether the template asks for an answer behind every conversation."""
        if self._always is None:
            probe = replace(chat, turns=(Turn(message={"role": "user", "content": PROBE}, learned=False, place=""),))
            try:
                text = self._render(probe, probe.turns, ask=True, settings={})
                self._always = not self._changes(probe, text, probe.turns, settings={})
            except InputError:
                self._always = False
        return self._always

    def _document(self, chat: Conversation, text: str, spans: Sequence[tuple[int, int]], *, last: bool) -> Document:
        """The document of a text; what stands behind a last answer and is no mark is the next question's, and goes."""
        if last and self._marks.sub("", text[spans[-1][1] :]).strip():
            text = text[: spans[-1][1]]
        ends = last and self._last_mark.search(text) is None
        return Document(text=text, spans=tuple(spans), closing=ends, where=chat.where)


def _fitting(answer: _Answer, whole: str) -> str | None:
    """What of an answer stands behind its prompt in the whole conversation; None where it stands there otherwise.

    A template may put words of its own before the content of a last answer alone, as Qwen3's does its empty thoughts.
    """
    return next((text for text in (answer.text, answer.bare) if text and whole.startswith(answer.prompt + text)), None)


def _ending(prompt: str, other: str) -> str:
    """What of a prompt another text does not have."""
    same = next(
        (n for n, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other))
    )
    return prompt[same:][:40]
