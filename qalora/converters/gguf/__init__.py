"""GGUF files, read and written; the codes move as they are. `qalora.formats.gguf` and `gguf_blocks` hold the bytes."""

from qalora.checkpoint import Wrapper
from qalora.converters.format import Format, LoraFile, Rounding, late
from qalora.converters.gguf.files import file_metadata, is_gguf, models
from qalora.converters.gguf.running import openings, usage
from qalora.converters.wrapping import kind_of
from qalora.formats.gguf_split import split_files

__all__ = ["FORMAT", "plan", "read", "write"]

plan = late("qalora.converters.gguf.writer", "plan")
read = late("qalora.converters.gguf.reader", "read")
write = late("qalora.converters.gguf.writer", "write")


def _without(wrapper: Wrapper) -> str:
    """What becomes of the images that llama.cpp takes from a second file, mmproj."""
    wanted = kind_of(wrapper).gguf
    if wanted:
        return f"; llama.cpp takes images only with a text model of its architecture {wanted}, which this is not"
    return "; the mmproj file that was made of the same model stays valid beside it, as a fold changes nothing in it"


FORMAT = Format(
    name="gguf",
    kind="GGUF",
    runs="llama.cpp, Ollama",
    plan=plan,
    write=write,
    read=read,
    by_files=is_gguf,
    artifacts=models,
    weights=split_files,
    sources=split_files,
    lora=LoraFile(
        name="gguf-lora",
        kind="a GGUF LoRA",
        suffix=".gguf",
        holds=late("qalora.converters.gguf.lora", "is_lora"),
        write=late("qalora.converters.gguf.lora", "write_lora"),
        content=late("qalora.converters.gguf.lora", "content"),
        by_base=True,
        read=late("qalora.converters.gguf.lora", "read_lora"),
    ),
    runtimes=("llama.cpp",),
    rounding=lambda path: Rounding(kind="q8"),
    memory=lambda path: 0,
    ends="llama.cpp",
    findings=late("qalora.inspection.gguf", "findings"),
    suffixes=(".gguf",),
    metadata_of=file_metadata,
    packages=("gguf",),
    usage=usage,
    openings=openings,
    library="gguf",
    tokenizer=True,
    without=_without,
)
