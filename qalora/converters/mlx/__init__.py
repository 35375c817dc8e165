"""MLX folders, as mlx-lm opens and writes them; read and written.

config.json         transformers' config, with what mlx-lm has other defaults for or looks for elsewhere, and
                    "quantization": {"bits", "group_size", "mode": "affine", module: {...} where one differs}
model.safetensors   <module>.weight, .scales, .biases as `qalora.formats.mlx` says, and the other tensors as they are;
                    metadata "qalora.tensors": what each tensor was (`qalora.converters.specs`)
tokenizer and other companion files
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora.converters.format import Format, exact, late, quantized_by
from qalora.converters.mlx.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.mlx.planner", "plan")
read = late("qalora.converters.mlx.reader", "read")
write = late("qalora.converters.mlx.writer", "write")


def _by_config(folder: Path, config: Mapping[str, Any]) -> bool:
    """By `quantization`, of which quantization_config may be a copy, which names no method."""
    found = config.get("quantization_config")
    copied = found is None or (isinstance(found, dict) and "quant_method" not in found)
    return quantized_by("mlx")(folder, config) or (copied and isinstance(config.get("quantization"), dict))


FORMAT = Format(
    name="mlx",
    kind="MLX",
    runs="mlx-lm",
    plan=plan,
    write=write,
    read=read,
    by_config=_by_config,
    end=".biases",
    unannounced="`quantization` is missing in config.json: take it from where the model came from",
    runtimes=("mlx",),
    rounding=exact,
    ends="mlx-lm",
    findings=late("qalora.inspection.mlx", "findings"),
    usage=usage,
    openings=openings,
    library="mlx",
    carries=late("qalora.converters.mlx.around", "carries"),
    without=lambda wrapper: "; mlx-lm does not open the whole",
)
