"""auto-round's quantization_config: how words are packed, and what single layers have otherwise.

    "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128, "sym": true,
    "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}, ".*v_proj.*": {"bits": 16}}

A key of extra_config that is a layer's name counts for it alone, and before the others, which are expressions that
match anywhere in a name; of these the first that matches counts. 16 bits leave a layer as floats. Source: auto-round
0.16.1, inference/convert_model.py and inference/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qalora.converters.auto_round.plain import check_plain
from qalora.converters.packed import check_known
from qalora.converters.patterns import check_steps, compiled
from qalora.errors import FormatError, json_kind, shown
from qalora.formats.gptq import Version
from qalora.tensor import BITS

__all__ = ["DEFAULT", "GPTQ_WORDS", "Settings", "parse_settings"]

DEFAULT = "auto_round:gptq"
"""What transformers takes where packing_format is left out."""

GPTQ_WORDS: dict[str, Version] = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto": "gptq",
}
"""Packings in GPTQ's words, and how their zero points are stored: as they are, or minus one."""

AWQ_WORDS = ("auto_round:auto_awq", "auto_round:awq")
AWQ_BITS = (4, 5, 6)

EXPRESSIONS = 1000
"""Of extra_config, at most; names of layers are not counted."""

OF_READING = frozenset(
    {
        "backend",
        "bits",
        "block_name_to_quantize",
        "desc_act",
        "extra_config",
        "group_size",
        "modules_in_block_to_quantize",
        "modules_to_not_convert",
        "packing_format",
        "quant_block_list",
        "quant_method",
        "static_groups",
        "sym",
        "to_quant_block_names",
    }
)

OF_LAYER = frozenset({"bits", "group_size", "sym"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What quantization_config says. packing: as it names it; labelled: whether it does; layers: by name, and patterns:
    in their order, what layers have otherwise."""

    where: str
    packing: str
    labelled: bool
    bits: int
    group_size: int
    layers: Mapping[str, Mapping[str, Any]]
    patterns: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...]

    def check(self, modules: Collection[str]) -> None:
        """FormatError for expressions that could take long with these modules."""
        check_steps([pattern for pattern, _ in self.patterns], modules, f"{self.where}: extra_config")

    def sizes_of(self, module: str, names: Collection[str]) -> tuple[int, int]:
        """Width and group size, -1 for rows, of a module that has words; FormatError where it is to have floats."""
        own = next((self.layers[name] for name in names if name in self.layers), None)
        if own is None:
            matching = (more for pattern, more in self.patterns if any(map(pattern.search, names)))
            own = next(matching, {})
        bits, size = own.get("bits", self.bits), own.get("group_size", self.group_size)
        if bits > 8:
            raise FormatError(
                f"{self.where}: extra_config leaves out {module}", expected="floats there", got="a tensor named qweight"
            )
        if self.packing in AWQ_WORDS and bits not in AWQ_BITS:
            expected = f"one of {', '.join(map(str, AWQ_BITS))} in AWQ's words"
            raise FormatError(f"{self.where}: bits", expected=expected, got=str(bits))
        return bits, size


def parse_settings(content: object, where: str, layers: Collection[str]) -> Settings:
    """What quantization_config says, of a model that has these layers, in words or in floats.

    Raises FormatError, which begins with `where`, for what is not understood here.
    """
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    plain = check_plain(content, where)
    check_known(content, OF_READING | plain, where)
    packing = content.get("packing_format", DEFAULT)
    if packing not in (*GPTQ_WORDS, *AWQ_WORDS):
        raise FormatError(
            f"{where}: packing_format",
            expected=f"one of {', '.join((*GPTQ_WORDS, *AWQ_WORDS))}",
            got=shown(packing),
            todo="start from the float model",
        )
    if content.get("desc_act") and not content.get("static_groups"):
        raise FormatError(f"{where}: desc_act", expected="false, as auto-round itself reads", got="true")
    bits, size = _sizes(content, where)
    if bits is None:
        raise FormatError(f"{where}: bits", expected=_widths(), got="none")
    extra = content.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise FormatError(f"{where}: extra_config", expected="an object", got=json_kind(extra))
    for text, more in extra.items():
        _check_layer(more, f"{where}: extra_config: {text[:80]}")
    texts = [text for text in extra if text not in layers and extra[text]]
    if len(texts) > EXPRESSIONS:
        raise FormatError(f"{where}: extra_config", expected=f"at most {EXPRESSIONS} expressions", got=str(len(texts)))
    patterns = tuple((compiled(text, f"{where}: extra_config: {text[:80]!r}"), extra[text]) for text in texts)
    return Settings(
        where=where,
        packing=packing,
        labelled="packing_format" in content,
        bits=bits,
        group_size=128 if size is None else size,
        layers={text: extra[text] for text in extra if text in layers},
        patterns=patterns,
    )


def _check_layer(content: object, where: str) -> None:
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    bits = content.get("bits")
    if type(bits) is int and bits > 8:
        return  # floats, whatever else it says
    check_known(content, OF_LAYER | check_plain(content, where), where)
    _sizes(content, where)


def _sizes(content: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """bits and group_size, None where they are left out."""
    bits, size = content.get("bits"), content.get("group_size")
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise FormatError(f"{where}: bits", expected=_widths(), got=shown(bits))
    if size is not None and (type(size) is not int or (size != -1 and size < 1)):
        raise FormatError(f"{where}: group_size", expected="-1 or a whole number from 1", got=shown(size))
    return bits, size


def _widths() -> str:
    return f"one of {', '.join(map(str, BITS))}"
