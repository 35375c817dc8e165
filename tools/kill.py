"""Kill every command that writes, at random moments, and see what is left.

    python tools/kill.py [--times 200] [--only NAME ...] [--seed 0]

Each command works on a tiny model. First it runs whole, for its time and its bytes. Then, `--times` times spread over
all commands, it gets SIGKILL after a random part of that time, half of the time over an earlier output with --force,
and runs again. What must be so:

    killed    the output is not there, or it is whole: that of a run that ended, or the earlier one
    again     the second run (train: with --resume) ends well, with the bytes of a run that was left alone
    after     nothing else lies beside the output

Prints a Markdown table, and ends with status 1 if anything was not so. Processes are forked from one that has imported
the libraries, so that a run takes tenths of a second and most kills hit the work.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

FORMATS = ("gguf", "onnx", "openvino", "transformersjs", "gptq", "mlx", "hqq", "torchao", "mnn", "qalora")
LOG = Path(tempfile.gettempdir(), f"qalora-kill-{os.getpid()}.log")
"""What the last command said."""

TEXT = "A line of text to learn from, again and again. " * 60


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that writes. words: without the output; out: its name; again: more words for the run after a kill."""

    name: str
    words: Sequence[object]
    out: str = "out"
    again: Sequence[str] = ()
    beside: Sequence[str] = ()
    forced: bool = True


@dataclass
class Row:
    """What was seen of a command."""

    kills: int = 0
    before: int = 0
    whole: int = 0
    wrong: list[str] = field(default_factory=list)


def run(words: Sequence[object], *, seconds: float | None = None) -> int:
    """Run a command in a forked process, killed after `seconds`; gives its exit status, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            said = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            from qalora.cli import main

            main([str(word) for word in words], standalone_mode=True)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(path: Path) -> str | None:
    """Of names and bytes of what lies at a path; None where nothing does."""
    if not path.exists():
        return None
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    for file in files:
        total.update(file.relative_to(path.parent).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def prepare(root: Path) -> list[Command]:
    """What the commands read, and the commands."""
    from qalora.testing import byte_tokenizer, tiny_llama

    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    quantize = ("quantize", root / "float")
    calibration = ("--calibration", root / "text.txt", "--calibration-tokens", 1024, "--calibration-length", 64)
    train = ("--max-steps", 6, "--rank", 2, "--max-length", 32, "--save-every", 2)
    training = ("train", root / "base", "--data", root / "text.txt", *train)
    release = ("release", root / "base", "--adapter", root / "adapter", "--to", "gguf", "--to", "gptq", "--level")
    made = [
        (*quantize, "-o", root / "base"),
        (*training, "-o", root / "adapter"),
        (*release, "weights", "-o", root / "release"),
        (*release[:2], "--to", "gguf", "--to", "gptq", "--level", "weights", "-o", root / "earlier"),
        ("delta", "make", root / "earlier", root / "release", "-o", root / "delta"),
    ]
    for words in made:
        if run(words):
            raise SystemExit(f"{' '.join(map(str, words))} failed: {LOG.read_text(encoding='utf-8')}")
    export = ("export", root / "base", "--adapter", root / "adapter")
    return [
        Command(name="quantize", words=quantize),
        Command(name="quantize gptq", words=(*quantize, "--method", "gptq", *calibration)),
        Command(name="train", words=training, again=("--resume",), beside=("out.checkpoint",), forced=False),
        Command(name="fold", words=("fold", root / "base", root / "adapter")),
        *(Command(name=f"export {one}", words=(*export, "--to", one), out=f"out/{one}") for one in FORMATS),
        Command(name="release", words=(*release, "weights")),
        Command(name="delta make", words=("delta", "make", root / "earlier", root / "release")),
        Command(name="delta apply", words=("delta", "apply", root / "delta", root / "earlier")),
    ]


def trial(command: Command, place: Path, seconds: float, wanted: str, *, earlier: bool, row: Row) -> None:
    """Kill the command once, and look."""
    place.mkdir()
    out, words = place / command.out, [*command.words, "-o", place / "out"]
    if earlier:
        run(words)
        words.append("--force")
    killed = run(words, seconds=seconds) == -signal.SIGKILL
    row.kills += killed
    found = digest(out)
    row.before += found is None
    row.whole += found is not None
    if found not in ((wanted,) if earlier else (None, wanted)):
        row.wrong.append("a half or missing output" if killed else "other bytes")
    resume = [*command.again] if (place / "out.checkpoint").exists() else []
    force = ["--force"] if found is not None and not earlier else []
    if run([*words, *(resume or force)]):
        row.wrong.append("the run after it failed")
    elif digest(out) != wanted:
        row.wrong.append("the run after it gave other bytes")
    rest = sorted({path.name for path in place.iterdir()} - {"out"})
    if rest:
        row.wrong.append(f"left over: {', '.join(rest)}")
    shutil.rmtree(place)


def main() -> None:
    """Kill in turn, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    _import()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        commands = [one for one in prepare(root) if not chosen.only or one.name in chosen.only]
        rows = {command.name: Row() for command in commands}
        whole = {command.name: _whole(command, root) for command in commands}
        rng = random.Random(chosen.seed)
        for number in range(chosen.times):
            command = commands[number % len(commands)]
            seconds, wanted = whole[command.name]
            earlier = command.forced and rng.random() < 0.5
            trial(
                command,
                root / "trial",
                rng.random() * seconds,
                wanted,
                earlier=earlier,
                row=rows[command.name],
            )
    _print(rows)
    sys.exit(any(row.wrong for row in rows.values()))


def _import() -> None:
    """Import here what every forked process would, but start no thread."""
    import torch
    import transformers

    import qalora.cli
    import qalora.converters.exports
    import qalora.releasing
    import qalora.training

    torch.set_num_threads(1)
    assert transformers and qalora


def _whole(command: Command, root: Path) -> tuple[float, str]:
    """Seconds and digest of a run that is left alone: the second one, when files are in the page cache."""
    place = root / "whole"
    seconds, found = 0.0, None
    for _ in range(2):
        place.mkdir()
        start = time.perf_counter()
        status = run([*command.words, "-o", place / "out"])
        seconds = time.perf_counter() - start
        found = digest(place / command.out)
        shutil.rmtree(place)
        if status or found is None:
            raise SystemExit(f"{command.name} failed: {LOG.read_text(encoding='utf-8')}")
    return seconds, str(found)


def _print(rows: dict[str, Row]) -> None:
    print("| command | killed | no output then | a whole output then | wrong |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.kills} | {row.before} | {row.whole} | {'; '.join(row.wrong) or 0} |")
    every = rows.values()
    kills, before, whole = (sum(getattr(row, name) for row in every) for name in ("kills", "before", "whole"))
    print(f"| all | {kills} | {before} | {whole} | {sum(len(row.wrong) for row in every)} |")


if __name__ == "__main__":
    main()
