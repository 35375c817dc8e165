"""Perplexity of a real model quantized in every way there is here, beside other people's quantizers.

    python benchmarks/quantizer_table.py --work DIR [--cells gptq-3,hqq-2] [--write docs/quantize.md]

SmolLM2-135M-Instruct as its package carries it, dequantized, is the float model; calibration is the head of the
language reference that every Python carries, perplexity is on its tail, which nothing has seen. Each cell is a JSON
file in DIR, so that a run goes on where it stopped; the table is made of those files. Bits per weight count codes,
scale and min of the linear layers. A cell takes one to five minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from marked_page import put
from torch import Tensor

from qalora.calibration import Calibration, calibration_windows, choose_widths, quantize_calibrated
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.first_tokens import first_tokens
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build
from qalora.demo import demo_text, smollm2_file
from qalora.quantization import QuantizeOptions, quantize

WINDOW = 256
CALIBRATION, HELD_OUT = 4096, 4096
GROUPS = {4: 64, 3: 32, 2: 32}
"""Columns of a group at each width; the model's weights were made of 4 bits in groups of 32, which would be no test."""

WIDTHS = tuple(GROUPS)
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """label for the table; made: from model, calibration windows and bits to quantized model and bits per weight."""

    label: str
    made: Callable[[Checkpoint, Tensor, int], tuple[Checkpoint, float]]
    widths: tuple[int, ...] = WIDTHS


def ours(**options: object) -> Callable[[Checkpoint, Tensor, int], tuple[Checkpoint, float]]:
    """One of our methods."""

    def make(model: Checkpoint, windows: Tensor, bits: int) -> tuple[Checkpoint, float]:
        size = GROUPS[bits]
        chosen = QuantizeOptions(bits=bits, group_size=size, **options)  # type: ignore[arg-type]
        if chosen.needs_inputs:
            return quantize_calibrated(model, windows, chosen, requantize=True), bits + 32 / size
        return quantize(model, bits=bits, group_size=size, requantize=True, **options), bits + 32 / size

    return make


def weights_of(model: Checkpoint, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    """The model with each linear weight as `change` makes it of the float one."""

    def lazily(source: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> Tensor:
            return change(source.load_float().float())[start:stop]

        return LazyTensor(name=source.name, shape=source.shape, dtype=torch.float32, read=read)

    changed = {name: lazily(model.tensors[name]) for name in model.linears}
    return replace(model, tensors={**model.tensors, **changed})


def hqq_library(model: Checkpoint, windows: Tensor, bits: int) -> tuple[Checkpoint, float]:
    """The hqq library's own optimiser."""
    from hqq.core.quantize import Quantizer

    def change(weight: Tensor) -> Tensor:
        codes, meta = Quantizer.quantize(
            weight,
            nbits=bits,
            group_size=GROUPS[bits],
            axis=1,
            optimize=True,
            device="cpu",
            compute_dtype=torch.float32,
        )
        return Quantizer.dequantize(codes, meta).view(weight.shape).float()

    return weights_of(model, change), bits + 32 / GROUPS[bits]


def mixed(model: Checkpoint, windows: Tensor, bits: int) -> tuple[Checkpoint, float]:
    """A width for each layer, at the size of `bits` bits everywhere, by the best method."""
    options = QuantizeOptions(group_size=GROUPS[bits], method="gptq")
    found = choose_widths(model, windows, options, bits + 32 / GROUPS[bits], widths=(2, 3, 4, 5))
    return quantize_calibrated(model, windows, found.options, requantize=True), found.bits_per_weight


def unchanged(model: Checkpoint, windows: Tensor, bits: int) -> tuple[Checkpoint, float]:
    """The float model."""
    return model, 32.0


ROWS = {
    "float": Row(label="float model", made=unchanged, widths=(4,)),
    "rtn": Row(label="`rtn`", made=ours(method="rtn")),
    "clip": Row(label="`clip`", made=ours(method="clip")),
    "hqq": Row(label="`hqq`", made=ours(method="hqq")),
    "hqqlib": Row(label="hqq, the library", made=hqq_library),
    "gptq": Row(label="`gptq`, no passes", made=ours(method="gptq", passes=0)),
    "gptqorder": Row(label="`gptq`, no passes, act-order", made=ours(method="gptq", passes=0, act_order=True)),
    "gptq2": Row(label="`gptq`, 2 passes", made=ours(method="gptq", passes=2)),
    "mixed": Row(label="`gptq`, 2 passes, `--bits auto`", made=mixed, widths=(3,)),
    "rtnfit": Row(label="`rtn`, minima fitted", made=ours(method="rtn", fit_minima=True)),
    "clipfit": Row(label="`clip`, minima fitted", made=ours(method="clip", fit_minima=True)),
    "hqqfit": Row(label="`hqq`, minima fitted", made=ours(method="hqq", fit_minima=True)),
    "gptqfit": Row(label="`gptq`, no passes, minima fitted", made=ours(method="gptq", passes=0, fit_minima=True)),
}


@torch.no_grad()
def perplexity(model: Checkpoint, windows: Tensor) -> float:
    """exp of the mean loss over every token of the windows but their first."""
    module = build(model)
    total = 0.0
    for window in windows:
        logits = module(input_ids=window[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.numel() - len(windows)))


def texts(model: Checkpoint, work: Path) -> tuple[Tensor, Tensor]:
    """(calibration windows of the head, held-out windows of the tail)."""
    text = demo_text()
    cut = int(len(text) * 0.95)
    head = work / "head.txt"
    head.write_text(text[:cut], encoding="utf-8")
    tokenizer = load_tokenizer(model)
    ids, first = tokenizer(text[cut:], add_special_tokens=False)["input_ids"], first_tokens(tokenizer)
    own = WINDOW - len(first)
    held = torch.tensor([[*first, *ids[at : at + own]] for at in range(0, HELD_OUT // WINDOW * own, own)])
    return calibration_windows(model, Calibration(data=str(head), tokens=CALIBRATION, length=WINDOW)), held


def run(model: Checkpoint, calibration: Tensor, held: Tensor, name: str, bits: int, work: Path) -> None:
    """Make one cell, unless its file is there."""
    path = work / f"{name}-{bits}.json"
    if path.exists():
        return
    started = time.monotonic()
    made, size = ROWS[name].made(model, calibration, bits)
    cell = {
        "name": name,
        "bits": bits,
        "bits_per_weight": size,
        "perplexity": perplexity(made, held),
        "seconds": round(time.monotonic() - started, 1),
        "calibration_tokens": calibration.numel(),
        "held_out_tokens": held.numel(),
    }
    path.write_text(json.dumps(cell, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{name}-{bits}: {cell['perplexity']:.3f} ({cell['seconds']:.0f} s)", flush=True)


def table(work: Path) -> str:
    """The table as Markdown, of the cells that are there."""
    lines = [
        "| | "
        + " | ".join(f"{n} bits, groups of {size}: {n + 32 / size:g} bits per weight" for n, size in GROUPS.items())
        + " |",
        "|---" * (len(WIDTHS) + 1) + "|",
    ]
    for name, row in ROWS.items():
        found = []
        for bits in WIDTHS:
            path = work / f"{name}-{bits}.json"
            held = json.loads(path.read_text("utf-8")) if path.exists() else None
            found.append("" if held is None else f"{held['perplexity']:,.2f}")
        if any(found):
            lines.append(f"| {row.label} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the cells that are missing, print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the cells are kept")
    parser.add_argument("--cells", help="name-bits, separated by commas; all of them by default")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # foreign libraries' own
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    cells = [f"{name}-{bits}" for bits in WIDTHS for name, row in ROWS.items() if bits in row.widths]
    chosen = cells if arguments.cells is None else [cell for cell in arguments.cells.split(",") if cell]
    if any(not (work / f"{cell}.json").exists() for cell in chosen):
        model = load(smollm2_file())
        calibration, held = texts(model, work)
        for cell in chosen:
            name, _, bits = cell.rpartition("-")
            run(model, calibration, held, name, int(bits), work)
    made = table(work)
    print(made)
    if arguments.write is not None:
        put(arguments.write, made, BEGIN, END)


if __name__ == "__main__":
    main()
