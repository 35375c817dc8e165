"""What auto-round writes into a quantization_config of any method: what changes no weight, and what would.

Source: auto-round 0.16.1, compressors/base.py (SerializedCompressorConfig) and schemes.py (QuantizationScheme).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.converters.packed import not_read
from qalora.errors import FormatError, shown

__all__ = ["OF_ACTIVATIONS", "OF_MAKING", "check_plain"]

OF_MAKING = frozenset(
    {
        "amp",
        "autoround_version",
        "batch_size",
        "dataset",
        "enable_alg_ext",
        "enable_minmax_tuning",
        "enable_norm_bias_tuning",
        "enable_quanted_input",
        "gradient_accumulate_steps",
        "iters",
        "low_gpu_mem_usage",
        "lr",
        "minmax_lr",
        "nsamples",
        "provider",
        "scale_dtype",
        "seqlen",
        "supported_types",
    }
)
"""Keys of how codes were found."""

OF_ACTIVATIONS = frozenset({"act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym"})

OTHERWISE = {
    "rotation_config": "weights that were rotated",
    "rotation_configs": "weights that were rotated",
    "spinquant_config": "weights that were rotated",
    "static_attention_dtype": "quantized attention",
    "static_kv_dtype": "a quantized cache of keys and values",
    "super_bits": "quantized scales",
    "super_group_size": "quantized scales",
}
"""Keys that change what is computed, and what they mean."""


def check_plain(content: Mapping[str, Any], where: str) -> frozenset[str]:
    """The keys that say nothing that matters here, of a whole config or of a layer in it.

    Raises FormatError, which begins with `where`, for one of them that does.
    """
    for key, what in OTHERWISE.items():
        if content.get(key):
            raise not_read(f"{where}: {key}: {what}")
    bits = content.get("act_bits")
    if bits is not None and (type(bits) is not int or bits < 16):
        raise not_read(f"{where}: act_bits: quantized activations")
    kind = content.get("data_type")
    if kind not in (None, "int"):
        raise FormatError(f"{where}: data_type", expected="int", got=shown(kind), todo="start from the float model")
    granularity = {"static_attention_granularity", "static_kv_granularity"}
    return OF_MAKING | OF_ACTIVATIONS | set(OTHERWISE) | granularity | {"data_type"}
