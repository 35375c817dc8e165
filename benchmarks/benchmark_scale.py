"""What each command takes on a large model: seconds, peak memory, and the ratio to a plain copy of the same bytes.

    python benchmarks/benchmark_scale.py [--shape 8b] [--work DIR] [--threads 2] [--only NAME ...] [--write PAGE]

A synthetic float checkpoint of the shape (synthetic.py: real shapes, random weights, a real tokenizer) goes through
every command, each in a process of its own, one after another on the base and the adapter that those before made:
quantize, train (one step), export to each format with the adapter folded in, verify (weights; logits on 64 tokens),
release, check. What searches or calibrates works on two of the layers; its seconds are those of two, and times the
layers in brackets. An export is deleted when it has been verified, the float checkpoint when it is quantized. With
--work the folder stays, and another run there goes on: it makes what is missing, measures what --only names, and the
table has the last row of each command.

A row: seconds (wall clock); seconds for a billion weights; processor seconds; peak resident memory of the process;
bytes written; and, where a command moves bytes, the ratio to copying what it wrote, 8 MB at a time, right after it.
The 70B shape is planned only, from files with holes in place of tensors; and one decoder layer of its widths, with a
small vocabulary, goes through each writer and is compared with what was written. With --write the table goes between
the markers of that page.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark_export import bring_to_disk, copy
from marked_page import put
from synthetic import config_of, floats, synthetic, write, write_floats, write_hollow

from qalora.checkpoint import Checkpoint

FEW_TOKENS = 1024
"""The vocabulary beside one layer."""

SLOW = 2
"""Layers of what searches or calibrates."""

FORMATS = ("qalora", "gptq", "gguf", "onnx", "openvino", "transformersjs", "mlx", "hqq", "torchao", "mnn")
REFUSED = {"8b": ("transformersjs",), "70b": ("transformersjs",)}
"""Formats that a whole shape does not go into: a file of a page has 2 GB at most, and these output layers have more."""

TEXT = "tokens of a text to learn from, one after another, again and again, "
BEGIN, END = "<!-- scale-{}:begin -->", "<!-- scale-{}:end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a command took. layers: how many times as many layers the whole model has; copied: seconds of the copy."""

    name: str
    seconds: float
    processor: float
    peak: int
    written: int = 0
    copied: float = 0.0
    times: float = 1.0
    weights: float = 0.0

    def line(self) -> str:
        """The row of the table."""
        whole = self.seconds * self.times
        seconds = f"{self.seconds:.1f}" + (f" ({whole:.0f})" if self.times > 1 else "")
        cells = [
            self.name,
            seconds,
            f"{whole / self.weights:.2f}" if self.weights else "",
            f"{self.processor:.1f}",
            f"{self.peak / 1e6:,.0f}",
            f"{self.written / 1e9:.2f}" if self.written else "",
            f"{self.seconds / self.copied:.2f}" if self.copied else "",
        ]
        return "| " + " | ".join(cells) + " |"


class Bench:
    """Runs commands in a folder, and keeps what they took there, in rows.json."""

    def __init__(self, work: Path, threads: int, only: Sequence[str], weights: float) -> None:
        self.work, self.only, self.weights = work, only, weights
        self._kept = work / "rows.json"
        before = json.loads(self._kept.read_text("utf-8")) if self._kept.exists() else []
        self.rows = {row["name"]: Row(**row) for row in before}
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}

    def run(self, name: str, words: Sequence[object], out: Path | None = None, times: float = 1.0) -> None:
        """Run a command, and copy what it wrote to `out`. A command that fails ends everything, with its words."""
        start = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            line = [sys.executable, "-m", "qalora", *map(str, words)]
            process = subprocess.Popen(line, env=self.environment, stdout=said, stderr=said)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            if os.waitstatus_to_exitcode(status) != 0:
                said.seek(0)
                raise SystemExit(f"{' '.join(line)}\n{said.read().decode()[-3000:]}")
        files = [path for path in out.rglob("*") if path.is_file()] if out is not None else []
        written = sum(path.stat().st_size for path in files)
        copied = 0.0
        if out is not None:
            copied = self._copied(out)
        row = Row(
            name=name,
            seconds=seconds,
            processor=used.ru_utime + used.ru_stime,
            peak=used.ru_maxrss * 1024,
            written=written,
            copied=copied,
            times=times,
            weights=self.weights,
        )
        self.rows[name] = row
        self._kept.write_text(json.dumps([asdict(row) for row in self.rows.values()], indent=1), encoding="utf-8")
        print(row.line(), flush=True)

    def _copied(self, out: Path) -> float:
        """Seconds that a copy takes until it is on the disk, as an output is."""
        place = self.work / "copied"
        start = time.perf_counter()
        copy(out, place)
        bring_to_disk(place)
        seconds = time.perf_counter() - start
        shutil.rmtree(place)
        return seconds

    def asked(self, name: str) -> bool:
        """Whether a step is to be run."""
        return not self.only or any(name.startswith(one) for one in self.only)


def weights_of(shape: str) -> float:
    """Billions of weights of a shape."""
    return billions(synthetic(shape))


def billions(model: Checkpoint) -> float:
    """Billions of weights."""
    return sum(math.prod(lazy.shape) for lazy in model.tensors.values()) / 1e9


def whole_story(bench: Bench, shape: str) -> None:
    """Every command on the whole model."""
    work = bench.work
    base, adapter = work / "base", work / "adapter"
    (work / "text.txt").write_text(TEXT * 2000, encoding="utf-8")
    if not base.exists():
        write_floats(floats(shape), work / "floats")
        bench.run("quantize, rtn", ("quantize", work / "floats", "-o", base), base)
        shutil.rmtree(work / "floats")
    if not adapter.exists():
        words = ("--max-steps", 1, "--batch-size", 1, "--max-length", 512, "--rank", 16, "--start", "uniform")
        memory = ("--weights", "packed", "--gradient-checkpointing", "--dtype", "bfloat16", "--save-every", 0)
        line = ("train", base, "--data", work / "text.txt", "-o", adapter, *words, *memory)
        bench.run("train, a step of 512 tokens", line)
    for target in FORMATS:
        out = work / "dist" / target
        if target in REFUSED.get(shape, ()):
            continue
        if bench.asked(f"export {target}"):
            line = ("export", base, "--adapter", adapter, "--to", target, "-o", work / "dist")
            bench.run(f"export {target}", line, out)
            prove = ("verify", base, out, "--adapter", adapter, "--level")
            bench.run(f"verify {target}, weights", (*prove, "weights"))
            if target in ("gguf", "onnx"):
                line = (*prove, "logits", "--max-tokens", 64, "--allow-unproven")
                bench.run(f"verify {target}, logits of 64 tokens", line)
            shutil.rmtree(work / "dist")
    if bench.asked("release"):
        line = ("release", base, "--adapter", adapter, "--to", "gguf", "--level", "weights", "-o", work / "release")
        bench.run("release gguf, proven by weights", line, work / "release")
        bench.run("check", ("check", work / "release"))
        shutil.rmtree(work / "release")


def slow_methods(bench: Bench, shape: str) -> None:
    """What searches or calibrates, on two layers."""
    few = bench.work / "few"
    write_floats(floats(shape, layers=SLOW), few)
    times = config_of(shape, None)["num_hidden_layers"] / SLOW
    calibration = ("--calibration", bench.work / "text.txt", "--calibration-tokens", 8192)
    for name, words in {"clip": (), "hqq": (), "gptq": calibration}.items():
        if bench.asked(f"quantize, {name}"):
            out = bench.work / name
            bench.run(
                f"quantize, {name}, 2 layers", ("quantize", few, "-o", out, "--method", name, *words), times=times
            )
            shutil.rmtree(out)


def plans(bench: Bench, shape: str) -> None:
    """Plans only, of checkpoints with holes in place of their tensors."""
    write_hollow(floats(shape), bench.work / "floats")
    write_hollow(synthetic(shape), bench.work / "base")
    bench.run("quantize --dry-run", ("quantize", bench.work / "floats", "-o", bench.work / "out", "--dry-run"))
    for target in FORMATS:
        if target in REFUSED.get(shape, ()):
            continue
        line = ("export", bench.work / "base", "--to", target, "-o", bench.work / "out", "--dry-run")
        bench.run(f"export {target} --dry-run", line)


def one_layer(bench: Bench, shape: str) -> None:
    """One decoder layer of the shape's widths through each writer, and its weights compared."""
    model, whole = synthetic(shape, layers=1, vocabulary=FEW_TOKENS), bench.weights
    bench.weights = billions(model)
    base, dist = bench.work / "layer", bench.work / "dist"
    write(model, base)
    for target in FORMATS:
        if bench.asked(f"export {target}"):
            bench.run(f"export {target}, 1 layer", ("export", base, "--to", target, "-o", dist), dist / target)
            prove = ("verify", base, dist / target, "--level", "weights")
            bench.run(f"verify {target}, weights of 1 layer", prove)
            shutil.rmtree(dist)
    shutil.rmtree(base)
    bench.weights = whole


def main() -> None:
    """Run all, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=("1b", "8b", "70b"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--write", type=Path)
    chosen = parser.parse_args()
    with ExitStack() as stack:
        folder = chosen.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, chosen.threads, chosen.only, weights_of(chosen.shape))
        head = "| command | seconds | seconds for 10^9 weights | CPU seconds | peak MB | GB written | ratio to a copy |"
        print(f"{head}\n|---|---:|---:|---:|---:|---:|---:|")
        if chosen.shape == "70b":
            plans(bench, chosen.shape)
            one_layer(bench, chosen.shape)
        else:
            whole_story(bench, chosen.shape)
            slow_methods(bench, chosen.shape)
    if chosen.write is not None:
        rows = "\n".join(row.line() for row in bench.rows.values())
        text = f"\n{head}\n|---|---:|---:|---:|---:|---:|---:|\n{rows}\n"
        put(chosen.write, text, BEGIN.format(chosen.shape), END.format(chosen.shape))


if __name__ == "__main__":
    main()
