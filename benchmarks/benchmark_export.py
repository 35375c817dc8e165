"""How fast, and in how much memory, a checkpoint larger than its layers is exported and compared; beside plain copies.

    python benchmarks/benchmark_export.py [--work DIR] [--shape 1b] [--formats gptq gguf onnx] [--runs 3]

For each format a process of its own exports a synthetic checkpoint (synthetic.py) and reports seconds, its processor's
seconds, and its peak resident memory; the bytes are on the disk then. The files it wrote are copied, by reading and
writing 8 MB at a time, and then brought onto the disk too. Another process compares the weights with the checkpoint's,
as `verify --level weights` does, beside plain reading of both. All begin with the source in the page cache. The ratios
of the medians are the figures to quote; those of the processor's seconds depend least on what else a machine does. Then
one 4096x4096 layer of 4 bits is repacked in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

FORMATS = ("gptq", "gguf", "onnx", "openvino", "transformersjs", "mlx", "hqq", "torchao", "mnn", "qalora")
CHUNK = 8 << 20

Times = dict[str, float]


def timed(job: Callable[[], object]) -> Times:
    """Seconds that a job takes, and seconds of the processor, in all threads."""
    begin, used = time.perf_counter(), os.times()
    job()
    now = os.times()
    return {"s": time.perf_counter() - begin, "cpu": now.user - used.user + now.system - used.system}


def export_once(source: Path, target: str, out: Path) -> Times:
    """Export to `out`. Modules are imported before, as any command does."""
    from qalora import converters
    from qalora.converters.exports import export

    model, _ = converters.load(source), converters.target(target)
    return timed(lambda: export(model, [target], out))


def compare_once(source: Path, target: str, out: Path) -> Times:
    """Compare the weights in `out` with the source's."""
    from qalora.converters import load
    from qalora.parity.artifacts import open_artifact, recognize
    from qalora.parity.weights import WeightMetrics, compare_weights

    metrics: list[WeightMetrics] = []

    def compare() -> None:
        for artifact in recognize([out / target]):
            residual = artifact.layout.residual
            metrics.append(compare_weights(open_artifact(artifact), load(source), residual=residual))

    times = timed(compare)
    for one in metrics:
        if one.different or one.missing or one.shapes:
            raise SystemExit(f"{target}: the weights differ: {one.total}")
    return times


CHILDREN = {"export": export_once, "compare": compare_once}


def in_child(work: str, source: Path, target: str, out: Path) -> Times:
    """What one of CHILDREN gives in a process of its own, with that process's peak memory in bytes."""
    command = [sys.executable, __file__, "--child", work, "--formats", target, "--work", str(source), "--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: Times = json.loads(done.stdout.splitlines()[-1])
    return result


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def copy(source: Path, out: Path) -> None:
    """Copy every file below a folder."""
    for path in files_in(source):
        place = out / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, place.open("wb") as write:
            while chunk := read.read(CHUNK):
                write.write(chunk)


def bring_to_disk(folder: Path) -> None:
    """Wait until every file below a folder is on the disk."""
    for path in files_in(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read(*folders: Path) -> None:
    """Read every file below folders."""
    buffer = bytearray(CHUNK)
    for folder in folders:
        for path in files_in(folder):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def measure(source: Path, target: str, work: Path, runs: int) -> dict[str, Times]:
    """Medians over the runs of each kind of work, in turn; the largest peak; bytes."""
    times: dict[str, list[Times]] = {}
    out, twin, size = work / "out", work / "twin", 0
    for _ in range(runs):
        os.sync()
        jobs: Mapping[str, Callable[[], Times]] = {
            "export": lambda: in_child("export", source, target, out),
            "copy": lambda: timed(lambda: copy(out, twin)),
            "disk": lambda: timed(lambda: bring_to_disk(twin)),
            "compare": lambda: in_child("compare", source, target, out),
            "read": lambda: timed(lambda: read(source, out)),
        }
        for name, job in jobs.items():
            times.setdefault(name, []).append(job())
        size = sum(path.stat().st_size for path in files_in(out))
        shutil.rmtree(out)
        shutil.rmtree(twin)
    medians = {name: _medians(several) for name, several in times.items()}
    return {**medians, "bytes": {"n": float(size)}}


def _medians(times: Sequence[Times]) -> Times:
    middle = {key: statistics.median(one[key] for one in times) for key in ("s", "cpu")}
    return {**middle, "peak": max(one.get("peak", 0.0) for one in times)}


def layer_times(runs: int = 15) -> list[tuple[str, float]]:
    """Milliseconds to bring a 4096x4096 layer of 4 bits into each format's bytes, and to copy it."""
    from qalora.formats import gguf_blocks, gptq, hqq
    from qalora.testing import random_tensor

    tensor = random_tensor(4096, 4096, bits=4, group_size=32)
    jobs: list[tuple[str, Callable[[], object]]] = [
        ("plain copy", lambda: tensor.packed.clone()),
        ("GPTQ words", lambda: gptq.pack_qweight(tensor.packed)),
        ("Q4_1 blocks", lambda: gguf_blocks.encode(tensor, "Q4_1")),
        ("HQQ groups", lambda: hqq.pack_groups(tensor.packed, 32, 4)),
    ]
    return [(name, 1e3 * statistics.median(timed(job)["s"] for _ in range(runs))) for name, job in jobs]


def print_exports(rows: Mapping[str, Mapping[str, Times]]) -> None:
    """The table of exports: seconds and the processor's, of an export and a copy, and the ratios."""
    print(f"{'export':8} {'GB':>5} {'s':>6} {'copy s':>7} {'ratio':>6} {'on disk':>8} {'ratio':>6}", end="")
    print(f" {'cpu s':>6} {'copy':>6} {'ratio':>6} {'peak MB':>8}")
    for target, row in rows.items():
        own, plain = row["export"], row["copy"]
        durable = plain["s"] + row["disk"]["s"]
        print(f"{target:8} {row['bytes']['n'] / 1e9:5.2f} {own['s']:6.2f} {plain['s']:7.2f}", end="")
        print(f" {own['s'] / plain['s']:6.2f} {durable:8.2f} {own['s'] / durable:6.2f}", end="")
        print(f" {own['cpu']:6.2f} {plain['cpu']:6.2f} {own['cpu'] / plain['cpu']:6.2f} {own['peak'] / 1e6:8.0f}")


def print_comparisons(rows: Mapping[str, Mapping[str, Times]]) -> None:
    """The table of comparisons, beside plain reading of both sides."""
    print(f"{'weights':8} {'s':>6} {'read s':>7} {'ratio':>6} {'cpu s':>6} {'read':>6} {'ratio':>6} {'peak MB':>8}")
    for target, row in rows.items():
        own, plain = row["compare"], row["read"]
        print(f"{target:8} {own['s']:6.2f} {plain['s']:7.2f} {own['s'] / plain['s']:6.2f}", end="")
        print(f" {own['cpu']:6.2f} {plain['cpu']:6.2f} {own['cpu'] / plain['cpu']:6.2f} {own['peak'] / 1e6:8.0f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qalora-benchmark")
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        result = CHILDREN[given.child](given.work, given.formats[0], given.out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**result, "peak": peak}))
        return
    import synthetic

    source = given.work / f"{given.shape}-source"
    given.work.mkdir(parents=True, exist_ok=True)
    synthetic.write(synthetic.synthetic(given.shape), source)
    rows = {target: measure(source, target, given.work, given.runs) for target in given.formats}
    print_exports(rows)
    print()
    print_comparisons(rows)
    print()
    for name, milliseconds in layer_times():
        print(f"4096x4096, 4 bits, {name:12} {milliseconds:7.2f} ms")


if __name__ == "__main__":
    main()
