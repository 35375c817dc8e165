"""How fast, and in how much memory, a checkpoint larger than its layers is exported; beside a plain copy.

    python benchmarks/benchmark_export.py [--work DIR] [--shape 1b] [--formats gptq gguf onnx] [--runs 3]

For each format a process of its own exports a synthetic checkpoint (synthetic.py) and reports its peak resident
memory; then the files it wrote are copied, by reading and writing 8 MB at a time. Both begin with the source in the
page cache. The ratio of the medians is the figure to quote. Then one 4096x4096 layer of 4 bits is repacked in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FORMATS = ("gptq", "gguf", "onnx", "qalora")


def child(source: Path, target: str, out: Path) -> None:
    """Export once and print seconds, bytes and peak memory as JSON."""
    from qalora.converters import load
    from qalora.converters.exports import export

    begin = time.perf_counter()
    export(load(source), [target], out)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def copy(source: Path, out: Path) -> float:
    """Copy every file below a folder; gives the seconds."""
    begin = time.perf_counter()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = out / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, place.open("wb") as write:
            while chunk := read.read(8 << 20):
                write.write(chunk)
    return time.perf_counter() - begin


def measure(source: Path, target: str, work: Path, runs: int) -> dict[str, float]:
    """Medians over the runs, export and copy in turn."""
    exports, copies, peaks, size = [], [], [], 0
    for _ in range(runs):
        out, copied = work / "out", work / "copied"
        done = subprocess.run(
            [sys.executable, __file__, "--child", target, "--work", str(source), "--out", str(out)],
            check=True,
            stdout=subprocess.PIPE,
        )
        result = json.loads(done.stdout.splitlines()[-1])
        exports.append(result["seconds"])
        peaks.append(result["peak"])
        copies.append(copy(out, copied))
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        shutil.rmtree(copied)
    seconds, plain = statistics.median(exports), statistics.median(copies)
    return {"bytes": size, "seconds": seconds, "copy": plain, "peak": max(peaks)}


def layer_times(runs: int = 15) -> list[tuple[str, float]]:
    """Milliseconds to bring a 4096x4096 layer of 4 bits into each format's bytes, and to copy it."""
    from qalora.formats import gguf_blocks, gptq
    from qalora.testing import random_tensor

    tensor = random_tensor(4096, 4096, bits=4, group_size=32)
    jobs: list[tuple[str, Callable[[], object]]] = [
        ("plain copy", lambda: tensor.packed.clone()),
        ("GPTQ words", lambda: gptq.pack_qweight(tensor.packed)),
        ("Q4_1 blocks", lambda: gguf_blocks.encode(tensor, "Q4_1")),
    ]
    rows = []
    for name, job in jobs:
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            job()
            times.append(1e3 * (time.perf_counter() - begin))
        rows.append((name, statistics.median(times)))
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qalora-benchmark")
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.work, given.child, given.out)
        return
    import synthetic

    source = given.work / f"{given.shape}-source"
    given.work.mkdir(parents=True, exist_ok=True)
    synthetic.write(synthetic.synthetic(given.shape), source)
    print(f"{'format':8} {'GB':>6} {'s':>6} {'GB/s':>6} {'copy s':>7} {'ratio':>6} {'peak MB':>8}")
    for target in given.formats:
        row = measure(source, target, given.work, given.runs)
        print(
            f"{target:8} {row['bytes'] / 1e9:6.2f} {row['seconds']:6.2f} {row['bytes'] / row['seconds'] / 1e9:6.2f}"
            f" {row['copy']:7.2f} {row['seconds'] / row['copy']:6.2f} {row['peak'] / 1e6:8.0f}"
        )
    print()
    for name, milliseconds in layer_times():
        print(f"4096x4096, 4 bits, {name:12} {milliseconds:7.2f} ms")


if __name__ == "__main__":
    main()
