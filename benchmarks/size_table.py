"""How large each format is: bytes and bits per weight of what a device loads, and of the whole folder.

    python benchmarks/size_table.py [--write docs/formats.md]

Two models in groups of 32, at 4, 3 and 2 bits, with an adapter of rank 16 on every layer: SmolLM2, and the shape of a
1B Llama (synthetic.py). Both embeddings are tied to the output and in 8 bits, as GGUF has them. Everything is planned
and nothing is written: all figures are the plans'. With --write the tables go between the markers of that page.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from marked_page import put
from synthetic import synthetic

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.device_load import DeviceLoad
from qalora.converters.exports import export_jobs
from qalora.converters.plan import ExportOptions
from qalora.demo import smollm2_file
from qalora.formats.gguf_blocks import BLOCK_TYPES
from qalora.quantization import quantize
from qalora.testing import lazily, random_adapter, random_tensor

BITS = (4, 3, 2)
EMBEDDING = "model.embed_tokens.weight"
Zeros = Literal["real", "integer"]

BEGIN, END = "<!-- sizes:begin -->", "<!-- sizes:end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row: a format with options, and the zero points of the base."""

    name: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    zeros: Zeros = "real"


LOSSY = frozenset({"embedding"})
ROWS = (
    Row(name="GGUF", target="gguf"),
    Row(name="ONNX", target="onnx"),
    Row(name="ONNX, `--onnx-embedding float32`", target="onnx", options={"onnx_embedding": "float32"}),
    Row(name="OpenVINO", target="openvino"),
    Row(name="transformers.js", target="transformersjs"),
    Row(name="MLX", target="mlx"),
    Row(name="GPTQ", target="gptq"),
    Row(name="GPTQ, base with `--zeros integer`", target="gptq", zeros="integer"),
    Row(name="GPTQ, `--allow-loss embedding`", target="gptq", options={"allow_loss": LOSSY}),
    Row(name="HQQ", target="hqq"),
    Row(name="torchao", target="torchao"),
    Row(name="MNN", target="mnn"),
    Row(name="qalora", target="qalora"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a plan says: what a device loads, and bytes of all files whose size is known."""

    device_load: DeviceLoad
    folder: int


def smollm2(bits: int, zeros: Zeros) -> Checkpoint:
    """SmolLM2 with its linear layers quantized again; its embedding is Q8_0."""
    return quantize(load(smollm2_file()), bits=bits, group_size=32, zeros=zeros, requantize=True)


def llama_1b(bits: int, zeros: Zeros) -> Checkpoint:
    """The shape of a 1B Llama, with an embedding as Q8_0 has it."""
    model = synthetic("1b", bits=bits, zeros=zeros)
    spec = BLOCK_TYPES["Q8_0"].spec
    made = random_tensor(8, model.tensors[EMBEDDING].shape[1], bits=8, group_size=32, zeros="integer")
    lazy = replace(
        lazily(EMBEDDING, made, zeros="integer", min_dtype=torch.float32),
        shape=model.tensors[EMBEDDING].shape,
        spec=spec,
    )
    return replace(model, tensors={**model.tensors, EMBEDDING: lazy})


MODELS: dict[str, Callable[[int, Zeros], Checkpoint]] = {"SmolLM2-135M": smollm2, "the shape of a 1B Llama": llama_1b}


def sizes(make: Callable[[int, Zeros], Checkpoint]) -> dict[tuple[str, int], Size]:
    """By row and width."""
    found = {}
    for bits in BITS:
        models = {zeros: make(bits, zeros) for zeros in ("real", "integer")}
        for row in ROWS:
            model = models[row.zeros]
            adapter = random_adapter(model, rank=16, seed=1)
            (job,) = export_jobs(model, [row.target], ExportOptions(**row.options), adapter=adapter)
            if job.plan.device_load is None:
                raise TypeError(f"{row.name}: the plan was not counted")
            found[row.name, bits] = Size(device_load=job.plan.device_load, folder=job.plan.nbytes)
    return found


def table(found: dict[tuple[str, int], Size]) -> list[str]:
    """The lines of one model's table."""
    widths = " / ".join(map(str, BITS))
    head = [
        "format",
        f"linear layers, bits per weight at {widths} bits",
        "embedding, bits per weight",
        f"a device loads, MB at {widths} bits",
        "beside GGUF, at 4 bits",
        "folder, MB at 4 bits",
    ]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in ROWS:
        mine = [found[row.name, bits] for bits in BITS]
        embedding = mine[0].device_load.embedding
        cells = [
            row.name,
            " / ".join(f"{one.device_load.linear.bits:.2f}" for one in mine),
            f"{embedding.bits:.2f} ({embedding.nbytes / 1e6:.1f} MB)",
            " / ".join(f"{one.device_load.nbytes / 1e6:.1f}" for one in mine),
            f"{mine[0].device_load.nbytes / found['GGUF', BITS[0]].device_load.nbytes:.2f}",
            f"{mine[0].folder / 1e6:.1f}",
        ]
        lines.append(_line(cells))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """All of it as Markdown."""
    parts = []
    for name, make in MODELS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign libraries' own
            lines = table(sizes(make))
        parts.append("\n".join([f"{name[0].upper()}{name[1:]}:", "", *lines]))
        print(parts[-1], "\n", flush=True)
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables, and put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced")
    arguments = parser.parse_args()
    made = tables()
    if arguments.write is not None:
        put(arguments.write, made, BEGIN, END)


if __name__ == "__main__":
    main()
