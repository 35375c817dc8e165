"""Runs that are interrupted, killed, or out of room, as real processes: resumed, they give the bytes of a whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from forks import ALWAYS, Forks
from qalora.demo import demo_text
from qalora.formats.safetensors import read_header
from qalora.testing import byte_tokenizer, tiny_llama
from said import besides_data

pytestmark = pytest.mark.slow  # two processes a test

STEPS = 8
ADAPTER, TOKENIZER = 60_000, 20_000
"""Bytes of a file: room for the adapter and not for a checkpoint, with AdamW's moments; and not for the adapter."""


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def qalora(forks: Forks) -> Run:
    """`python -m qalora` in a process of its own, after the Python of `before`; `limit` is bytes of a file."""
    return partial(forks.run, "-m", "qalora")


@pytest.fixture(scope="module")
def place(qalora: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a text, and the adapter of a run that nothing disturbed, in a cold process, whose hashes are others."""
    root = tmp_path_factory.mktemp("interrupt")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    (root / "text.txt").write_text(demo_text()[:6_000], encoding="utf-8")
    assert qalora("quantize", root / "float", "-o", root / "base").returncode == 0
    command = [sys.executable, "-m", "qalora", *map(str, words(root, root / "whole"))]
    done = subprocess.run(command, env={**os.environ, **ALWAYS}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


def words(place: Path, out: Path, *more: object) -> list[object]:
    settings = f"--max-steps {STEPS} --rank 8 --batch-size 2 --max-length 32 --save-every 2 --evaluate-every 3"
    return ["train", place / "base", "--data", place / "text.txt", "-o", out, *settings.split(), *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def said(stderr: str) -> str:
    """What was said of ours, without the lines of data, of steps and of other libraries."""
    lines = [line for line in stderr.splitlines() if line.startswith(("qalora: ", "note: "))]
    return "\n".join(besides_data(lines))


# The signal comes from within, so that it comes at a known place.
AT_A_CALL = """
import os, signal
import qalora.training.{module} as module
def counted(held, calls=0):
    def counting(*given, **named):
        nonlocal calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), signal.{number})
        return held(*given, **named)
    return counting
module.{name} = counted(module.{name})
"""


def at(module: str, name: str, call: int, number: str) -> str:
    return AT_A_CALL.format(module=module, name=name, call=call, number=number)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, "SIGINT"),
        (4, "SIGTERM"),
        (STEPS, "SIGINT"),
        pytest.param(1, "SIGTERM", marks=pytest.mark.long),
        pytest.param(4, "SIGINT", marks=pytest.mark.long),
        pytest.param(STEPS, "SIGTERM", marks=pytest.mark.long),
    ],
)
def test_a_signal_waits_for_the_step(qalora: Run, place: Path, tmp_path: Path, step: int, number: str) -> None:
    out = tmp_path / "adapter"
    left = qalora(*words(place, out), before=at("loop", "_schedule", step, number))
    assert left.returncode == 1
    assert said(left.stderr) == (
        f"qalora: interrupted after step {step} of {STEPS}; continue from {out}.checkpoint with --resume"
    )
    assert "Traceback" not in left.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.checkpoint"]
    assert sorted(path.name for path in (tmp_path / "adapter.checkpoint").iterdir()) == [
        f"state-{step}.safetensors",
        "state.json",
    ]
    done = qalora(*words(place, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"after {STEPS} steps" in done.stdout
    assert files(out) == files(place / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_second_signal_does_not_wait(qalora: Run, place: Path, tmp_path: Path) -> None:
    twice = at("loop", "_schedule", 3, "SIGINT").replace(
        "os.kill(os.getpid(), signal.SIGINT)", "[signal.raise_signal(signal.SIGINT) for _ in range(2)]"
    )
    left = qalora(*words(place, tmp_path / "adapter"), before=twice)
    assert left.returncode == 1
    assert "Traceback" not in left.stderr
    assert json.loads((tmp_path / "adapter.checkpoint" / "state.json").read_text("utf-8"))["step"] == 2


def test_without_checkpoints_a_signal_ends_the_run_at_once(qalora: Run, place: Path, tmp_path: Path) -> None:
    left = qalora(*words(place, tmp_path / "adapter", "--save-every", 0), before=at("loop", "_schedule", 3, "SIGINT"))
    assert left.returncode == 1
    assert "interrupted; if there is a checkpoint beside the output, --resume continues from it" in left.stderr
    assert not list(tmp_path.iterdir())


KILLED = {
    "in a step": (at("loop", "_schedule", 4, "SIGKILL"), 2),
    "before a checkpoint": (at("loop", "write_state", 3, "SIGKILL"), 4),
    "in the first checkpoint's weights": (at("state", "SafetensorsWriter.write", 3, "SIGKILL"), None),
    "in the first checkpoint's record": (at("state", "write_json", 1, "SIGKILL"), None),
    "in a checkpoint's weights": (at("state", "SafetensorsWriter.__exit__", 2, "SIGKILL"), 2),
    "between a checkpoint's weights and record": (at("state", "write_json", 2, "SIGKILL"), 2),
    "in a checkpoint's tidying": (at("state", "_remove_others", 1, "SIGKILL"), 4),
    "in the adapter": (at("loop", "write_adapter", 1, "SIGKILL"), 6),
}


@pytest.mark.parametrize("where", KILLED)
def test_a_run_that_was_killed_goes_on_from_a_whole_checkpoint(
    qalora: Run, place: Path, tmp_path: Path, where: str
) -> None:
    before, step = KILLED[where]
    out = tmp_path / "adapter"
    left = qalora(*words(place, out), before=before)
    assert left.returncode == -signal.SIGKILL, left.stderr
    assert not out.exists()
    if step is None:
        assert not (tmp_path / "adapter.checkpoint").exists()
        done = qalora(*words(place, out))
    else:
        assert json.loads((tmp_path / "adapter.checkpoint" / "state.json").read_text("utf-8"))["step"] == step
        read_header(tmp_path / "adapter.checkpoint" / f"state-{step}.safetensors")
        done = qalora(*words(place, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert files(out) == files(place / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_no_room_for_a_checkpoint_does_not_end_the_run(qalora: Run, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    done = qalora(*words(place, out), limit=ADAPTER)
    assert done.returncode == 0, done.stderr
    notes = said(done.stderr).splitlines()
    assert [note.partition(": expected room for")[0] for note in notes] == [
        f"note: no checkpoint of step {step}: {out}.checkpoint" for step in (2, 4, 6)
    ]
    assert all(note.endswith(" bytes, got File too large") for note in notes)
    assert files(out) == files(place / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_no_room_for_the_next_checkpoint_keeps_the_last(qalora: Run, place: Path, tmp_path: Path) -> None:
    """A disk that is full from step 3 on: the run is left at step 5, and goes on from step 2."""
    out = tmp_path / "adapter"
    full = "import resource\n" + at("loop", "_schedule", 3, "SIGCONT").replace(
        "os.kill(os.getpid(), signal.SIGCONT)",
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({ADAPTER}, resource.RLIM_INFINITY))",
    )
    left = qalora(*words(place, out), before=full + at("loop", "_order", 6, "SIGINT"))  # the first is the start's
    assert left.returncode == 1
    note, last = said(left.stderr).splitlines()
    assert note.startswith(f"note: no checkpoint of step 4: {out}.checkpoint: expected room for ")
    assert note.endswith("File too large; an earlier one stays")
    assert last.startswith(f"qalora: interrupted after step 5 of {STEPS}; no checkpoint of step 5: ")
    assert sorted(path.name for path in (tmp_path / "adapter.checkpoint").iterdir()) == [
        "state-2.safetensors",
        "state.json",
    ]
    done = qalora(*words(place, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert files(out) == files(place / "whole")


def test_no_room_for_the_adapter_leaves_its_checkpoint(qalora: Run, place: Path, tmp_path: Path) -> None:
    """The folder cannot be made for want of room, and then again it can."""
    out = tmp_path / "adapter"
    full = "import errno\n" + at("loop", "write_adapter", 1, "SIGCONT").replace(
        "os.kill(os.getpid(), signal.SIGCONT)", "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    )
    left = qalora(*words(place, out), before=full)
    assert left.returncode == 2
    assert said(left.stderr) == (
        f"qalora: {out}: No space left on device; everything that was trained is in {out}.checkpoint: use --resume"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.checkpoint"]
    steps: list[str] = qalora(*words(place, out, "--resume")).stderr.splitlines()
    assert next(line for line in steps if line.startswith("step ")).startswith(f"step {STEPS} of {STEPS}")
    assert files(out) == files(place / "whole")


def test_no_room_at_all_keeps_what_there_is(qalora: Run, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    left = qalora(*words(place, out), limit=TOKENIZER)
    assert left.returncode == 2
    assert f"; no checkpoint of step {STEPS}: " in said(left.stderr).splitlines()[-1]
    assert "Traceback" not in left.stderr
    assert not list(tmp_path.iterdir())
