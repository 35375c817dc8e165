"""Read an AWQ folder: 4 bits, and the other widths of those who say who they are; a layer at a time, lazily.

Tools put the columns of other widths than 4 bits into different orders (`qalora.formats.awq`), so that these are read
where the config names GPTQModel, or auto-round.

Not read: the layouts "gemv", "gemv_fast" and "llm-awq", rules for single layers (`dynamic`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora.adapter.peft_config import PATTERNS
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.auto_round.plain import check_plain
from qalora.converters.awq.words import PARTS, lazy_words
from qalora.converters.packed import Names, Stored, check_known, read_packed
from qalora.converters.patterns import check_steps, compiled
from qalora.errors import FormatError, json_kind, shown
from qalora.tensor import BITS

__all__ = ["read"]

OF_READING = frozenset(
    {
        "bits",
        "checkpoint_format",
        "dynamic",
        "format",
        "group_size",
        "meta",
        "method",
        "modules_to_not_convert",
        "pack_dtype",
        "quant_method",
        "sym",
        "version",
        "w_bit",
        "q_group_size",
        "zero_point",
    }
)

OF_MAKING = frozenset(
    {
        "act_group_aware",
        "backend",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "desc_act",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "lm_head",
        "max_input_length",
        "mod_to_quantize",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "modules_to_fuse",
        "pad_token_id",
        "static_groups",
        "to_quant_block_names",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
    }
)
"""Keys of AutoAWQ, GPTQModel and transformers that say how codes were found, or how a model is run."""

BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What quantization_config says. group_size -1: whole rows; interleaved: the order of columns (`formats.awq`); out:
    what names a module that is left in floats, and the texts of which one is the end of its name.
    """

    where: str
    bits: int
    group_size: int
    interleaved: bool
    out: tuple[re.Pattern[str], ...]
    ends: tuple[str, ...]

    def check(self, module: str, names: Collection[str]) -> None:
        """FormatError for a module with words that is to be left in floats; as transformers matches its names."""
        if any(pattern.match(name) for pattern in self.out for name in names) or any(
            name.endswith(self.ends) for name in names
        ):
            raise FormatError(
                f"{self.where}: modules_to_not_convert leaves out {module}",
                expected="floats there",
                got="a tensor named qweight",
            )


def read(folder: Path) -> Checkpoint:
    """Open an AWQ folder; reads config and headers. FormatError for what is no such folder, or is not understood."""

    def layers(said: object, names: Names, stored: Stored) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
        settings = _settings(said, f"{folder}: quantization_config")
        check_steps(settings.out, names, f"{settings.where}: modules_to_not_convert")
        weights = {}
        for module, called in names.items():
            settings.check(module, called)
            weights[module] = lazy_words(
                folder, module, stored, settings.bits, settings.group_size, interleaved=settings.interleaved
            )
        return weights, ()

    return read_packed(folder, "awq", PARTS, layers)


def _settings(content: object, where: str) -> _Settings:
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    plain = check_plain(content, where)
    check_known(content, OF_READING | OF_MAKING | plain, where)
    for key in ("version", "format", "checkpoint_format"):
        value = content.get(key)
        if value is not None and str(value).lower() != "gemm":
            raise FormatError(f"{where}: {key}", expected="gemm", got=shown(value), todo="start from the float model")
    if content.get("dynamic"):
        raise FormatError(f"{where}: dynamic: rules for single layers, which are not read in AWQ folders")
    if content.get("pack_dtype") not in (None, "int32"):
        raise FormatError(f"{where}: pack_dtype", expected="int32", got=shown(content["pack_dtype"]))
    bits = content.get("bits", content.get("w_bit"))
    size = content.get("group_size", content.get("q_group_size", 128))
    if type(bits) is not int or bits not in BITS:
        raise FormatError(f"{where}: bits", expected=f"one of {', '.join(map(str, BITS))}", got=shown(bits))
    if type(size) is not int or (size != -1 and size < 1):
        raise FormatError(f"{where}: group_size", expected="-1 or a whole number from 1", got=shown(size))
    out, ends = _left_out(content.get("modules_to_not_convert") or [], f"{where}: modules_to_not_convert")
    return _Settings(
        where=where, bits=bits, group_size=size, interleaved=_interleaved(content, bits, where), out=out, ends=ends
    )


def _interleaved(content: Mapping[str, Any], bits: int, where: str) -> bool:
    """Whether columns are in the order of 4 bits; FormatError for a width whose order nothing tells."""
    meta = content.get("meta")
    maker = str(meta.get("quantizer")).lower() if isinstance(meta, dict) else ""
    if bits == 4 or (bits in (5, 6) and content.get("provider") == "auto-round"):
        return True
    if "gptqmodel" not in maker:
        raise FormatError(
            f"{where}: bits",
            expected="4, or a meta.quantizer that names GPTQModel, since tools order the columns of other widths "
            "differently",
            got=str(bits),
        )
    return False


def _left_out(content: object, where: str) -> tuple[tuple[re.Pattern[str], ...], tuple[str, ...]]:
    """Expressions that match a path from its beginning to a dot or its end, and ends of paths."""
    if not isinstance(content, list) or not all(isinstance(text, str) and text for text in content):
        raise FormatError(where, expected="a list of names of modules", got=shown(content))
    if len(content) > PATTERNS:
        raise FormatError(where, expected=f"at most {PATTERNS} names", got=str(len(content)))
    for text in content:
        compiled(text, f"{where}: {shown(text)}")
    return tuple(re.compile(f"(?:{text}){BOUNDARY}") for text in content), tuple(content)
