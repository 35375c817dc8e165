"""MLX folders, as mlx-lm opens and writes them; read and written.

config.json         transformers' config, with what mlx-lm has other defaults for or looks for elsewhere, and
                    "quantization": {"bits", "group_size", "mode": "affine", module: {...} where one differs}
model.safetensors   <module>.weight, .scales, .biases as `qalora.formats.mlx` says, and the other tensors as they are;
                    metadata "qalora.tensors": what each tensor was (`qalora.converters.specs`)
tokenizer and other companion files
"""

from qalora.converters.mlx.planner import plan
from qalora.converters.mlx.reader import read
from qalora.converters.mlx.writer import write

__all__ = ["plan", "read", "write"]
