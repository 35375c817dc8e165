"""ONNX, in two graphs: one for ONNX Runtime and onnxruntime-genai, and a portable one of standard operators.

    onnx/           model.onnx                   genai_config.json  config.json  tokenizer files
    onnx/portable/  model.onnx  model.onnx.data  genai_config.json  config.json

Both read the same data. A graph may name files in its own folder and below, so they are beside the portable one. Where
one graph is written alone, it is in onnx/ with its data.

Both take input_ids [batch, sequence], attention_mask [batch, total] and past_key_values.<n>.key/value [batch, key-value
heads, past, head size], and give logits [batch, sequence, vocabulary] and present.<n>.key/value; all floats are
float32.
"""

from qalora.converters.format import Format, LoraFile, late
from qalora.converters.onnx.files import (
    MODEL,
    file_metadata,
    graphs,
    is_decoder,
    memory,
    rounding,
    source_files,
    weight_files,
)
from qalora.converters.onnx.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.onnx.planner", "plan")
read = late("qalora.converters.onnx.reader", "read")
write = late("qalora.converters.onnx.writer", "write")

FORMAT = Format(
    name="onnx",
    kind="ONNX",
    runs="onnxruntime-genai, ONNX Runtime",
    plan=plan,
    write=write,
    read=read,
    by_files=is_decoder,
    artifacts=graphs,
    weights=weight_files,
    sources=source_files,
    called=lambda path: path.parent if path.name == MODEL else path,
    lora=LoraFile(
        name="onnx-adapter",
        kind="an ONNX Runtime adapter",
        suffix=".onnx_adapter",
        holds=lambda path: path.suffix == ".onnx_adapter" and path.is_file(),
        write=late("qalora.converters.onnx.slots", "write_adapter_file"),
        content=late("qalora.converters.onnx.slots", "content"),
    ),
    runtimes=("onnxruntime",),
    also=("onnxruntime-cuda", "onnx.reference"),
    generators=("onnxruntime-genai",),
    rounding=rounding,
    memory=memory,
    slots=True,
    ends="onnxruntime-genai",
    findings=late("qalora.inspection.onnx", "findings"),
    suffixes=(".onnx", ".data"),
    metadata_of=file_metadata,
    packages=("onnx",),
    usage=usage,
    openings=openings,
    library="onnx",
)
