"""Damage to the bytes of a file: blind, or by the structure that its name says it has.

    blind       bits flipped, bytes cut, doubled, or overwritten with extreme numbers
    JSON        a value replaced by another, a key dropped or renamed; the same for the header of safetensors
    GGUF        a value of the metadata replaced by another of its type, or dropped
    ONNX        a field of the protobuf changed, an entry of a list dropped or doubled
    OpenVINO    a value of the XML replaced by another
    text        a line dropped, doubled or moved, a word replaced

What is no longer of its structure is damaged blindly.
"""

from __future__ import annotations

import json
import random
import re
import struct
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any

from qalora.formats.gguf import Metadata, plan_layout, read_header

SMALL = (0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 1 << 16)
EXTREMES = (*SMALL, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
VALUES = (None, True, 0, -1, 3, 1e308, 1 << 62, "", "gptq", "x" * 1000, [], [1, 2], {}, {"a": 1}, [[[]]], "../../x")
LINES = (".toml", ".jsonl", ".txt", ".jinja", "SHA256SUMS")
"""What the names of files of lines end with."""

WORDS = ("", "0", "-1", "1e400", "nan", "9" * 40, "true", "[]", "{}", '"', "''", "..", "/", "\\", "\x00", "\ud7ff", "é")


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    """The bytes of a file of this name with one damage."""
    suffix = PurePosixPath(name).suffix
    try:
        if suffix == ".json" and rng.random() < 0.7:
            return json.dumps(_json(json.loads(data), rng)).encode()
        if suffix == ".safetensors" and rng.random() < 0.5:
            return _safetensors(data, rng)
        if suffix == ".gguf" and rng.random() < 0.5:
            return _gguf(data, rng)
        if suffix == ".onnx" and rng.random() < 0.7:
            return _onnx(data, rng)
        if suffix == ".xml" and rng.random() < 0.7:
            return _xml(data, rng)
        if name.endswith(LINES) and rng.random() < 0.7:
            return _lines(data, suffix, rng)
    except (ValueError, RecursionError, struct.error):
        pass
    return _blind(data, rng)


def _blind(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        # headers stand at the beginning: that is where most of the damage goes
        at = rng.randrange(min(len(out), rng.choice((16, 256, 4096, 1 << 30)))) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice((1, 8, 64))]
        elif kind == 4:
            out[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
    return bytes(out)


def _xml(data: bytes, rng: random.Random) -> bytes:
    """One value is that of another place, a number, or nothing."""
    places = [match.span(1) for match in re.finditer(rb'="([^"]*)"', data)]
    if not places:
        raise ValueError("no values")
    (start, stop), (first, last) = rng.choice(places), rng.choice(places)
    value = rng.choice((data[first:last], str(rng.choice(EXTREMES)).encode(), b"", b"?,-1", b"f32", b"u2"))
    return data[:start] + value + data[stop:]


def _json(value: object, rng: random.Random) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        rest = {k: v for k, v in value.items() if k != key}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, key + "x": value[key]}
        return {**value, key: _json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _json(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _gguf(data: bytes, rng: random.Random) -> bytes:
    with NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        header = read_header(Path(file.name))
    if not header.metadata.entries or not header.tensors:
        raise ValueError("nothing to change")
    entries = dict(header.metadata.entries)
    key = rng.choice(list(entries))
    if rng.randrange(8) == 0:
        del entries[key]
    else:
        entries[key] = replace(entries[key], value=_metadata(entries[key].value, rng))
    tensors = list(header.tensors.values())
    layout = plan_layout(Metadata(entries=entries), [(one.name, one.shape, one.type) for one in tensors])
    return layout.prefix + data[min(one.offset for one in tensors) :]


def _metadata(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, tuple):
        return _scalar(value, rng)
    at, kind = rng.randrange(len(value)), rng.randrange(3)
    if kind == 0:
        return value[:at] + value[at + 1 :]
    return (*value[:at], _scalar(value[at], rng), *value[at + (kind == 1) :])


def _onnx(data: bytes, rng: random.Random) -> bytes:
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    _message(model, rng)
    return bytes(model.SerializeToString())


def _message(message: Any, rng: random.Random) -> None:
    """Change a field of a message of protobuf, or of one inside it."""
    fields = [field for field, _ in message.ListFields()]
    if not fields:
        return
    field = rng.choice([*fields, *(field for field in fields if field.message_type is not None)])
    held = getattr(message, field.name)
    inside = field.message_type is not None
    if not isinstance(held, bytes | str | int | float) and hasattr(held, "__len__"):
        at, kind = rng.randrange(len(held)), rng.randrange(12)
        if kind == 0:
            del held[at]
        elif kind == 1:
            held.extend([held[at]])
        elif inside:
            _message(held[at], rng)
        else:
            held[at] = _scalar(held[at], rng)
    elif inside:
        _message(held, rng)
    elif rng.randrange(8) == 0:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(held, rng))


def _scalar(value: Any, rng: random.Random) -> Any:
    """Another value of the same type, as protobuf's fields take it."""
    if isinstance(value, bytes):
        return _blind(value, rng)
    if isinstance(value, str):
        try:
            return json.dumps(_json(json.loads(value), rng)) if rng.random() < 0.7 else rng.choice(WORDS)
        except ValueError:
            return rng.choice((*WORDS, value + "x", value[1:]))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e38, float("inf"), float("nan"), 1e-45))
    return rng.choice([*(number for number in EXTREMES if number < 1 << 63), -1, value + 1, value ^ 1])


def _lines(data: bytes, suffix: str, rng: random.Random) -> bytes:
    lines = data.decode().splitlines(keepends=True) or [""]
    at, kind = rng.randrange(len(lines)), rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif suffix == ".jsonl" and kind < 5:
        lines[at] = json.dumps(_json(json.loads(lines[at]), rng)) + "\n"
    else:
        words = lines[at].split(" ")
        words[rng.randrange(len(words))] = rng.choice((*WORDS, *words, json.dumps(rng.choice(VALUES))))
        lines[at] = " ".join(words)
    return "".join(lines).encode("utf-8", "surrogatepass")
