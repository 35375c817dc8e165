"""Rotary positions: what a config says of them, whatever version of transformers wrote it, and the tables they become.

    angle of position p, pair j     p * theta ** (-2 j / size) / factor[j]
    default  factor 1        linear  one factor        llama3, yarn  a factor for each pair, from a few numbers
    longrope two lists of factors: one while a sequence is within the original context, the other beyond it

transformers 5 writes `rope_parameters`, one object or one for each kind of layer; before, it was `rope_scaling` and
`rope_theta`, and Gemma 3 had `rope_local_base_freq` beside them. `joined_parameters` makes one object of all of these,
as transformers' classes do where several are there. Source: transformers 5.23, modeling_rope_utils.py,
convert_rope_params_to_dict and standardize_rope_params, and those of configuration_gemma3.py and configuration_phi3.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalora.converters.families.record import LAYER_KINDS
from qalora.errors import InputError, shown

__all__ = [
    "ALPHA",
    "BETA",
    "KINDS",
    "LISTS",
    "LOCAL_THETA",
    "ORIGINAL",
    "PLACES",
    "SHARE",
    "WITH_ORIGINAL",
    "Rope",
    "check_rope",
    "frequencies",
    "joined_parameters",
    "llama3_factors",
    "rope_of",
    "rotary_table",
    "stretched",
    "table_rows",
    "two_tables",
    "wide_frequencies",
]

KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""rope_type, and the numbers that it cannot do without."""

ALPHA, BETA = "alpha", "llama_4_scaling_beta"
"""Numbers that the classes of some families alone read: see `Family.rope_keys`."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "dynamic": (ALPHA,),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", BETA),
    "longrope": ("factor", "attention_factor"),
}

DEFAULTS = {"beta_fast": 32, "beta_slow": 1}

ORIGINAL, SHARE = "original_max_position_embeddings", "partial_rotary_factor"
LISTS = ("short_factor", "long_factor")
WITH_ORIGINAL = ("llama3", "yarn", "longrope")
"""The kinds for which the context before its extension counts."""

LOCAL_THETA = "rope_local_base_freq"
PLACES = ("rope_scaling", "rope_parameters", "rope_theta", LOCAL_THETA, SHARE)
"""The keys of a config that say something of rotary positions, besides ORIGINAL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary positions of one kind of layer.

    kind     a key of KINDS
    theta    the base of the frequencies
    numbers  what KINDS and OPTIONAL name, as far as it is there; lists as tuples
    share    how much of a head is rotated, from its start: 1 for all of it
    """

    kind: str
    theta: float
    numbers: Mapping[str, Any]
    share: float = 1.0

    def size(self, head_size: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_size * self.share)

    def attention_factor(self, positions: int) -> float:
        """What a longrope multiplies cos and sin with, in a model with this context."""
        attention, factor = self.numbers.get("attention_factor"), self.numbers.get("factor", positions / self.original)
        if attention is not None:
            return float(attention)
        return math.sqrt(1 + math.log(factor) / math.log(self.original)) if factor > 1 else 1.0

    @property
    def temperature(self) -> float | None:
        """The beta by which queries grow: times 1 + beta * ln(1 + floor(position / original))."""
        beta = self.numbers.get(BETA)
        return None if beta is None else float(beta)

    @property
    def original(self) -> int:
        """The context before it was extended; only of kinds that have one."""
        return int(self.numbers[ORIGINAL])

    def parameters(self) -> dict[str, Any]:
        """As transformers' `rope_parameters`."""
        numbers = {key: list(value) if isinstance(value, tuple) else value for key, value in self.numbers.items()}
        partial = {} if self.share == 1.0 else {SHARE: self.share}
        return {"rope_type": self.kind, "rope_theta": self.theta, **partial, **numbers}


def joined_parameters(
    settings: Mapping[str, Any], where: object, aliases: Mapping[str, str], own: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`rope_parameters` of all places of a config, with theta, share and original context in them.

    One object; or, where the settings have LOCAL_THETA, one for each of LAYER_KINDS. rope_scaling replaces
    rope_parameters (in Gemma 3 it adds to those of the layers without a window); theta and share of an object count
    more than those beside it, and the original context beside an object more than its own.

    settings  a config with its family's defaults
    aliases   other names of kinds: {"su": "longrope"}
    own       which of ALPHA and BETA the family's class reads; others are left out

    Raises InputError for what is no such object, and for an object by kinds of layers where all layers are alike.
    """
    if LOCAL_THETA in settings:
        return _by_layer(settings, where, aliases)
    parameters = _object(settings, "rope_scaling", where) or _object(settings, "rope_parameters", where) or {}
    parts = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if parts:
        expected = "one object, for layers that all have the same positions"
        raise InputError(f"{where}: rope_parameters", expected=expected, got=f"one for {parts[0]!r:.40}")
    result = _completed(parameters, settings, where, aliases, settings.get("rope_theta", 10000.0))
    return {key: value for key, value in result.items() if key not in (ALPHA, BETA) or key in own}


def _by_layer(settings: Mapping[str, Any], where: object, aliases: Mapping[str, str]) -> dict[str, Any]:
    outer, scaling = _object(settings, "rope_parameters", where), settings.get("rope_scaling")
    by_layer = {kind: {} for kind in LAYER_KINDS} if outer is None else {kind: outer.get(kind) for kind in LAYER_KINDS}
    parameters = {}
    for kind, key in zip(LAYER_KINDS, ("rope_theta", LOCAL_THETA), strict=True):
        own = _object(by_layer, kind, where)
        if kind == LAYER_KINDS[0] and scaling is not None:
            if own is None:
                raise InputError(f"{where}: rope_parameters", expected=f"a {kind}, to which rope_scaling adds")
            start = {"rope_type": "default"} if outer is None else {}
            own = {**start, **own, **(_object(settings, "rope_scaling", where) or {})}
        beside = {key: value for key, value in settings.items() if key != ORIGINAL}
        parameters[kind] = _completed(own or {}, beside, where, aliases, settings[key])
    return parameters


def _object(holder: Mapping[str, Any], key: str, where: object) -> dict[str, Any] | None:
    content = holder.get(key)
    if content is None or isinstance(content, Mapping):
        return None if content is None else dict(content)
    what = f"an object for {key}" if key in LAYER_KINDS else "an object with rope_type"
    raise InputError(f"{where}: rope_parameters", expected=what, got=shown(content))


def _completed(
    parameters: Mapping[str, Any], settings: Mapping[str, Any], where: object, aliases: Mapping[str, str], theta: Any
) -> dict[str, Any]:
    """An object with its kind as rope_type, the numbers of that kind, and what stands beside it."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str):
        raise InputError(f"{where}: rope_parameters", expected="an object with rope_type", got=shown(parameters))
    kind = aliases.get(kind, kind)
    known = (SHARE, *KINDS[kind], *OPTIONAL.get(kind, ())) if kind in KINDS else tuple(parameters)
    numbers = {key: parameters[key] for key in known if parameters.get(key) is not None and key != "type"}
    result = {"rope_type": kind, "rope_theta": parameters.get("rope_theta", theta), **numbers}
    if settings.get(SHARE) is not None:
        result.setdefault(SHARE, settings[SHARE])
    if kind in WITH_ORIGINAL:
        result[ORIGINAL] = settings.get(ORIGINAL) or parameters.get(ORIGINAL) or settings.get("max_position_embeddings")
    return result


def stretched(parameters: Mapping[str, Any], settings: Mapping[str, Any], where: object) -> dict[str, Any]:
    """`rope_parameters` of the default kind with the frequencies that a dynamic one with a fixed alpha has.

    settings  they have the size of a head, which is more than 2

    Source: transformers, modeling_hunyuan_v1_dense.py, compute_ntk_alpha_rope_parameters.
    """
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    size = settings.get("head_dim")
    if size is None and type(hidden) is int and type(heads) is int and heads > 0:
        size = hidden // heads
    if type(size) is not int or size <= 2:
        raise InputError(f"{where}: head size", expected="more than 2 for a rope with alpha", got=shown(size))
    theta, alpha = (_number(where, key, parameters[key]) for key in ("rope_theta", ALPHA))
    try:
        base = float(theta) * float(alpha) ** (size / (size - 2))
    except OverflowError:
        base = math.inf
    return {"rope_type": "default", "rope_theta": _number(where, "rope_theta", base)}


def rope_of(settings: Mapping[str, Any], where: object, layer_type: str = "full_attention") -> Rope:
    """The rotary positions of a kind of layer; InputError for numbers that are missing or absurd.

    settings  with `rope_parameters` as `joined_parameters` gives them

    A kind that is not in KINDS is given as it is: what needs to know it refuses it.
    """
    parameters = _object(settings, "rope_parameters", where) or {}
    values = _object(parameters, layer_type, where) if layer_type in parameters else parameters
    values = {"rope_type": "default", **(values or {})}
    kind = values["rope_type"]
    if not isinstance(kind, str):
        raise InputError(f"{where}: rope_parameters", expected="an object with rope_type", got=shown(kind))
    numbers = {}
    for key in (*KINDS.get(kind, ()), *OPTIONAL.get(kind, ())):
        value = values.get(key)
        if value is None and kind == "yarn" and key == "factor" and values.get(ORIGINAL):
            value = settings["max_position_embeddings"] / _number(where, ORIGINAL, values[ORIGINAL])
        value = DEFAULTS.get(key) if value is None else value
        if value is None and key in KINDS[kind]:
            raise InputError(f"{where}: rope_parameters", expected=f"a {key} for {kind} scaling", got="none")
        if value is not None:
            numbers[key] = _number(where, key, value)
    share = values.get(SHARE)
    rope = Rope(
        kind=kind,
        theta=float(_number(where, "rope_theta", values.get("rope_theta", 10000.0))),
        numbers=numbers,
        share=float(_number(where, SHARE, 1.0 if share is None else share)),
    )
    if rope.share > 1:
        raise InputError(f"{where}: {SHARE}", expected="at most 1", got=str(rope.share))
    return rope


def _number(where: object, key: str, value: Any) -> Any:
    if key == "truncate":
        return bool(value)
    if key in LISTS and isinstance(value, list | tuple) and len(value) <= 1 << 16:
        return tuple(_number(where, f"{key}[]", part) for part in value)
    if key in LISTS or isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        expected = "a list of numbers above 0" if key in LISTS else "a number above 0"
        raise InputError(f"{where}: {key}", expected=expected, got=shown(value))
    return int(value) if key == ORIGINAL else value


def check_rope(rope: Rope, head_size: int, where: object) -> None:
    """Refuse what no table of positions holds."""
    if rope.kind not in KINDS or rope.kind == "dynamic":
        known = ", ".join(kind for kind in KINDS if kind != "dynamic")
        raise InputError(
            f"{where}: rope_type",
            expected=f"one of {known}",
            got=shown(rope.kind),
            todo="a table of positions cannot hold it" if rope.kind == "dynamic" else "use gptq",
        )
    size = rope.size(head_size)
    if size < 2 or size % 2:
        raise InputError(f"{where}: partial_rotary_factor", expected="an even share of a head", got=str(rope.share))
    for key in LISTS:
        if key in rope.numbers and len(rope.numbers[key]) != size // 2:
            raise InputError(f"{where}: {key}", expected=f"{size // 2} numbers", got=str(len(rope.numbers[key])))


def rotary_table(rope: Rope, head_size: int, positions: int, where: object) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [rows, rotated elements / 2], by transformers' own module, which knows every rope scaling.

    Row p is position p. A longrope whose context was extended has two tables, one below the other: `original` rows for
    sequences within the original context, then `positions` rows for longer ones.
    """
    check_rope(rope, head_size, where)
    size, rotary = rope.size(head_size), _rotary(rope, head_size, positions)
    spans = [positions] if not two_tables(rope, positions) else [rope.original, positions]
    tables = [rotary(torch.zeros(1, dtype=torch.float32), torch.arange(span)[None]) for span in spans]
    cos, sin = (torch.cat([table[part][0, :, : size // 2] for table in tables]).contiguous() for part in (0, 1))
    return cos, sin


def frequencies(rope: Rope, head_size: int, positions: int, where: object) -> tuple[list[Tensor], float]:
    """float32 [rotated elements / 2] for angles of position * frequency, and what cos and sin are multiplied with; by
    the same module. A longrope whose context was extended has two: within the original context, and beyond it.
    """
    check_rope(rope, head_size, where)
    rotary = _rotary(rope, head_size, positions)
    found = [rotary.inv_freq.clone()]
    if two_tables(rope, positions):
        rotary(torch.zeros(1, dtype=torch.float32), torch.tensor([[rope.original]]))  # a position beyond it
        found.append(rotary.inv_freq.clone())
    return found, float(rotary.attention_scaling)


def wide_frequencies(rope: Rope, head_size: int, positions: int) -> tuple[list[Tensor], float]:
    """The same in float64, by the formulas of transformers, modeling_rope_utils.py, which takes seconds to import; the
    tests hold the two together.
    """
    size = rope.size(head_size)
    plain = rope.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    numbers, times = rope.numbers, 1.0
    if rope.kind == "longrope":
        times = rope.attention_factor(positions)
        lists = LISTS if two_tables(rope, positions) else LISTS[:1]
        found = [plain / torch.tensor(numbers[key], dtype=torch.float64) for key in lists]
    elif rope.kind == "yarn":
        times, found = _yarn_attention(rope), [_yarn(rope, plain)]
    elif rope.kind == "llama3":
        found = [plain / llama3_factors(rope, size)]
    else:
        found = [plain / numbers.get("factor", 1.0)]
    return found, times


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """Frequencies that turn often in the original context stay, slow ones are divided by the factor."""
    numbers, size = rope.numbers, 2 * len(plain)
    ends = [
        size * math.log(rope.original / (numbers[key] * 2 * math.pi)) / (2 * math.log(rope.theta))
        for key in ("beta_fast", "beta_slow")
    ]
    if numbers.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], size - 1)
    high += 0.001 if low == high else 0
    slow = ((torch.arange(len(plain), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    frequencies: Tensor = plain / numbers["factor"] * slow + plain * (1 - slow)
    return frequencies


def _yarn_attention(rope: Rope) -> float:
    numbers, step = rope.numbers, 0.1 * math.log(max(1.0, rope.numbers["factor"]))
    if "attention_factor" in numbers:
        return float(numbers["attention_factor"])
    top, bottom = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return (1 + step * top) / (1 + step * bottom) if top and bottom else 1 + step


def _rotary(rope: Rope, head_size: int, positions: int) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    size = rope.size(head_size)
    whole = {key: value for key, value in rope.parameters().items() if key not in (SHARE, BETA)}
    config = LlamaConfig(
        head_dim=size, hidden_size=size, num_attention_heads=1, max_position_embeddings=positions, rope_parameters=whole
    )
    return LlamaRotaryEmbedding(config)


def llama3_factors(rope: Rope, size: int) -> Tensor:
    """What llama3 scaling divides the frequency of each pair by, float64 [size / 2].

    1 for wavelengths shorter than original/high_freq_factor, `factor` for those longer than original/low_freq_factor,
    between them 1 / ((1 - s)/factor + s) with s = (original/wavelength - low) / (high - low).
    """
    numbers = rope.numbers
    factor, low, high = (float(numbers[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope.original * rope.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size) / (2 * math.pi)
    smooth = ((turns - low) / (high - low if high != low else 1.0)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def two_tables(rope: Rope, positions: int) -> bool:
    """Whether other angles hold for sequences longer than the original context."""
    return rope.kind == "longrope" and positions > rope.original


def table_rows(rope: Rope, positions: int) -> int:
    """The rows of `rotary_table`."""
    return positions + (rope.original if two_tables(rope, positions) else 0)
