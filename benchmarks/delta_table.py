"""How large the delta of a fine-tune is, format by format, on a real model.

    python benchmarks/delta_table.py [--max-steps 60 | --adapter ADAPTER] [--model MODEL] [--write docs/delta.md]

SmolLM2 is exported as it is and with an adapter folded in; the adapter is trained for so many steps on the text that
the demo trains on, or given. Each format's delta is written, applied, and compared with the export byte for byte. The
last rows: the adapter's own folder beside the GGUF file, everything together, the GGUF file of an adapter of random
numbers instead, which moves the minima further than training does, and what else the changed minima could be shipped
as. With --write the table goes between the markers of that page.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from marked_page import put

from qalora.adapter import Adapter, read_adapter, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export_jobs, run_jobs
from qalora.converters.plan import ExportOptions
from qalora.delta import apply_delta, write_delta
from qalora.delta.coding import LEVEL
from qalora.delta.records import Patch
from qalora.demo import demo_text, smollm2_file
from qalora.formats.files import InputFile
from qalora.testing import random_adapter
from qalora.training import TrainOptions, train

FORMATS = ("gguf", "mlx", "qalora", "onnx", "gptq")

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def trained(model: Checkpoint, steps: int, folder: Path) -> Adapter:
    """A rank 16 adapter after so many steps of 4 x 128 tokens."""
    text = folder / "text.txt"
    text.write_text(demo_text(), encoding="utf-8")
    return train(model, TrainOptions(data=str(text), out=folder / "trained", max_steps=steps), lambda step: None)


def untrained(model: Checkpoint) -> Adapter:
    """A random adapter of rank 16 on every linear layer: it moves minima by about a third of a step of the codes."""
    made = random_adapter(model, rank=16, pool_size=None, seed=1, a_size=0.25, b_size=1.0)
    layers = {}
    for module, layer in made.layers.items():
        step = model.tensors[f"{module}.weight"].load_quantized().scale.abs().mean().item()
        layers[module] = replace(layer, b=layer.b * step / 3)
    return replace(made, layers=layers)


def exported(model: Checkpoint, adapter: Adapter | None, folder: Path, formats: Sequence[str], name: str) -> Path:
    """The formats as sub-folders."""
    options = ExportOptions(name=name)
    run_jobs(export_jobs(model, formats, options, adapter=adapter), folder)
    return folder


def row(what: str, base: Path, release: Path, folders: Sequence[str], work: Path) -> str:
    """Write, apply and compare the delta of some sub-folders."""
    for name, source in (("base", base), ("new", release)):
        (work / name).mkdir(parents=True)
        for folder in folders:
            if (source / folder).exists():
                shutil.copytree(source / folder, work / name / folder, copy_function=os.link)
    written = write_delta(work / "base", work / "new", work / "delta")
    done = apply_delta(work / "delta", work / "base", work / "out")
    differ = [name for name in done.files if not filecmp.cmp(work / "out" / name, work / "new" / name, shallow=False)]
    if differ:
        raise SystemExit(f"{what}: {differ} came back otherwise")
    shutil.rmtree(work)
    return line(what, written.made_bytes, written.nbytes)


def line(what: str, release: int, delta: int) -> str:
    """A row of the table."""
    return f"| {what} | {release:,} | {delta:,} | {100 * delta / release:.1f} % |"


def forms(base: Path, release: Path, work: Path) -> list[str]:
    """What the changed columns of the GGUF file come to as they are, and compressed without the base's."""
    written = write_delta(base / "gguf", release / "gguf", work)
    (file,) = (file for file in written.files if file.path.endswith(".gguf"))
    at = plain = packed = 0
    with InputFile(release / "gguf" / file.path) as content:
        for op in file.ops:
            if isinstance(op, Patch):
                blocks = content.tensor(at, op.nbytes).numpy().reshape(op.blocks, op.block)
                plain += op.changed
                packed += len(zlib.compress(np.concatenate([blocks[:, a:b].reshape(-1) for a, b in op.columns]), LEVEL))
            at += op.nbytes
    shutil.rmtree(work)
    sizes = {"`gguf/`, its minima as they are": plain, "`gguf/`, its minima compressed": packed}
    return [
        f"| {what} | {file.nbytes:,} | {size:,} | {100 * size / file.nbytes:.1f} % |" for what, size in sizes.items()
    ]


def table(model: Checkpoint, adapter: Adapter, work: Path) -> list[str]:
    """The table's lines, each printed when it is known."""
    base = exported(model, None, work / "base", FORMATS, "SmolLM2")
    one = exported(model, adapter, work / "one", FORMATS, "SmolLM2 QALoRA")
    write_adapter(adapter, one / "adapter")
    other = exported(model, untrained(model), work / "other", ["gguf"], "SmolLM2 random")
    kinds: list[tuple[str, Path, Path, Sequence[str]]] = [
        *((f"`{name}/`", base, one, [name]) for name in FORMATS),
        ("`gguf/` and `adapter/`", base, one, ["gguf", "adapter"]),
        ("all of these", base, one, [*FORMATS, "adapter"]),
        ("`gguf/`, from another fine-tune", other, one, ["gguf"]),
        ("`gguf/`, random adapter", base, other, ["gguf"]),
    ]
    lines = ["| what | release, bytes | delta, bytes | share |", "|---|---:|---:|---:|"]
    for what, before, after, folders in kinds:
        lines.append(row(what, before, after, folders, work / "row"))
        print(lines[-1], flush=True)
    lines += forms(base, one, work / "forms")
    print(*lines[-2:], sep="\n", flush=True)
    return lines


def main() -> None:
    """Print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of SmolLM2")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the adapter")
    parser.add_argument("--adapter", type=Path, help="fold this one instead of a trained one")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    model = load(arguments.model or str(smollm2_file()))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        given = arguments.adapter
        adapter = trained(model, arguments.steps, work) if given is None else read_adapter(given, model)
        made = "\n".join(table(model, adapter, work))
    if arguments.write is not None:
        put(arguments.write, made, BEGIN, END)


if __name__ == "__main__":
    main()
