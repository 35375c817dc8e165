"""GGUF files, read and written; the codes move as they are. `qalora.formats.gguf` and `gguf_blocks` hold the bytes."""

from qalora.converters.format import Format, Rounding
from qalora.converters.gguf.files import is_gguf, models, told
from qalora.converters.gguf.lora import is_lora, read_lora
from qalora.converters.gguf.reader import read
from qalora.converters.gguf.running import openings, usage
from qalora.converters.gguf.writer import plan, write
from qalora.formats.gguf_split import split_files

__all__ = ["FORMAT", "plan", "read", "write"]

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
    is_lora=is_lora,
    read_lora=read_lora,
    runtimes=("llama.cpp",),
    rounding=lambda path: Rounding(kind="q8"),
    memory=0,
    findings="qalora.inspection.gguf",
    suffixes=(".gguf",),
    told=told,
    packages=("gguf",),
    usage=usage,
    openings=openings,
    library="gguf",
    tokenizer=True,
)
