"""compressed-tensors' quantization_config: which modules are quantized, and how.

    "config_groups": {"group_0": {"targets": ["Linear", "re:.*down_proj", "model.layers.0.mlp.up_proj"],
                                  "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
                                              "group_size": 128, ...}, ...}, ...},
    "ignore": ["lm_head", "re:.*gate"]

A target is the path of a module, an expression that matches a path from its beginning, or a class. Of several targets
that match a module a path counts before expressions, those before classes, and in the order of their letters; of two
groups with one target the later one counts. What `ignore` matches, likewise, is left as floats. Source:
compressed-tensors 0.20.1, utils/match.py and quantization/lifecycle/apply.py.

A group is taken as far as it says how words are to be read. What it says of how codes were found changes nothing here;
anything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qalora.adapter.peft_config import PATTERNS
from qalora.converters.huggingface import EMBEDDING
from qalora.converters.packed import check_known, not_read
from qalora.converters.patterns import check_steps, compiled
from qalora.errors import FormatError, json_kind, shown
from qalora.tensor import BITS

__all__ = ["Scheme", "Settings", "parse_settings"]

FORMAT = "pack-quantized"
MIXED = "mixed-precision"
"""What `format` says where each group says its own."""

OF_LOADING = frozenset(
    {
        "dequantize",
        "global_compression_ratio",
        "quant_method",
        "quantization_status",
        "run_compressed",
        "use_optimized_inference",
        "version",
    }
)
"""Keys of quantization_config that change no weight."""

OF_MAKING = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
"""Keys of `weights` that say how codes were found, or what the tensors say themselves."""

ORDERS = {None: False, False: False, "weight": False, "static": False, "group": True, "dynamic": True}
"""Values of `actorder`, and whether groups mix columns then: weight_g_idx tells. Versions of today write no such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the weights of a group's modules are quantized. group_size None: a row; ordered: weight_g_idx is there."""

    name: str
    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The groups' targets, in the order in which they count, and what is left out; expressions by their text, "re:" and
    all. where: it was read.
    """

    where: str
    targets: Mapping[str, Scheme]
    ignore: tuple[str, ...]
    patterns: Mapping[str, re.Pattern[str]]

    def check(self, modules: Collection[str]) -> None:
        """FormatError for expressions that could take long with these modules."""
        check_steps(self.patterns.values(), modules, self.where)

    def scheme_of(self, module: str, names: Collection[str]) -> Scheme:
        """How a module is quantized, that has words and is called `names` by files and transformers; FormatError where
        no target matches it, or where it is to be left out.
        """
        out = next((text for text in self.ignore if self._matches(text, module, names)), None)
        if out is not None:
            raise FormatError(
                f"{self.where}: {shown(out)} in ignore leaves out {module}",
                expected="floats there",
                got="a tensor named weight_packed",
            )
        named = (text for text in self.targets if self._named(text, names))
        found = next(named, None) or next((text for text in self.targets if text == _class_of(module)), None)
        if found is None:
            raise FormatError(f"{self.where}: config_groups", expected=f"a target that is {module}", got="none")
        return self.targets[found]

    def _named(self, text: str, names: Collection[str]) -> bool:
        pattern = self.patterns.get(text)
        return text in names if pattern is None else any(pattern.match(name) is not None for name in names)

    def _matches(self, text: str, module: str, names: Collection[str]) -> bool:
        return text == _class_of(module) or self._named(text, names)


def _class_of(module: str) -> str:
    return "Embedding" if module == EMBEDDING.removesuffix(".weight") else "Linear"


def parse_settings(content: object, where: str) -> Settings:
    """What quantization_config says; FormatError, which begins with `where`, for what is not understood here."""
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    _check_absent(content, where)
    groups = content.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError(f"{where}: config_groups", expected="an object of groups", got=shown(groups))
    targets: dict[str, Scheme] = {}
    for name, group in groups.items():
        scheme, own = _group(name[:80], group, f"{where}: {name[:80]}", content.get("format"))
        targets |= dict.fromkeys(own, scheme)
    ignore = _texts(content.get("ignore") or [], f"{where}: ignore")
    texts = [text for text in (*targets, *ignore) if text.startswith("re:")]
    if len(texts) > PATTERNS:
        raise FormatError(where, expected=f"at most {PATTERNS} expressions", got=str(len(texts)))
    patterns = {text: compiled(text.removeprefix("re:"), f"{where}: {shown(text)}") for text in texts}
    order = sorted(targets, key=lambda text: ("re:" in text, text))
    return Settings(where=where, targets={text: targets[text] for text in order}, ignore=ignore, patterns=patterns)


def _check_absent(content: Mapping[str, Any], where: str) -> None:
    """FormatError for what is done beside the quantization of weights, and for what is not known."""
    for key, what in (
        ("kv_cache_scheme", "a quantized cache of keys and values"),
        ("transform_config", "weights that were transformed"),
        ("moe_sparsity_config", "sparse experts"),
        ("sparsity_config", "sparse weights"),
    ):
        value = content.get(key)
        plain = value is None or value == {} or (key == "transform_config" and value == {"config_groups": {}})
        dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if not plain and not dense:
            raise not_read(f"{where}: {key}: {what}")
    known = {"config_groups", "format", "ignore", "kv_cache_scheme", "transform_config", "sparsity_config"}
    check_known(content, known | OF_LOADING | {"moe_sparsity_config"}, where)
    if content.get("format") not in (FORMAT, MIXED):
        raise _not_packed(f"{where}: format", content.get("format"))


def _not_packed(where: str, got: object) -> FormatError:
    return FormatError(
        where, expected=f"{FORMAT}, integers in words", got=shown(got), todo="start from the float model"
    )


def _group(name: str, content: object, where: str, form: object) -> tuple[Scheme, tuple[str, ...]]:
    """A group's scheme, and its targets."""
    if isinstance(content, list):
        raise FormatError(f"{where}: a scheme by its name, which is not read here", todo="write the scheme itself")
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    for key in ("input_activations", "output_activations"):
        if content.get(key) is not None:
            raise not_read(f"{where}: {key}: quantized activations")
    own = content.get("format")
    if own not in (None, FORMAT) or (own is None and form == MIXED):
        raise _not_packed(f"{where}: format", own)
    known = {"targets", "weights", "input_activations", "output_activations", "format"}
    check_known(content, known, where)
    return _scheme(name, content.get("weights"), f"{where}: weights"), _texts(content.get("targets"), where)


def _scheme(name: str, content: object, where: str) -> Scheme:
    if not isinstance(content, dict):
        raise FormatError(where, expected="an object", got=json_kind(content))
    bits, strategy, size = content.get("num_bits", 8), content.get("strategy"), content.get("group_size")
    kind = content.get("type", "int")
    if kind != "int":
        raise FormatError(f"{where}: type", expected="int", got=shown(kind), todo="start from the float model")
    if type(bits) is not int or bits not in BITS:
        raise FormatError(f"{where}: num_bits", expected=f"one of {', '.join(map(str, BITS))}", got=shown(bits))
    if strategy is None and type(size) is int:
        strategy = "group" if size > 0 else "channel"
    if strategy not in ("group", "channel"):
        raise FormatError(f"{where}: strategy", expected="group or channel", got=shown(strategy))
    if strategy == "group" and (type(size) is not int or size < 1):
        raise FormatError(f"{where}: group_size", expected="a whole number from 1", got=shown(size))
    symmetric, order = content.get("symmetric", True), content.get("actorder")
    if type(symmetric) is not bool:
        raise FormatError(f"{where}: symmetric", expected="true or false", got=shown(symmetric))
    if not isinstance(order, str | None | bool) or order not in ORDERS:
        raise FormatError(f"{where}: actorder", expected="weight, group or none", got=shown(order))
    if content.get("dynamic", False) is not False:
        raise FormatError(f"{where}: dynamic", expected="false", got=shown(content["dynamic"]))
    if content.get("block_structure") is not None:
        raise FormatError(f"{where}: block_structure", expected="none", got=shown(content["block_structure"]))
    known = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"}
    check_known(content, known | OF_MAKING, where)
    return Scheme(
        name=name,
        bits=bits,
        group_size=size if strategy == "group" and type(size) is int else None,
        symmetric=symmetric,
        ordered=ORDERS[order],
    )


def _texts(content: object, where: str) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise FormatError(where, expected="a list of names of modules", got=shown(content))
    return tuple(content)
