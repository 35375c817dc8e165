"""OpenVINO IR: a graph with packed codes, for OpenVINO and openvino-genai.

    openvino_model.xml      the graph, with its cache as state, and how it is to be run
    openvino_model.bin      its constants: codes, scales and minima as the base has them (`carriers`)
    openvino_tokenizer.*    the tokenizer as graphs, made by openvino-tokenizers; openvino_detokenizer.*
    config.json, generation_config.json, tokenizer files

Minima are real numbers: the fold is exact. OpenVINO divides by the scales when it loads the model, and keeps the codes.
"""

from qalora.converters.format import Format, exact, late
from qalora.converters.openvino.files import (
    MODEL,
    file_metadata,
    graphs,
    is_graph,
    memory,
    source_files,
    weight_files,
)
from qalora.converters.openvino.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.openvino.planner", "plan")
read = late("qalora.converters.openvino.reader", "read")
write = late("qalora.converters.openvino.writer", "write")

FORMAT = Format(
    name="openvino",
    kind="OpenVINO",
    runs="OpenVINO, openvino-genai",
    plan=plan,
    write=write,
    read=read,
    by_files=is_graph,
    artifacts=graphs,
    called=lambda path: path.parent if path.name == MODEL else path,
    weights=weight_files,
    sources=source_files,
    runtimes=("openvino",),
    also=("openvino-fast",),
    generators=("openvino-genai",),
    rounding=exact,  # it is proven with EXACT_OPTIONS, whatever it says itself
    memory=memory,
    suffixes=(".xml", ".bin"),
    metadata_of=file_metadata,
    packages=("openvino", "openvino_tokenizers"),
    usage=usage,
    openings=openings,
    library="openvino",
)
