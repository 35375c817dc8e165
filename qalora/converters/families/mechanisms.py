"""What models have that no family here has, and how their config.json tells: for what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.converters.families.record import LAYER_KINDS
from qalora.converters.families.wrappers import WRAPPERS

__all__ = ["MECHANISMS", "Mechanism", "missing_in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """One of them.

    words    what it is, and what becomes of it here
    counts   keys of numbers that say how many there are, from `least` on
    begin    how keys begin that only such models have
    kinds    the words for such layers in layer_types, which counts where it is there
    objects  keys of objects that only such models have
    """

    words: str
    counts: tuple[str, ...] = ()
    least: int = 1
    begin: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()

    def evidence(self, config: Mapping[str, Any]) -> str:
        """What a config says of it, such as "num_experts 8"; "" where it says nothing."""
        for key in self.counts:
            value = config.get(key)
            if type(value) is int and value >= self.least:
                return f"{key} {value}"
        for key in self.objects:
            if isinstance(config.get(key), Mapping):
                return key
        types = config.get("layer_types")
        if isinstance(types, list):
            return next((f"layer_types has {kind}" for kind in self.kinds if kind in types), "")
        return next((key for key in config if self.begin and key.startswith(self.begin) and config[key]), "")


AROUND = Mechanism(
    words="a model of text and images: save its text part as a model of its own",
    objects=("text_config", "vision_config", "audio_config"),
)
"""What is said of wrappers that are not among WRAPPERS."""

MECHANISMS = (
    AROUND,
    Mechanism(
        words="a mixture of experts: its expert weights and their router are not read yet",
        counts=("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        least=2,
    ),
    Mechanism(
        words="layers of linear attention: they are not read yet",
        begin=("linear_num_", "linear_key_", "linear_value_", "linear_conv_"),
        kinds=("linear_attention",),
    ),
    Mechanism(words="Mamba layers: they are not read", begin=("mamba_", "ssm_", "time_step_"), kinds=("mamba",)),
    Mechanism(words="layers of short convolutions: they are not read yet", begin=("conv_L_",), kinds=("conv",)),
    Mechanism(words="latent attention (MLA): it is not read yet", counts=("kv_lora_rank",)),
)
"""In the order in which they are told."""


def missing_in(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The words of what a config says that no family has, each with what says it; of a decoder inside, too."""
    inner, opened = config.get("text_config"), str(config.get("model_type")) in WRAPPERS
    found = []
    for mechanism in (one for one in MECHANISMS if one is not AROUND or not opened):
        said = mechanism.evidence(config)
        if not said and isinstance(inner, Mapping):
            said = mechanism.evidence(inner)
        if said:
            found.append((mechanism.words, said))
    known = {*LAYER_KINDS, "attention", *(kind for mechanism in MECHANISMS for kind in mechanism.kinds)}
    types = config.get("layer_types")
    others = [kind for kind in types if isinstance(kind, str) and kind not in known] if isinstance(types, list) else []
    if others:
        found.append(("a kind of layers that is not known here", f"layer_types has {others[0][:40]!r}"))
    return tuple(found)
