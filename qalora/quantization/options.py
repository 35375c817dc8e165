"""What a user may choose when a model is quantized, checked once; and the methods there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qalora.errors import InputError, about
from qalora.options import option
from qalora.options.quantize import RoundingOptions
from qalora.quantization.gptq import GptqOptions, gptq_tensor
from qalora.quantization.minima import fit_minima
from qalora.quantization.rounding import quantize_tensor, spec_of
from qalora.quantization.searching import SEARCHES, search_tensor
from qalora.tensor import BITS, GroupQuantTensor, QuantSpec, check_group_size

__all__ = ["METHODS", "Method", "QuantizeOptions", "quantize_weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions(RoundingOptions):
    """How one linear weight becomes integers."""

    bits: int = option(4, "Bits of a weight.", known=lambda: BITS)

    @property
    def needs_inputs(self) -> bool:
        """Whether nothing can be done without the layers' inputs."""
        return self.fit_minima or METHODS[self.method].needs_inputs

    def size(self, columns: int) -> int:
        """The group size in a layer of so many inputs; InputError where it does not fit."""
        group_size = columns if self.group_size is None else self.group_size
        with about("group_size"):
            check_group_size(columns, group_size)
        return group_size

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
        raise InputError("gptq needs the layers' inputs", todo="give a text: `calibration`")
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
    """Quantize a float weight [out, in] on its device; moments: mean(x x^T) [in, in] of its inputs, where they are
    known, on the same device.
    """
    tensor = METHODS[options.method].quantize(weight, moments, options)
    if not options.fit_minima:
        return tensor
    if moments is None:
        raise InputError("minima are fitted to the layers' inputs", todo="give a text: `calibration`")
    return fit_minima(tensor, weight, moments)
