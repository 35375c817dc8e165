"""A row of data and what it means: a text, a prompt with its completion, an instruction, or a conversation.

    {"text": ...}                                        all of it is learned
    {"prompt": ..., "completion": ...}                   the completion is learned; both texts, or lists of messages
    {"instruction": ..., "input": ..., "output": ...}    Alpaca's: the output is learned, behind the chat template's
                                                         question, or Alpaca's own prompt where there is no template
    {"messages": [{"role", "content"}]}                  the assistant's turns are learned, through the chat template
    {"conversations": [{"from", "value"}]}               ShareGPT's, the same

A flag (`weight` 0 or 1, `train` or `loss` true or false) of a row, or of one of the assistant's turns, says whether it
is learned. What names text and has no place in its row is refused; what is no text (an id, a source) is noted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qalora.errors import InputError, json_kind, shown
from qalora.formats.json_text import parse_json
from qalora.formats.text import check_text
from qalora.training.documents import Account, Document

__all__ = ["Conversation", "Turn", "kind_of", "plain_document", "read_conversation"]

CHATS = ("messages", "conversations", "conversation")
CHAT_KEYS = ("system", "tools", "documents", "chat_template_kwargs")
PAIR, ALPACA = ("prompt", "completion"), ("instruction", "output")
KNOWN = "the key text, the keys prompt and completion, the keys instruction and output, messages or conversations"

FLAGS = ("weight", "train", "loss")
OTHER_FLAGS = {
    *("calculate_loss", "is_masked", "loss_mask", "loss_weight", "mask", "masked", "sample_weight", "train_detail"),
    *("train_on_input", "train_on_inputs", "train_on_turn", "trainable", "training"),
}
"""What other trainers call flags, and what is not known here."""

MEDIA = {"audio", "audios", "image", "images", "video", "videos"}
TEXTS = {
    *("answer", "chosen", "completion", "context", "conversation", "conversations", "documents", "function_call"),
    *("functions", "history", "input", "instruction", "messages", "output", "prompt", "query", "question", "reasoning"),
    *("reasoning_content", "rejected", "response", "system", "system_prompt", "thinking", "tool_calls", "tools"),
    "chat_template_kwargs",
}
"""Keys that name what a model reads or writes, of rows of one kind or another."""

ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bard", "bing"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
}
"""A turn's speaker as data name it, and the role that chat templates know."""

FLAGGED, EMPTY = "a flag says that it is not to be learned", "nothing but white space would be learned"

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Source: github.com/tatsu-lab/stanford_alpaca, train.py, with the newline of its published column `text`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A message as the chat template gets it, and whether it is learned; place: for sentences."""

    message: Mapping[str, Any]
    learned: bool
    place: str

    @property
    def role(self) -> str:
        """Its role."""
        return str(self.message["role"])

    @property
    def content(self) -> str:
        """Its text."""
        return str(self.message["content"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """turns; settings: what else the chat template gets (tools, documents, and what a row names itself)."""

    where: str
    turns: tuple[Turn, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def kind_of(where: str, row: Any) -> tuple[str, dict[str, Any]]:
    """(the kind of a row, the row without keys that hold nothing); InputError for one that is not understood."""
    if not isinstance(row, Mapping):
        raise InputError(where, expected="a JSON object", got=json_kind(row))
    check_text(row, where)
    filled = {key: value for key, value in row.items() if value is not None}
    chats = [key for key in CHATS if key in filled]
    if len(chats) > 1:
        raise InputError(where, expected="one conversation", got=" and ".join(chats))
    if chats:
        return chats[0], filled
    for keys in (PAIR, ALPACA):
        if all(key in filled for key in keys):
            return " and ".join(keys), filled
    if "text" in filled:
        return "text", filled
    names = [str(key) if key in filled else f"{key} (null)" for key in row]
    raise InputError(where, expected=KNOWN, got=", ".join(names) or "none")


def plain_document(where: str, kind: str, row: Mapping[str, Any], account: Account, *, chat: bool) -> Document | None:
    """The document of a row that no chat template is for; None for a row that `read_conversation` takes.

    chat  whether the tokenizer has a chat template
    """
    if kind == "text":
        text = _string(where, row, "text")
        learned = _row_flag(where, row)
        _check_rest(where, row, {"text"}, text, account)
        return _plain(where, text, 0, learned, account, whole=True)
    if kind == " and ".join(PAIR) and not all(isinstance(row[key], list) for key in PAIR):
        prompt, completion = _string(where, row, "prompt"), _string(where, row, "completion")
        if isinstance(row.get("label"), bool):
            raise InputError(f"{where}: label", expected="none, since a completion is learned", got=f"{row['label']}")
    elif kind == " and ".join(ALPACA) and not chat:
        if row.get("system"):
            raise InputError(
                f"{where}: system",
                expected="a tokenizer with a chat template",
                got="a tokenizer without a chat template",
                todo="leave the key out",
            )
        parts = {key: _string(where, row, key) for key in ("instruction", "input", "output") if key in row}
        prompt = (PROMPT_WITH_INPUT if parts.get("input", "").strip() else PROMPT).format(**parts)
        completion = parts["output"]
        account.note("the tokenizer has no chat template: an instruction stands in Alpaca's own prompt", where)
    else:
        return None
    used = {*PAIR} if "completion" in row and "prompt" in row else {"instruction", "input", "output", "system"}
    learned = _row_flag(where, row)
    _check_rest(where, row, used, prompt + completion, account)
    return _plain(where, prompt + completion, len(prompt), learned, account)


def _plain(where: str, text: str, start: int, learned: bool, account: Account, *, whole: bool = False) -> Document:
    """A document learned from `start` on, or of which nothing is learned."""
    if not learned or not text[start:].strip():
        account.left_out[EMPTY if learned else FLAGGED] += 1
        return Document(text=text, spans=(), where=where)
    return Document(text=text, spans=None if whole else ((start, len(text)),), where=where)


def read_conversation(where: str, kind: str, row: Mapping[str, Any], account: Account) -> Conversation:
    """The conversation that a row is, with nothing learned where a flag of the row says so."""
    learned = _row_flag(where, row)
    system = row.get("system", "")
    if not isinstance(system, str):
        raise InputError(f"{where}: system", expected="a string", got=json_kind(system))
    if kind in CHATS:
        turns, used = _turns(f"{where}: {kind}", row[kind]), {kind}
    elif kind == " and ".join(PAIR):
        prompt = [replace(turn, learned=False) for turn in _turns(f"{where}: prompt", row["prompt"])]
        turns, used = [*prompt, *_turns(f"{where}: completion", row["completion"])], {*PAIR}
    else:
        turns, used = _instructed(where, row), {"instruction", "input", "output"}
    if system:
        if any(turn.role == "system" for turn in turns):
            raise InputError(f"{where}: system", expected="one system message", got="two: this key and a turn")
        message = {"role": "system", "content": system}
        turns = [Turn(message=message, learned=False, place=f"{where}: system"), *turns]
    if not any(turn.role == "assistant" for turn in turns):
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
        raise InputError(where, expected="a turn of the assistant to learn", got=f"turns of {roles} alone")
    _check_rest(where, row, {*used, *CHAT_KEYS}, "\n".join(turn.content for turn in turns), account)
    if not learned:
        turns = [replace(turn, learned=False) for turn in turns]
    if not any(turn.learned for turn in turns):
        account.left_out[FLAGGED] += 1
    elif not any(turn.learned and (turn.content.strip() or turn.message.get("tool_calls")) for turn in turns):
        account.left_out[EMPTY] += 1
        turns = [replace(turn, learned=False) for turn in turns]
    return Conversation(where=where, turns=tuple(turns), settings=_settings(where, row))


def _instructed(where: str, row: Mapping[str, Any]) -> list[Turn]:
    parts = {key: _string(where, row, key) for key in ("instruction", "input", "output") if key in row}
    question = "\n\n".join(part for part in (parts["instruction"], parts.get("input", "")) if part.strip())
    user_turn = Turn(message={"role": "user", "content": question}, learned=False, place=f"{where}: instruction")
    answer = {"role": "assistant", "content": parts["output"]}
    return [user_turn, Turn(message=answer, learned=True, place=f"{where}: output")]


def _turns(where: str, messages: Any) -> list[Turn]:
    form = "a list of {role, content}, or of {from, value}"
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, Mapping) for turn in messages):
        raise InputError(where, expected=form, got=shown(messages))
    turns = []
    for n, message in enumerate(messages):
        place, turn = f"{where}[{n}]", {key: value for key, value in message.items() if value is not None}
        if "role" not in turn and {"from", "value"} <= set(turn):
            turn = {"role": turn.pop("from"), "content": turn.pop("value"), **turn}
        if "role" not in turn or not {"content", "tool_calls", "function_call"} & set(turn):
            raise InputError(where, expected=form, got=shown(messages))
        turns.append(_turn(place, turn))
    return turns


def _turn(place: str, turn: dict[str, Any]) -> Turn:
    speaker = turn.pop("role")
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise InputError(f"{place}: role", expected=f"one of {', '.join(ROLES)}", got=shown(speaker))
    flag = _flag(place, turn)
    if flag and role != "assistant":
        raise InputError(
            f"{place}: {_flag_key(turn)}", expected="the assistant's turns alone to be learned", got=speaker
        )
    message = {key: value for key, value in turn.items() if key not in FLAGS and key != "content" and value != []}
    if "tool_calls" in message:
        message["tool_calls"] = _calls(f"{place}: tool_calls", message["tool_calls"])
    content = _content(
        f"{place}: content", turn.get("content"), calls=bool({"tool_calls", "function_call"} & set(message))
    )
    learned = role == "assistant" if flag is None else flag
    return Turn(message={"role": role, "content": content, **message}, learned=learned, place=place)


def _content(place: str, content: Any, *, calls: bool) -> str:
    """A turn's text; a turn that calls tools need not have one, and a list may hold one text."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = [str(part.get("type")) for part in content]
        if kinds == ["text"] and isinstance(content[0].get("text"), str):
            return str(content[0]["text"])
        raise InputError(place, expected="a string, or a list of one text", got=f"a list of {', '.join(kinds)}"[:80])
    if content is None and calls:
        return ""
    if not isinstance(content, str):
        raise InputError(place, expected="a string", got="none" if content is None else json_kind(content))
    return content


def _calls(place: str, calls: Any) -> list[Any]:
    """Calls of tools with arguments as objects: OpenAI writes them as JSON in a string, which templates would quote."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InputError(place, expected="a list of objects", got=shown(calls))

    def opened(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = call.get("arguments")
        if not isinstance(arguments, str):
            return dict(call)
        value = parse_json(arguments, f"{place}: arguments", expected="a JSON object")
        if not isinstance(value, dict):
            raise InputError(f"{place}: arguments", expected="a JSON object", got=json_kind(value))
        return {**call, "arguments": value}

    parsed_calls = []
    for call in calls:
        parsed = opened({key: value for key, value in call.items() if value is not None})
        if isinstance(parsed.get("function"), Mapping):
            parsed["function"] = opened(parsed["function"])
        parsed_calls.append(parsed)
    return parsed_calls


def _settings(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets beside messages."""
    settings: dict[str, Any] = {}
    for key in ("tools", "documents"):
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            value = parse_json(value, f"{where}: {key}", expected="a list of objects")
        if not value or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            raise InputError(f"{where}: {key}", expected="a list of objects", got=shown(value))
        settings[key] = value
    own = row.get("chat_template_kwargs", {})
    if not isinstance(own, Mapping):
        raise InputError(f"{where}: chat_template_kwargs", expected="an object", got=json_kind(own))
    return {**own, **settings}


def _row_flag(where: str, row: Mapping[str, Any]) -> bool:
    return _flag(where, row) is not False


def _flag(where: str, mapping: Mapping[str, Any]) -> bool | None:
    """What the flags say, None without one; InputError for other values than 0, 1, true and false, and for others."""
    for key in mapping:
        if str(key).lower() in OTHER_FLAGS:
            raise InputError(f"{where}: {key}", expected=f"{', '.join(FLAGS)}", got="a flag that is not known here")
    flags = {}
    for key in FLAGS:
        if key in mapping:
            if not isinstance(mapping[key], bool | int | float) or mapping[key] not in (0, 1):
                raise InputError(f"{where}: {key}", expected="0, 1, true or false", got=shown(mapping[key]))
            flags[key] = bool(mapping[key])
    if len(set(flags.values())) > 1:
        values = ", ".join(f"{key} {str(value).lower()}" for key, value in flags.items())
        raise InputError(f"{where}: {' and '.join(flags)}", expected="flags that agree", got=values)
    return next(iter(flags.values()), None)


def _flag_key(mapping: Mapping[str, Any]) -> str:
    return next(key for key in FLAGS if key in mapping)


def _check_rest(where: str, row: Mapping[str, Any], used: set[str], text: str, account: Account) -> None:
    """InputError for keys that name text which the row's kind has no place for; a note for others.

    text  the text of the row that is used: what stands in it is not lost
    """
    squeezed = None
    for key, value in row.items():
        if key in used or key in FLAGS or value in ("", [], {}):
            continue
        if key in TEXTS | MEDIA and key != "text":
            squeezed = squeeze(text) if squeezed is None else squeezed
            if key in MEDIA or not isinstance(value, str) or squeeze(value) not in squeezed:
                kind = " and ".join(name for name in row if name in used - set(CHAT_KEYS))
                raise InputError(
                    f"{where}: {key}",
                    expected=f"nothing but what a row of {kind} may have",
                    got=f"{key}, which would be lost",
                    todo="put it where it is learned, or leave the key out",
                )
        account.unused.setdefault(str(key), where)


def squeeze(text: str) -> str:
    """A text without white space."""
    return re.sub(r"\s+", "", text)


def _string(where: str, row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise InputError(f"{where}: {key}", expected="a string", got=json_kind(row[key]))
    return str(row[key])
