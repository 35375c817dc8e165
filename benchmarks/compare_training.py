"""The paper's comparison, repeated: QA-LoRA folded, QLoRA kept and quantized again, trained scales; 4, 3 and 2 bits.

    python benchmarks/compare_training.py --work DIR [--cells NAME,...] [--jobs 2] [--write docs/training_comparison.md]

SmolLM2-135M-Instruct as its package carries it is quantized by gptq once for each width; every method trains on those
integers, on the same blocks in the same order, each at its best rate of a search with one seed, then with three seeds.
Each cell is a JSON file in DIR, so that a run goes on where it stopped; tables and plot are made of those files.
docs/training_comparison.md says what a cell is; `comparison_plan.py` has the names, `comparison_cells.py` what is
done, `comparison_work.py` how it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison_plan import Cell, parse, ready, wanted

CELL_SECONDS = 1.0
"""Between two looks at what is running."""


def read_cells(work: Path) -> dict[str, Any]:
    """The cells of a folder by name."""
    paths = sorted(path for path in work.glob("*.json") if parse(path.stem))
    return {path.stem: json.loads(path.read_text("utf-8")) for path in paths}


def run_cell(work: Path, name: str) -> dict[str, Any]:
    """Make one cell here, and write its file."""
    import warnings

    from comparison_cells import make
    from comparison_work import Work, write_whole

    warnings.simplefilter("ignore")  # foreign libraries' own
    cell, done = parse(name), read_cells(work)
    if cell is None or not ready(done, cell):
        raise SystemExit(f"{name}: no such cell, or what it is made of is missing")
    found = make(Work(work), cell, done)
    write_whole(work / f"{name}.json", found)
    return found


def start(work: Path, name: str, jobs: int) -> subprocess.Popen[bytes]:
    """A cell in a process of its own; what it says goes to DIR/logs."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if jobs > 1:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", __file__, "--work", str(work), "--cell", name]
    with (logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run_all(work: Path, chosen: list[str] | None, method: str, jobs: int) -> None:
    """Make every cell that is missing, `jobs` at once. SystemExit where one fails, after those that run have ended."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    while True:
        done = read_cells(work)
        missing = wanted(done, method) if chosen is None else missing_of(chosen, done)
        able = [cell.name for cell in map(parse, missing) if cell is not None and ready(done, cell)]
        able = [] if failed else [name for name in able if name not in running]
        for name in able[: jobs - len(running)]:
            running[name] = start(work, name, jobs)
        if not running:
            break
        time.sleep(CELL_SECONDS)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if running.pop(name).returncode:
                failed.append(name)
            else:
                report(work, name)
    if failed:
        raise SystemExit(f"failed, see {work / 'logs'}: {', '.join(failed)}")
    if missing:
        raise SystemExit(f"not made, as what they are made of is missing: {', '.join(missing)}")


def missing_of(chosen: list[str], done: dict[str, Any]) -> list[str]:
    """The chosen cells that are not there, and before them the bases that they need."""
    cells: list[Cell] = []
    for name in chosen:
        cell = parse(name)
        if cell is None:
            raise SystemExit(f"{name}: no such cell")
        cells.append(cell)
    bases = [f"base-{cell.base}" for cell in cells if cell.base]
    return [name for name in dict.fromkeys([*bases, *chosen]) if name not in done]


def report(work: Path, name: str) -> None:
    """Say that a cell is there."""
    cell = json.loads((work / f"{name}.json").read_text("utf-8"))
    value = "failed" if cell["perplexity"] is None else f"{cell['perplexity']:.3f}"
    seconds = f" ({cell['seconds']:.0f} s)" if "seconds" in cell else ""
    print(f"{name}: {value}{seconds}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Make the cells that are missing, print the tables, and put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the cells are kept")
    parser.add_argument("--cells", help="names, separated by commas; all of them by default; none: --cells=")
    parser.add_argument("--base", choices=["gptq", "rtn"], default="gptq", help="how the bases are quantized")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once; above 1 each has one thread")
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced, with the plot beside it")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--protocol", type=json.loads, default={}, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cell:
        run_cell(given.work, given.cell)
        return
    chosen = None if given.cells is None else [name for name in given.cells.split(",") if name]
    if chosen is None or chosen:
        from comparison_work import Protocol, prepare

        protocol = replace(Protocol(), **given.protocol, **({"steps": given.steps} if given.steps else {}))
        prepare(given.work, protocol)
        run_all(given.work, chosen, given.base, given.jobs)
    from comparison_page import write_page, written

    done = read_cells(given.work)
    print(written(done, given.base))
    if given.write is not None:
        write_page(given.write, done, given.base)


if __name__ == "__main__":
    main()
