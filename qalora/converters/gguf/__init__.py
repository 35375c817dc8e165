"""GGUF files, read and written; the codes move as they are. `qalora.formats.gguf` and `gguf_blocks` hold the bytes."""

from qalora.converters.gguf.reader import read
from qalora.converters.gguf.writer import plan, write

__all__ = ["plan", "read", "write"]
