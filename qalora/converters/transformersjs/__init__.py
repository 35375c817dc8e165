"""transformers.js: the graph for ONNX Runtime, in the folder that @huggingface/transformers opens in Node and browsers.

    onnx/model_q4.onnx          the graph; the name is that of dtype "q4", whatever the widths of the codes are
    onnx/model_q4.onnx_data     its data, in files of less than 2 GB: the second is model_q4.onnx_data_1
    config.json                 with transformers.js_config: the dtype, and how many files of data there are
    generation_config.json, tokenizer files, the chat template in tokenizer_config.json

The graph is that of `qalora.converters.onnx` for ONNX Runtime, which onnxruntime-node and onnxruntime-web are.
"""

from qalora.converters.format import Format, exact, late
from qalora.converters.transformersjs.files import file_metadata, is_folder, memory, weight_files
from qalora.converters.transformersjs.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.transformersjs.planner", "plan")
read = late("qalora.converters.transformersjs.reader", "read")
write = late("qalora.converters.transformersjs.writer", "write")

FORMAT = Format(
    name="transformersjs",
    kind="transformers.js",
    runs="transformers.js, in Node and browsers",
    plan=plan,
    write=write,
    read=read,
    by_files=is_folder,
    artifacts=lambda folder: [folder] if is_folder(folder) else [],
    weights=weight_files,
    runtimes=("transformers.js",),
    also=("onnxruntime-web",),
    rounding=exact,
    memory=memory,
    suffixes=(".onnx", ".onnx_data", *(f".onnx_data_{n}" for n in range(1, 100))),
    metadata_of=file_metadata,
    packages=("onnx",),
    usage=usage,
    openings=openings,
    library="transformers.js",
)
