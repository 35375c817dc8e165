#!/usr/bin/env python
"""Damage everything that qalora reads, guided by coverage (atheris): `tools/fuzz` sets up and calls this.

An input passes if it is read, or refused by one InputError of one line. Any other exception is a finding, and so is an
input that takes more than 10 seconds of a processor, or more than 1 GiB of addresses beyond what the process has.

An input is one byte, which says the file of an example (tests/support/readable.py) that is damaged, and its content.
All are made by qalora's own writers. Each target runs in a process forked from this one, which has imported qalora
with its branches counted.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

if TYPE_CHECKING:
    from readable import Example

SECONDS = 10
MEMORY = 1 << 30
UNCOUNTED = ("qalora.__main__", "qalora.fused.kernel")
"""Modules that are not imported: one runs the command line, one wants a GPU's compiler."""

COUNTS = struct.Struct("<QQQ")
"""Inputs, those that were refused, and findings: what a target's process tells this one as it goes."""


class TooLong(BaseException):
    """An input took more than SECONDS of a processor. No `except Exception` stops it."""


@dataclass
class Target:
    """An example and what became of it; `place` has its findings, `corpus` the inputs that are worth keeping."""

    name: str
    example: Example
    files: tuple[str, ...]
    place: Path
    corpus: Path
    counts: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, COUNTS.size))
    processor: float = 0.0
    covered: int = 0

    def seeds(self) -> Iterator[bytes]:
        """The valid files, as inputs."""
        for n, name in enumerate(self.files):
            yield bytes([n]) + (self.example.folder / name).read_bytes()

    def count(self, *, refused: bool = False, found: bool = False) -> None:
        """One more input."""
        inputs, before, findings = COUNTS.unpack(self.counts[:])
        self.counts[:] = COUNTS.pack(inputs + 1, before + refused, findings + found)

    def findings(self) -> list[Path]:
        """What was found, one file of a kind."""
        return sorted(path for path in self.place.glob("*") if path.suffix != ".txt")


class Reader:
    """Reads an input in a copy of an example."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder / "example"
        shutil.copytree(target.example.folder, self._folder)
        self._good = {name: (self._folder / name).read_bytes() for name in target.files}
        self._last = target.files[0]

    def read(self, data: bytes) -> None:
        """Read and inspect the example with the input in it; raises what that raises."""
        from qalora.errors import InputError

        name = self._target.files[data[0] % len(self._good)] if data else self._last
        for path, content in ((self._last, self._good[self._last]), (name, data[1:])):
            (self._folder / path).write_bytes(content)
        self._last = name
        example = self._target.example
        example.mend(self._folder, name)
        refused = None
        for step in (example.read, example.inspected):
            try:
                step(self._folder)
            except InputError as error:
                assert "\n" not in str(error), f"a sentence of more than one line: {error}"
                refused = error
        if refused is not None:
            raise refused


@contextmanager
def limited() -> Iterator[None]:
    """Whatever runs in here has SECONDS of a processor."""

    def stop(number: int, frame: object) -> None:
        raise TooLong(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory() -> None:
    """Give this process MEMORY more addresses than it has."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def kind_of(error: BaseException) -> str:
    """What two findings of one fault have in common: the type, and the last line of qalora's that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}qalora{os.sep}" in frame.filename] or frames
    last = ours[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} in {last.name}"


def save_finding(target: Target, data: bytes, kind: str, text: str) -> bool:
    """Keep the smallest input of a kind beside what it does; whether the kind is new."""
    name = f"{target.name}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    path = target.place / name
    new = not path.exists()
    if new or len(data) < path.stat().st_size:
        path.write_bytes(data)
        command = f"tools/fuzz --target {target.name} --replay {path}"
        path.with_suffix(".txt").write_text(f"{kind}\n{command}\n\n{text}", encoding="utf-8", errors="backslashreplace")
    return new


def fuzz(target: Target, end: float, folder: Path) -> None:
    """Run a target in this process, which does not come back: it leaves at `end` without what libraries do at an exit,
    which waits in a fork for threads that it does not have.
    """
    from damage import damaged
    from qalora.errors import InputError

    reader = Reader(target, folder)
    seeds = list(target.seeds())

    def one(data: bytes) -> None:
        refused = found = False
        if time.monotonic() > end:
            os._exit(0)
        try:
            with limited():
                reader.read(data)
        except InputError:
            refused = True
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found = save_finding(target, data, kind_of(error), traceback.format_exc())
        target.count(refused=refused, found=found)

    def mutated(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if len(data) < 2 or rng.random() < 0.2:
            data = rng.choice(seeds)
        if rng.random() < 0.2:
            return bytes(data[:1] + atheris.Mutate(data[1:], size - 1))[:size]
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = data[:1] + damaged(data[1:], target.files[data[0] % len(target.files)], rng)
        return bytes(data)[:size]

    limit_memory()
    options = {
        "max_len": 2 * max(map(len, seeds)),
        "timeout": 6 * SECONDS,  # of what no signal of ours can end
        "report_slow_units": 6 * SECONDS,
        "rss_limit_mb": 0,  # the limit is on addresses
        "artifact_prefix": f"{folder}/",
        "reload": 0,
    }
    words = [sys.argv[0], str(target.corpus), *(f"-{key}={value}" for key, value in options.items())]
    atheris.Setup(words, one, custom_mutator=mutated)
    atheris.Fuzz()


class Running:
    """A process that fuzzes a target until an end, begun again where an input kills it."""

    def __init__(self, target: Target, seconds: float, log: Path) -> None:
        self.target, self.log = target, log
        self.end = time.monotonic() + seconds
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_quick()))
        self._begin()

    def _begin(self) -> None:
        self.started = time.monotonic()
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                end = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(end, 1)
                os.dup2(end, 2)
                fuzz(self.target, self.end, self._folder)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def over(self) -> bool:
        """Whether its time is up; begins again after a death."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return False
        target = self.target
        target.processor += used.ru_utime + used.ru_stime
        text = self.log.read_text("utf-8", "replace")
        target.covered = max([target.covered, *map(int, re.findall(r" cov: (\d+)", text))])
        for path in self._folder.glob("*-*"):  # what libFuzzer writes when a process dies
            if path.is_file():
                kind = path.name.partition("-")[0]
                save_finding(target, path.read_bytes(), f"the process ended: {kind}", text[-4000:])
        if os.waitstatus_to_exitcode(status) and time.monotonic() + 5 < self.end:
            if time.monotonic() - self.started < 2:
                raise SystemExit(f"{target.name}: its process ends at once; see {self.log}")
            self._begin()
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True


def _quick() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def import_counted() -> None:
    """Import all of qalora with its branches counted."""
    import torch  # noqa: F401  not counted, and its import is far slower inside

    with atheris.instrument_imports(include=["qalora"]):
        import qalora

        for found in pkgutil.walk_packages(qalora.__path__, "qalora."):
            if found.name not in UNCOUNTED:
                __import__(found.name)


def targets(work: Path, corpus: Path, chosen: Sequence[str]) -> list[Target]:
    """The targets of these names, all where there is none, with their examples made."""
    from readable import FILES, examples

    if unknown := set(chosen) - set(FILES):
        raise SystemExit(f"--target: expected one of {', '.join(FILES)}, got {', '.join(sorted(unknown))}")
    place = work / "examples"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    made = examples(place)
    found = []
    for name in chosen or FILES:
        target = Target(name, made[name], FILES[name], work / "findings" / name, corpus / name)
        for folder in (target.place, target.corpus):
            folder.mkdir(parents=True, exist_ok=True)
        target.example.read(target.example.folder)  # once here: a fork has imported what it needs
        target.example.inspected(target.example.folder)
        for seed in target.seeds():
            (target.corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
        found.append(target)
    return found


def run(all_targets: Sequence[Target], *, minutes: float, jobs: int, logs: Path) -> None:
    """Fuzz every target for its share of the time, `jobs` at once."""
    logs.mkdir(parents=True, exist_ok=True)
    share = 60 * minutes * min(jobs, len(all_targets)) / len(all_targets)
    waiting, running = list(all_targets), list[Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            target = waiting.pop(0)
            log = logs / f"{target.name}.log"
            log.unlink(missing_ok=True)
            running.append(Running(target, share, log))
        time.sleep(0.2)
        for one in [one for one in running if one.over()]:
            running.remove(one)
            print(row(one.target), flush=True)


HEAD = "| target | inputs | per second of a processor | refused | edges | findings |\n|---|---|---|---|---|---|"


def row(target: Target) -> str:
    """A target's line of the table."""
    inputs, refused, _ = COUNTS.unpack(target.counts[:])
    share = f"{100 * refused / inputs:.0f} %" if inputs else ""
    pace = f"{inputs / target.processor:.0f}" if target.processor else ""
    return f"| {target.name} | {inputs:,} | {pace} | {share} | {target.covered:,} | {len(target.findings())} |"


def table(all_targets: Iterable[Target]) -> str:
    """The result, as Markdown."""
    all_targets = list(all_targets)
    inputs = sum(COUNTS.unpack(target.counts[:])[0] for target in all_targets)
    hours = sum(target.processor for target in all_targets) / 3600
    found = sum(len(target.findings()) for target in all_targets)
    total = f"{inputs:,} inputs in {hours:.2f} hours of a processor; findings: {found}"
    return "\n".join([HEAD, *map(row, all_targets), "", total])


def replay(target: Target, path: Path) -> int:
    """Read one input again, and show what it does."""
    from qalora.errors import InputError

    with tempfile.TemporaryDirectory(dir=_quick()) as folder:
        reader = Reader(target, Path(folder))
        limit_memory()
        try:
            with limited():
                reader.read(path.read_bytes())
        except InputError as error:
            print(f"refused: {error}")
            return 0
        except BaseException:
            traceback.print_exc()
            return 1
    print("read")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of all targets together, 10 by default")
    parser.add_argument("--target", action="append", default=[], help="one target; may be given several times")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at once; all cores by default")
    parser.add_argument("--corpus", type=Path, help="where inputs worth keeping are, build/fuzz/corpus by default")
    parser.add_argument("--replay", type=Path, help="read one input of --target, and show what it does")
    given = parser.parse_args()
    if given.replay and len(given.target) != 1:
        parser.error("--replay needs one --target")
    work = ROOT / "build" / "fuzz"
    import_counted()
    chosen = targets(work, given.corpus or work / "corpus", given.target)
    if given.replay:
        return replay(chosen[0], given.replay)
    run(chosen, minutes=given.minutes, jobs=given.jobs, logs=work / "logs")
    print(f"\n{table(chosen)}")
    for path in (path for target in chosen for path in target.findings()):
        print("\n".join(path.with_suffix(".txt").read_text("utf-8").splitlines()[:2]))
    return 1 if any(target.findings() for target in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
