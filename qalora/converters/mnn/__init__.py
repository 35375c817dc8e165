"""MNN folders: a graph and a file of packed codes, for MNN's LLM engine on phones and CPUs.

    llm.mnn                the graph, of MNN's own operators (`decoder`)
    llm.mnn.weight         codes, scales and minima of every weight; biases, norms (`carriers`, `qalora.formats.mnn`)
    embeddings_bf16.bin    the embedding, where the base's is bfloat16
    llm_config.json        what MNN's engine knows of the model; what each tensor was (`qalora.converters.specs`)
    config.json            transformers' config, and how MNN is to run it
    generation_config.json, tokenizer files

Minima are real numbers: the fold is exact.
"""

from qalora.converters.format import Format, exact, late
from qalora.converters.mnn.files import (
    MODEL,
    file_metadata,
    graphs,
    is_graph,
    memory,
    source_files,
    weight_files,
)
from qalora.converters.mnn.running import openings, usage

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.mnn.planner", "plan")
read = late("qalora.converters.mnn.reader", "read")
write = late("qalora.converters.mnn.writer", "write")

FORMAT = Format(
    name="mnn",
    kind="MNN",
    runs="MNN",
    plan=plan,
    write=write,
    read=read,
    by_files=is_graph,
    artifacts=graphs,
    called=lambda path: path.parent if path.name == MODEL else path,
    weights=weight_files,
    sources=source_files,
    runtimes=("mnn",),
    rounding=exact,  # it is proven in `memory` normal, whatever its config asks for
    memory=memory,
    suffixes=(".mnn", ".weight", ".bin"),
    metadata_of=file_metadata,
    usage=usage,
    openings=openings,
)
