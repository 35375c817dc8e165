"""What a user may choose when a model is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qalora.errors import InputError
from qalora.options.export import shard_size
from qalora.options.fields import Options, device_option, fields_of, option
from qalora.options.words import BITS, Zeros

__all__ = ["Quantize", "RoundingOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingOptions(Options):
    """How linear weights become integers, but for their width; raises InputError for an option out of range."""

    group_size: int | None = option(
        32, "Columns that share a scale and a minimum. row: the whole row.", low=1, empty="row"
    )
    zeros: Zeros = option("real", "Zero points: real numbers, integers, or the middle code everywhere.")
    method: Literal["rtn", "clip", "hqq", "gptq"] = option(
        "rtn",
        "rtn: round to nearest. clip: search the range. hqq: search scale and minimum. gptq: needs `calibration`.",
    )
    fit_minima: bool = option(False, "Fit the minima to the layers' inputs. Needs `calibration`.")
    act_order: bool = option(
        False, "gptq: quantize the most important columns first. Groups stay runs of columns.", expert=True
    )
    damping: float = option(
        0.01,
        "gptq: add this share of the Hessian's mean diagonal to its diagonal.",
        above=0,
        high=1,
        expert=True,
    )
    passes: int = option(
        2,
        "gptq: passes of coordinate descent over all codes after GPTQ. 0: GPTQ as published.",
        low=0,
        high=100,
        expert=True,
    )

    def check(self) -> None:
        """InputError for options that do not go together, or would change nothing."""
        if self.fit_minima and self.zeros != "real":
            raise InputError("`fit_minima` needs real zero points", todo="give `zeros` real", field="zeros")
        for one in fields_of(type(self)):
            of_gptq = one.name in ("act_order", "damping", "passes")
            if of_gptq and self.method != "gptq" and getattr(self, one.name) != one.default:
                raise InputError(f"`{one.name}` is for `method` gptq, and the method is {self.method}", field=one.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(RoundingOptions):
    """How a model is quantized; raises InputError for options out of range or that do not go together."""

    bits: int | Literal["auto"] = option(
        4, "Bits per weight. auto chooses a width for each layer, within `budget`.", known=lambda: BITS
    )
    calibration: str | None = option(
        None,
        "Text for computing the layers' inputs: a text file, or data as qalora train takes it.",
        place="hub",
        metavar="FILE",
        example="text.jsonl",
    )
    budget: float | None = option(
        None,
        "With `bits` auto: mean bits per weight of the linear layers, at most, with scales and minima.",
        above=0,
        metavar="BITS",
    )
    requantize: bool = option(False, "Quantize a model that holds integers already.")
    device: str = device_option("Device to compute on")
    widths: tuple[int, ...] = option(
        (), "With `bits` auto: a width to choose from.", known=lambda: BITS, metavar="BITS", example=4, expert=True
    )
    calibration_tokens: int = option(8192, "Tokens of the calibration text to use.", low=1, expert=True)
    calibration_length: int = option(256, "Tokens per calibration sequence.", low=2, expert=True)
    max_shard_size: int = shard_size()

    @property
    def automatic(self) -> bool:
        """Whether a width is chosen for each layer."""
        return self.bits == "auto"

    def check(self) -> None:
        """InputError for options that do not go together, or would change nothing."""
        super(Quantize, self).check()
        if self.automatic != (self.budget is not None):
            raise InputError("`bits` auto and `budget` go together: give both, or neither", field="bits")
        if self.widths and not self.automatic:
            raise InputError("`widths` goes with `bits` auto", field="widths")
        needs = "`bits` auto" if self.automatic else "`fit_minima`" if self.fit_minima else f"`method` {self.method}"
        text = self.calibration is not None
        if not text and (self.automatic or self.fit_minima or self.method == "gptq"):
            raise InputError(
                f"{needs} needs the layers' inputs on a text", todo="give one: `calibration`", field="method"
            )
        if text and not self.automatic and not self.fit_minima and self.method == "rtn":
            raise InputError(
                "`method` rtn makes no use of `calibration`",
                todo="give `fit_minima`, or another method",
                field="calibration",
            )
        for one in fields_of(type(self)):
            if one.name.startswith("calibration_") and not text and getattr(self, one.name) != one.default:
                raise InputError(f"`{one.name}` needs a text: give `calibration`", field=one.name)
