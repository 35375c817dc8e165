"""How fast ONNX Runtime runs a graph, and in how much memory: forms of one model beside each other, in one run.

    python benchmarks/benchmark_onnx.py [FOLDER ...] [--rounds 5] [--threads 1]

Without folders, SmolLM2-135M is exported with its embedding as float32 and as codes, and both graphs of each are run.
A folder is one with model.onnx. Each runs in a process of its own, `--rounds` times in turn, so that what else the
machine does meets all of them. A row: bytes of the graph and its data; seconds to load; the peak of resident memory,
and what of it is not the mapped file; the least milliseconds of a step after 32 tokens, of a prompt of 16 tokens, and
of one of 128; and the ratio of each to the first row's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_training import memory

PROMPTS, BEFORE = (16, 128), 32


def least(session: Any, feed: dict[str, Any], times: int) -> float:
    """Milliseconds of the fastest run."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        session.run(["logits"], feed)
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def feed_of(session: Any, tokens: int, before: int) -> dict[str, Any]:
    """`tokens` new ones behind a cache of `before`."""
    feed: dict[str, Any] = {
        "input_ids": np.arange(1, tokens + 1, dtype=np.int64)[None],
        "attention_mask": np.ones((1, before + tokens), dtype=np.int64),
    }
    for node in session.get_inputs():
        if node.name.startswith("past"):
            shape = (1, node.shape[1], before, node.shape[3])
            feed[node.name] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return feed


def measure(folder: Path, threads: int) -> dict[str, float]:
    """One process's figures."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = {"load": time.perf_counter() - start, "peak": memory("VmHWM"), "own": memory("RssAnon")}
    found["step"] = least(session, feed_of(session, 1, BEFORE), 20)
    for tokens in PROMPTS:
        found[f"prompt {tokens}"] = least(session, feed_of(session, tokens, 0), 5)
    return found


def size(folder: Path) -> int:
    """Bytes of the graph, and of the data that it names."""
    import onnx

    graph = folder / "model.onnx"
    items = onnx.load(graph, load_external_data=False).graph.initializer
    names = {entry.value for item in items for entry in item.external_data if entry.key == "location"}
    return sum(path.stat().st_size for path in (graph, *(folder / name for name in names)))


def exported(work: Path) -> dict[str, Path]:
    """SmolLM2's folders, by what they are called."""
    from qalora.converters import load
    from qalora.converters.exports import export
    from qalora.converters.plan import ExportOptions
    from qalora.demo import smollm2_file

    places = {}
    for form in ("float32", "quantized"):
        export(load(smollm2_file()), ["onnx"], work / form, ExportOptions(onnx_embedding=form))
        places[f"fast, embedding {form}"] = work / form / "onnx"
        places[f"portable, embedding {form}"] = work / form / "onnx" / "portable"
    return places


def main() -> None:
    """Measure in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.folders[0], chosen.threads)))
        return
    with tempfile.TemporaryDirectory() as work:
        places = {str(folder): folder for folder in chosen.folders} or exported(Path(work))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in places}
        for _ in range(chosen.rounds):
            for name, folder in places.items():
                line = [sys.executable, __file__, str(folder), "--one", "--threads", str(chosen.threads)]
                runs[name].append(json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout))
        table({name: best(found) for name, found in runs.items()}, {name: size(path) for name, path in places.items()})


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    """The least of each figure."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def table(rows: dict[str, dict[str, float]], sizes: dict[str, int]) -> None:
    """Print it; the ratio to the first row in brackets."""
    first = next(iter(rows.values()))
    timed = ["step", *(f"prompt {tokens}" for tokens in PROMPTS)]
    print("| graph | MB | load, s | peak MB | own MB | " + " | ".join(f"{name}, ms" for name in timed) + " |")
    print("|---|" + "---|" * (4 + len(timed)))
    for name, row in rows.items():
        times = [f"{row[key]:.1f} ({row[key] / first[key]:.2f})" for key in timed]
        head = f"{sizes[name] / 1e6:.1f} | {row['load']:.2f} | {row['peak'] / 1e6:.0f} | {row['own'] / 1e6:.0f}"
        print(f"| {name} | {head} | " + " | ".join(times) + " |")


if __name__ == "__main__":
    main()
