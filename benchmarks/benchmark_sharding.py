"""The memory of each of several processes that train on one base: whole in each, and spread over them (`--shard`).

    python benchmarks/benchmark_sharding.py [--shape small] [--layers N] [--processes 2] [--work DIR] [--write PAGE]

A synthetic 4-bit model of the shape (synthetic.py), in groups of 32, is trained for a step, by torchrun on CPUs, with a
thread for each process, and with a C library that gives back what is freed (glibc's MALLOC_MMAP_THRESHOLD_): without
that a peak moves by half from run to run. A row: peak resident memory of a process, the largest of all, without and
with `--shard`, and processor seconds of a process. The last row is of a model that is nearly nothing: libraries, and
what training takes besides the model. With --write the table goes between the markers of that page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_training import memory
from marked_page import put

WAYS = (("--weights", "kept"), ("--weights", "packed"))
SETTINGS = "--max-steps 1 --rank 8 --batch-size 8 --max-length 16 --held-out 0.03 --save-every 0 --force"
TEXT = 2400
"""Bytes to learn from."""
LEAST = "least"
BEGIN, END = "<!-- sharding:begin -->", "<!-- sharding:end -->"


def prepare(work: Path, shape: str, layers: int | None) -> None:
    """Write a model, unless it is there already, and the text."""
    from synthetic import synthetic, write

    from qalora.converters import load
    from qalora.converters.tokenizer import write_tokenizer
    from qalora.demo import demo_text, smollm2_file

    write(synthetic(shape, layers=layers), work / shape)
    write_tokenizer(load(smollm2_file()), work / shape)
    (work / "text.txt").write_text(demo_text()[:TEXT], encoding="utf-8")


def measure(work: Path, shape: str, processes: int, flags: tuple[str, ...]) -> tuple[float, float]:
    """(peak MB, processor seconds) of the process that has most of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["train", str(work / shape), "--data", str(work / "text.txt"), "-o", str(work / "adapter")]
    places = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", "QALORA_MEASURED": str(work)}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *words, *SETTINGS.split(), *flags],
        env={**os.environ, **places},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    taken = [json.loads((work / f"{rank}.json").read_text("utf-8")) for rank in range(processes)]
    return max(one["peak"] for one in taken) / 1e6, max(one["processor"] for one in taken)


def train(work: Path) -> None:
    """The command line of qalora, in one of the processes; leaves what it took."""
    from qalora.cli import main

    try:
        main(standalone_mode=False)
    finally:
        taken = {"peak": memory("VmHWM"), "processor": time.process_time()}
        (work / f"{os.environ['RANK']}.json").write_text(json.dumps(taken), encoding="utf-8")


def main() -> None:
    """Print a table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    lines = [
        "| options | peak MB, whole | peak MB, `--shard` | CPU s, whole | CPU s, `--shard` |",
        "|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as place:
        work = given.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        prepare(work, given.shape, given.layers)
        prepare(work, LEAST, None)
        for shape, flags in (*((given.shape, way) for way in WAYS), (LEAST, WAYS[0])):
            peaks, seconds = zip(
                *(measure(work, shape, given.processes, (*flags, *more)) for more in ((), ("--shard",))), strict=True
            )
            name = " ".join(f"`{flag} {value}`" for flag, value in zip(flags[::2], flags[1::2], strict=True))
            cells = [*(f"{peak:,.0f}" for peak in peaks), *(f"{one:.1f}" for one in seconds)]
            lines.append(f"| {name if shape != LEAST else 'a model of nearly nothing'} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if given.write:
        put(given.write, "\n" + "\n".join(lines) + "\n", BEGIN, END)


if __name__ == "__main__":
    if "QALORA_MEASURED" in os.environ:
        train(Path(os.environ["QALORA_MEASURED"]))
    else:
        main()
