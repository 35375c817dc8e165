"""torchao folders of `IntxUnpackedToInt8Tensor`, as transformers saves them: a byte for each code; read.

config.json         transformers' config; what quantization_config says is not needed
model.safetensors   <module>._weight_qdata, ._weight_scale and ._weight_zero_point, the other tensors as they are; in
                    the metadata of the file a JSON object for each weight: its type, width and groups
tokenizer and other companion files
"""

from qalora.converters.format import Layout, exact, late, quantized_by

__all__ = ["LAYOUT", "read"]

read = late("qalora.converters.torchao.reader", "read")

LAYOUT = Layout(
    name="torchao",
    kind="torchao",
    read=read,
    by_config=quantized_by("torchao"),
    end="._weight_qdata",
    runtimes=("torch",),
    rounding=exact,
    memory=lambda path: 4,  # dequantized, in float32: 4 times the bytes of codes
)
