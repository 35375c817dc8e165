"""What a user may choose when a model is quantized, checked once; and the methods there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qalora.errors import InputError
from qalora.quantization.gptq import GptqOptions, gptq_tensor
from qalora.quantization.minima import fit_minima
from qalora.quantization.rounding import ZEROS, Zeros, quantize_tensor, spec_of
from qalora.quantization.searching import SEARCHES, search_tensor
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec, check_group_size

__all__ = ["METHODS", "Method", "QuantizeOptions", "quantize_weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How linear weights are quantized; raises InputError for an option out of range.

    bits        one of BITS
    group_size  columns that share a scale; None makes one group of each row
    zeros       real zero points, whole ones, or the middle one everywhere
    method      a key of METHODS
    fit_minima  whether minima are fitted to the inputs afterwards, as `qalora.quantization.minima` does
    act_order   gptq: columns of the largest second moments first; groups stay runs of columns
    damping     gptq: share of the moments' mean diagonal that is added to it
    passes      gptq: passes of coordinate descent over all codes after GPTQ's own; 0 is GPTQ as published
    """

    bits: int = 4
    group_size: int | None = 32
    zeros: Zeros = "real"
    method: str = "rtn"
    fit_minima: bool = False
    act_order: bool = False
    damping: float = 0.01
    passes: int = 2

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError("bits", expected=f"one of {', '.join(map(str, BITS))}", got=str(self.bits))
        for name, value, known in (("zeros", self.zeros, ZEROS), ("method", self.method, METHODS)):
            if value not in known:
                raise InputError(name, expected=f"one of {', '.join(known)}", got=repr(value))
        if self.fit_minima and self.zeros != "real":
            raise InputError("fitted minima have real zero points", todo="give --zeros real")
        if not 0 < self.damping <= 1:
            raise InputError("damping", expected="a number above 0, at most 1", got=str(self.damping))
        if not 0 <= self.passes <= 100:
            raise InputError("passes", expected="0 to 100", got=str(self.passes))

    def check_use(self, *, text: bool, automatic: bool = False) -> None:
        """InputError for options that do not go together, or would change nothing.

        text       whether there is a text to compute the layers' inputs on
        automatic  whether a width is to be chosen for each layer
        """
        usual = QuantizeOptions()
        for key in ("act_order", "damping", "passes"):
            if self.method != "gptq" and getattr(self, key) != getattr(usual, key):
                raise InputError(f"--{key.replace('_', '-')} is for --method gptq, and the method is {self.method}")
        needs = "--bits auto" if automatic else "--fit-minima" if self.fit_minima else f"--method {self.method}"
        if not text and (automatic or self.needs_inputs):
            raise InputError(f"{needs} needs the layers' inputs on a text", todo="give one: --calibration FILE")
        if text and not automatic and not self.fit_minima and self.method == "rtn":
            raise InputError("--method rtn makes no use of --calibration", todo="give --fit-minima, or another method")

    @property
    def needs_inputs(self) -> bool:
        """Whether nothing can be done without the layers' inputs."""
        return self.fit_minima or METHODS[self.method].needs_inputs

    def size(self, columns: int) -> int:
        """The group size in a layer of so many inputs; InputError where it does not fit."""
        found = columns if self.group_size is None else self.group_size
        check_group_size(columns, found)
        return found

    def spec(self, columns: int) -> QuantSpec:
        """What is guaranteed of a quantized layer of so many inputs."""
        return spec_of(self.bits, self.size(columns), self.zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """quantize: from a float weight [out, in], the moments [in, in] of its inputs or None, and the options."""

    quantize: Callable[[Tensor, Tensor | None, QuantizeOptions], GroupQuantTensor]
    needs_inputs: bool = False


def _rounded(weight: Tensor, moments: Tensor | None, options: QuantizeOptions) -> GroupQuantTensor:
    size = options.size(weight.shape[1])
    return quantize_tensor(weight, bits=options.bits, group_size=size, zeros=options.zeros)


def _searched(weight: Tensor, moments: Tensor | None, options: QuantizeOptions) -> GroupQuantTensor:
    return search_tensor(
        weight,
        bits=options.bits,
        group_size=options.size(weight.shape[1]),
        zeros=options.zeros,
        how=SEARCHES[options.method],
        moments=None if moments is None else moments.diagonal(),
    )


def _gptq(weight: Tensor, moments: Tensor | None, options: QuantizeOptions) -> GroupQuantTensor:
    if moments is None:
        raise InputError("gptq needs the layers' inputs", todo="give a text: --calibration FILE")
    return gptq_tensor(
        weight,
        moments,
        bits=options.bits,
        group_size=options.size(weight.shape[1]),
        zeros=options.zeros,
        options=GptqOptions(damping=options.damping, act_order=options.act_order, passes=options.passes),
    )


METHODS: Mapping[str, Method] = {
    "rtn": Method(quantize=_rounded),
    "clip": Method(quantize=_searched),
    "hqq": Method(quantize=_searched),
    "gptq": Method(quantize=_gptq, needs_inputs=True),
}


def quantize_weight(weight: Tensor, options: QuantizeOptions, moments: Tensor | None = None) -> GroupQuantTensor:
    """Quantize a float weight [out, in]; moments: mean(x x^T) [in, in] of its inputs, where they are known."""
    tensor = METHODS[options.method].quantize(weight, moments, options)
    if not options.fit_minima:
        return tensor
    if moments is None:
        raise InputError("minima are fitted to the layers' inputs", todo="give a text: --calibration FILE")
    return fit_minima(tensor, weight, moments)
