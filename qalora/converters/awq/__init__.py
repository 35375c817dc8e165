"""AWQ folders, as AutoAWQ, GPTQModel and auto-round write them, in the layout "gemm"; read.

config.json         transformers' config, and under quantization_config bits, group_size, version
model.safetensors   the words of `qalora.formats.awq`, or its shards; the other tensors as they are
tokenizer and other companion files
"""

from qalora.converters.format import Layout, exact, late, quantized_by

__all__ = ["LAYOUT", "read"]

read = late("qalora.converters.awq.reader", "read")

LAYOUT = Layout(
    name="awq",
    kind="AWQ",
    read=read,
    by_config=quantized_by("awq"),
    runtimes=("torch",),
    rounding=exact,
    memory=lambda path: 8,  # dequantized, in float32: at least 8 times the bytes of 4-bit codes
)
