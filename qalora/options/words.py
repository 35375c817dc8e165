"""Words and numbers that several records take."""

from typing import Literal

__all__ = [
    "BITS",
    "LORA_FILES",
    "LOSSES",
    "SHARD_SIZE",
    "SOURCES",
    "TARGETS",
    "CheckpointFormat",
    "Convention",
    "Level",
    "Minima",
    "Zeros",
]

BITS = (2, 3, 4, 5, 6, 8)
"""Widths of a code."""

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one safetensors file, as transformers splits."""

Convention = Literal["paper", "official", "peft"]
"""What an adapter's scaling means, see `qalora.adapter.records`."""

Minima = Literal["float16", "float32"]
"""What folded minima are rounded to."""

CheckpointFormat = Literal["gptq", "gptq_v2"]
"""What a GPTQ folder's zeros are stored as: minus one, or as they are."""

Zeros = Literal["real", "integer", "symmetric"]
"""Zero points: real ones, whole ones, or the middle one everywhere."""

Level = Literal["weights", "logits", "generation"]
"""How far a verification goes; each includes those before it."""

TARGETS = {
    "gptq": "qalora.converters.gptq",
    "gguf": "qalora.converters.gguf",
    "onnx": "qalora.converters.onnx",
    "openvino": "qalora.converters.openvino",
    "transformersjs": "qalora.converters.transformersjs",
    "mlx": "qalora.converters.mlx",
    "hqq": "qalora.converters.hqq",
    "compressed-tensors": "qalora.converters.compressed_tensors",
    "torchao": "qalora.converters.torchao",
    "mnn": "qalora.converters.mnn",
    "qalora": "qalora.converters.native",
}
"""Each format that `export` writes, and the module whose FORMAT says all of it (`qalora.converters.format`); our own
folder is the last. An export's folder has the format's name."""

SOURCES = {
    "awq": "qalora.converters.awq",
    "auto-round": "qalora.converters.auto_round",
}
"""Each layout that is read and not written, and the module whose LAYOUT says all of it; a float model's is not here."""

LORA_FILES = ("gguf-lora", "onnx-adapter")
"""The files of adapters that runtimes of these formats apply, by the names that the formats' records give them."""

LOSSES: dict[str, str] = {
    "zeros": "real zero points rounded to integers; on SmolLM2 half of the adapter is lost",
    "minima": "float32 minima rounded to float16, half an ULP",
    "scales": "float32 scales rounded to float16, half an ULP",
    "eight-bit": "re-encoded in 8 bits with the best multiplier per group; about 3 % of the adapter is lost",
    "residual": "what integer zero points leave over rounded to float32, half an ULP of it",
    "narrowing": "a float tensor stored in a narrower float type",
    "embedding": "codes of an embedding decoded to float16, half an ULP",
}
"""The losses that a user can allow by name, and what each means."""
