"""What PEFT's adapter_config.json says of a LoRA: rank and alpha of each module, QA-LoRA's flag and pool.

PEFT 0.21.2, peft/tuners/lora/model.py and peft/utils/other.py: a key of `rank_pattern` or `alpha_pattern` is a regular
expression that matches a module if `(.*\\.)?(KEY)$` does; the first key that matches decides. alpha may be any number.
s = alpha / r, or alpha / sqrt(r) with `use_rslora`.

A config that makes the adapter more than W + s*B@A, or that changes the base's weights when PEFT loads it, is refused:
folding such an adapter would give another model. The config is untrusted: an expression that could run for very long
is refused as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora.errors import AdapterError, json_kind, shown
from qalora.formats.files import contained
from qalora.formats.json_text import read_json_object

__all__ = [
    "CONFIG",
    "PATTERNS",
    "STEPS",
    "PeftConfig",
    "check_number",
    "check_work",
    "is_safe",
    "matching_steps",
    "parse_config",
    "read_json",
]

CONFIG = "adapter_config.json"
JSON_LIMIT = 16 << 20

UNSUPPORTED: dict[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "target_parameters": "parameters that are no modules",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA, which changes the base's weights",
    "monteclora_config": "Monte Carlo LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
}
"""Keys that make the adapter something else when they are set."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Values of init_lora_weights, and their beginnings, for which PEFT changes the base's weights."""

CARRIED = (
    "base_model_name_or_path",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "revision",
    "target_modules",
    "task_type",
)
"""Keys that an adapter carries along in its metadata."""

SAVING = ("bias", "ensure_weight_tying", "modules_to_save", "trainable_token_indices")
"""Keys of tensors of the base that are trained too."""

BIASES = ("none", "all", "lora_only")

BEFORE, BEHIND = r"(.*\.)?(", ")$"
"""What PEFT puts around an expression."""

PATTERN_LENGTH = 1000

PATTERNS = 10_000
"""Expressions of a config: one for each module of the largest decoders is less."""

REPETITIONS = 3

STEPS = 10**8
"""That matching all expressions with all modules may take, counted as the worst of them: a few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The part of adapter_config.json that decides what the adapter adds.

    use_qalora and group_size are PEFT's `use_qalora` and `qalora_group_size`; PEFT ignores both, silently, on layers
    that are not GPTQ's, so that the shape of A decides, not the flag. bias, modules_to_save and token_indices (by the
    end of a module's path) say which tensors of the base are trained too; saving: those keys as they are.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[re.Pattern[str], float], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    use_qalora: bool
    group_size: int
    carried: Mapping[str, Any]
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    saving: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        return int(_first_match(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """The alpha of a module."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """s of a module, computed as PEFT does."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def check_work(config: PeftConfig, modules: Collection[str], where: str) -> None:
    """AdapterError for expressions that could take more than STEPS to be matched with an adapter's modules."""
    texts = [pattern.pattern for pattern, _ in (*config.rank_pattern, *config.alpha_pattern)]
    if matching_steps(texts, modules) > STEPS:
        raise AdapterError(
            f"{where}: rank_pattern and alpha_pattern",
            expected=f"expressions that match in {STEPS} steps",
            got=f"some that could take more with {len(modules)} modules",
            todo="name the modules in full",
        )


def matching_steps(texts: Collection[str], modules: Collection[str]) -> int:
    """What matching all expressions with all names may take, at most, for expressions that `is_safe` takes.

    An expression with n repetitions and k ways through its alternatives tries at most k * comb(length + n, n) places
    behind each dot of a name.
    """
    names = Counter((len(module), module.count(".")) for module in modules)
    return sum(
        expressions * count * (10 + (dots + 1) * ways * math.comb(length + loops, loops))
        for (loops, ways), expressions in Counter(map(_ways, texts)).items()
        for (length, dots), count in names.items()
    )


def is_safe(text: str) -> bool:
    """Whether an expression takes no exponential time, and no high power of a name's length."""
    plain = re.fullmatch(r"[\w.\-\\]*", text) is not None
    branches = text.count("|") if text.count("(") > 1 else 0
    looped = re.search(r"\)[*+?{]", text) is not None or _repetitions(text) > REPETITIONS or branches > 16
    return len(text) <= PATTERN_LENGTH and (plain or not looped)


def _repetitions(text: str) -> int:
    return len(re.findall(r"[*+?{]", text))


def _ways(text: str) -> tuple[int, int]:
    """The repetitions of a compiled expression, and the ways through its alternatives, at most."""
    inner = text.removeprefix(BEFORE).removesuffix(BEHIND)
    ways = math.prod(group.count("|") + 1 for group in re.findall(r"\(([^()]*)\)", inner))
    around = re.sub(r"\([^()]*\)", "", inner)
    rest = around.count("|")
    return _repetitions(inner), ways * (1 << rest if "(" in around else rest + 1)


def _first_match(patterns: tuple[tuple[re.Pattern[str], float], ...], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of an adapter's folder; FormatError if it is not one, or a key stands twice in an object."""
    return read_json_object(contained(folder, name), JSON_LIMIT, strict=True)


def parse_config(config: Mapping[str, Any], where: str) -> PeftConfig:
    """Check PEFT's config; AdapterError for one that is no LoRA, or more than one. `where` names the file."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type", expected="LORA", got=shown(config.get("peft_type")))
    for key, meaning in UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(
                f"{where}: {key} is set ({meaning}), so that the adapter is more than W + s*B@A",
                todo="only LoRA and QA-LoRA are supported",
            )
    if config.get("bias", "none") not in BIASES:
        raise AdapterError(f"{where}: bias", expected=" or ".join(BIASES), got=shown(config["bias"]))
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights {start!r} changes the base's weights when PEFT loads the adapter",
            todo="save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    rank = check_number(config.get("r", 8), f"{where}: r", whole=True)
    return PeftConfig(
        rank=int(rank),
        alpha=check_number(config.get("lora_alpha", 8), f"{where}: lora_alpha"),
        use_rslora=_flag(config, "use_rslora", where),
        rank_pattern=_patterns(config, "rank_pattern", where, whole=True),
        alpha_pattern=_patterns(config, "alpha_pattern", where, whole=False),
        use_qalora=_flag(config, "use_qalora", where),
        group_size=int(check_number(config.get("qalora_group_size", 16), f"{where}: qalora_group_size", whole=True)),
        carried={key: _carried(config[key], f"{where}: {key}") for key in CARRIED if config.get(key) is not None},
        bias=str(config.get("bias", "none")),
        modules_to_save=_modules_to_save(config.get("modules_to_save"), f"{where}: modules_to_save"),
        token_indices=_token_indices(config.get("trainable_token_indices"), f"{where}: trainable_token_indices"),
        saving={key: config[key] for key in SAVING if config.get(key) not in (None, "none", False, [], {})},
    )


def _modules_to_save(value: object, where: str) -> tuple[str, ...]:
    """Ends of module paths."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() and name for name in names):
        raise AdapterError(where, expected="a list of names", got=shown(value))
    return tuple(names)


def _token_indices(value: object, where: str) -> dict[str, tuple[int, ...]]:
    """Rows of each embedding, by the end of its path; a list is of the input embedding."""
    indices = {"embed_tokens": value} if isinstance(value, list) else value or {}
    if not isinstance(indices, dict):
        raise AdapterError(where, expected="a list of token ids, or an object of them", got=shown(value))
    for name, ids in indices.items():
        whole = isinstance(ids, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in ids)
        if not whole or not ids or len(set(ids)) != len(ids):
            raise AdapterError(f"{where}: {name[:80]!r}", expected="token ids, each once", got=shown(ids))
    return {name: tuple(ids) for name, ids in indices.items()}


def _carried(value: object, where: str) -> object:
    """Text or a number, or a list of them; nothing that could not be written again."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int) or (isinstance(item, str) and not item.isprintable()):
            raise AdapterError(where, expected="text or numbers", got=shown(item))
    return value


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise AdapterError(f"{where}: {key}", expected="true or false", got=shown(value))
    return value


def check_number(value: object, where: str, *, whole: bool = False) -> float:
    """A finite number, or a whole one from 1 that fits 32 bits."""
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and -(2**1000) < value < 2**1000
    if not good or (whole and not 1 <= int(value) < 1 << 31):  # type: ignore[call-overload]
        raise AdapterError(where, expected="a whole number from 1" if whole else "a number", got=shown(value))
    return float(value)  # type: ignore[arg-type]


def _patterns(
    config: Mapping[str, Any], key: str, where: str, *, whole: bool
) -> tuple[tuple[re.Pattern[str], float], ...]:
    content = config.get(key) or {}
    if not isinstance(content, dict):
        raise AdapterError(f"{where}: {key}", expected="an object", got=json_kind(content))
    if len(content) > PATTERNS:
        raise AdapterError(f"{where}: {key}", expected=f"at most {PATTERNS} expressions", got=str(len(content)))
    return tuple(
        (_pattern(text, f"{where}: {key}"), check_number(value, f"{where}: {key} {text[:80]!r}", whole=whole))
        for text, value in content.items()
    )


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """Compile PEFT's expression."""
    if not is_safe(text):
        raise AdapterError(
            f"{where}: the expression {text[:80]!r}",
            expected=f"at most {PATTERN_LENGTH} characters and {REPETITIONS} repetitions, none of them of a group",
            todo="name the modules in full",
        )
    try:
        return re.compile(f"{BEFORE}{text}{BEHIND}")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{where}: {text[:80]!r} is no regular expression: {error}") from error
