"""compressed-tensors folders, which llm-compressor writes for vLLM: read where they hold integers ("pack-quantized").

config.json         transformers' config, and under quantization_config which module is quantized how (`scheme`)
model.safetensors   the words of `qalora.formats.compressed_tensors`, or its shards; the other tensors as they are
tokenizer and other companion files
"""

from qalora.converters.format import Layout, exact, late, quantized_by

__all__ = ["LAYOUT", "read"]

read = late("qalora.converters.compressed_tensors.reader", "read")

LAYOUT = Layout(
    name="compressed-tensors",
    kind="compressed-tensors",
    read=read,
    by_config=quantized_by("compressed-tensors"),
    end=".weight_packed",
    runtimes=("torch",),
    rounding=exact,
    memory=lambda path: 8,  # dequantized, in float32: at least 8 times the bytes of 4-bit codes
)
