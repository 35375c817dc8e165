"""What is to be seen on a machine with a GPU, in one run of ten minutes at most, as a page of Markdown.

    tools/gpu [--shape 8b] [--layers 4] [--steps 6] [--seconds 570] [--work FOLDER]

1. The tests that are marked cuda.
2. GPTQ of one square layer of the shape, on the CPU and on the GPU: seconds, and codes that differ. Rounding too, whose
   bytes must be the same.
3. Training steps of a model of the shape with fewer layers and random codes, beside PEFT's QA-LoRA, by
   `benchmark_training.py`: tokens a second, and the GPU's memory at its peak.

A part that fails, or for which no time is left, says so in the report; the others go on. `--device cpu --shape tiny`
tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from qalora.checkpoint import LazyTensor
from qalora.tensor import GroupQuantTensor, QuantSpec

sys.path.insert(0, str(Path(__file__).parent))

CONTENDERS = ("qalora-float32", "qalora-bfloat16", "peft-qalora")
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def tests(given: Namespace, left: float) -> list[str]:
    """What pytest says at its end, of the tests marked cuda."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False)
    return ["```text", *done.stdout.splitlines()[-25:], "```"]


def quantizing(given: Namespace, left: float) -> list[str]:
    """A table of both methods."""
    command = [sys.executable, __file__, "--part", "quantizing", "--shape", given.shape, "--device", given.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True)
    return done.stdout.splitlines()


def quantize_both() -> None:
    """Print the table; in a process of its own, so that it can be ended."""
    from synthetic import SHAPES

    from qalora.quantization import QuantizeOptions, quantize_weight

    given = parse()
    size, device = SHAPES[given.shape]["hidden_size"], torch.device(given.device)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=rng) * 0.02
    x = torch.randn(2 * size, size, generator=rng) * torch.logspace(0, -2, size) + 0.1
    moments = x.t() @ x / len(x)
    print(
        f"| [{size}, {size}], 4 bits in groups of 32 | CPU s | {given.device} s | codes that differ | scales, minima |"
    )
    print("|---|---|---|---|---|")
    for method, options in (("rtn", {}), ("gptq", {"passes": 0}), ("gptq, 2 passes", {})):
        chosen = QuantizeOptions(method=method.partition(",")[0], **options)  # type: ignore[arg-type]
        made, seconds = [], []
        for place in (CPU, device):
            quantize_weight(weight[:64].to(place), chosen, moments.to(place))  # kernels are loaded
            began = time.perf_counter()
            made.append(quantize_weight(weight.to(place), chosen, moments.to(place)).to(CPU))
            seconds.append(time.perf_counter() - began)
        one, two = made
        codes = int((one.codes() != two.codes()).sum())
        others = int((one.scale != two.scale).sum()) + int((one.min != two.min).sum())
        print(f"| {method} | {seconds[0]:.2f} | {seconds[1]:.2f} | {codes:,} of {size * size:,} | {others:,} |")


def prepare_model(given: Namespace) -> None:
    """A GPTQ folder of the shape with random codes, and the text, for `benchmark_training`."""
    from benchmark_training import prepare
    from synthetic import synthetic

    from qalora.converters.exports import export
    from qalora.testing import byte_tokenizer

    if not (given.work / "gptq").exists():
        words = given.work / "tokenizer"
        byte_tokenizer().save_pretrained(words)
        model = synthetic(given.shape, layers=given.layers)
        tensors = {name: one if one.spec is None else _symmetric(one) for name, one in model.tensors.items()}
        files = {path.name: path for path in words.iterdir()}
        export(replace(model, path=given.work / given.shape, tensors=tensors, files=files), ["gptq"], given.work)
    prepare(given.work, given.steps)


def _symmetric(source: LazyTensor) -> LazyTensor:
    """A layer of 4 bits with the middle zero point everywhere, which a GPTQ folder holds as it is."""

    def read(start: int, stop: int) -> GroupQuantTensor:
        rows = source.rows(start, stop)
        assert isinstance(rows, GroupQuantTensor)
        return replace(rows, min=-8 * rows.scale)

    spec = QuantSpec(
        bits=4,
        group_size=32,
        zeros="integer",
        scale_dtype=torch.float16,
        min_dtype=torch.float32,
        zero=8,
    )
    return replace(source, spec=spec, read=read)


def training(given: Namespace, left: float) -> list[str]:
    """A row for each contender."""
    from benchmark_training import start, summary

    until = time.monotonic() + left
    prepare_model(given)
    lines = [
        f"{given.layers} layers of the {given.shape} shape, {given.steps} steps of 4 x 128 tokens, rank 8.",
        "",
        "| contender | tokens/s | GPU memory, GB | held-out loss |",
        "|---|---|---|---|",
    ]
    run = Namespace(**{**vars(given), "threads": os.cpu_count() or 1, "rank": 8, "avx2": False})
    for name in CONTENDERS:
        run.seconds = max(1.0, until - time.monotonic())
        try:
            found = start(name, run)
        except (subprocess.SubprocessError, json.JSONDecodeError) as error:
            lines.append(f"| {name} | {type(error).__name__} | | |")
            continue
        row = summary([found])
        loss = f"{row['before']:.3f} -> {row['after']:.3f}"
        lines.append(f"| {name} | {row['tokens_per_second']:.0f} | {found.get('gpu', 0) / 1e9:.1f} | {loss} |")
    return lines


PARTS: dict[str, tuple[Callable[[Namespace, float], list[str]], float]] = {
    "Quantizing": (quantizing, 0.25),
    "Training": (training, 0.6),
    "Tests marked cuda": (tests, 1.0),
}
"""Each part, and the share of the time left that it may take."""


def parse() -> Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=["tiny", "1b", "8b", "70b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="more than two")
    parser.add_argument("--seconds", type=float, default=570, help="of the whole run at most")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qalora-gpu")
    parser.add_argument("--part", choices=["quantizing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the report."""
    given = parse()
    if given.part:
        quantize_both()
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --shape tiny tries the script itself")
    until = time.monotonic() + given.seconds
    given.work.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    print(f"# {name}\n\ntorch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    for title, (part, share) in PARTS.items():
        began = time.monotonic()
        try:
            lines = part(given, max(1.0, share * (until - began)))
        except Exception as error:  # the other parts are to be seen all the same
            lines = [f"Not finished: {type(error).__name__}: {str(error)[:500]}"]
        print(f"\n## {title}\n", *lines, f"\n{time.monotonic() - began:.0f} s", sep="\n", flush=True)


if __name__ == "__main__":
    main()
