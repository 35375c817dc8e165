"""Several processes, started by the launchers, or as torchrun does: the loss curve and the adapter of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from forks import ALWAYS, Forks
from qalora.demo import demo_text
from qalora.errors import InputError
from qalora.testing import byte_tokenizer, tiny_llama
from qalora.training.distributed import ALONE, Processes, joined
from qalora.training.sharding import Table
from said import besides_data

STEPS = 4
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes")


@pytest.fixture(scope="module")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    (root / "text.txt").write_text(demo_text()[:6_000], encoding="utf-8")
    (root / "other.txt").write_text(demo_text()[6_000:12_000], encoding="utf-8")
    for words in (["quantize", root / "float", "-o", root / "base"], train(root, root / "one")):
        assert forks.run("-m", "qalora", *words).returncode == 0
    return root


def train(place: Path, out: Path, *more: object) -> list[object]:
    """Steps of 5 sequences in forwards of 5 at most: two processes have 3 and 2 of them, six have one, or none."""
    settings = f"--max-steps {STEPS} --rank 4 --batch-size 5 --max-length 32 --held-out 0.1 --evaluate-every 2"
    return ["train", place / "base", "--data", place / "text.txt", "-o", out, *settings.split(), *more]


Start = Callable[..., tuple[list[int], str]]
"""start(count, words, before): `python -m qalora` and words in several processes, each after the Python of `before`;
the statuses, and what all said on stderr."""


@pytest.fixture(scope="module")
def forked(forks: Forks) -> Start:
    """Processes in torchrun's environment, beside the store that it keeps for them; the status of each."""

    def start(count: int, words: list[object], *, before: str = "") -> tuple[list[int], str]:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        started = []
        for rank in range(count):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            started.append(forks.start("-m", "qalora", *words, before=before, environment=own))
        done = forks.finish(*started)
        return [process.returncode for process in done], "".join(process.stderr for process in done)

    return start


@pytest.fixture
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The same by torchrun itself; its one status, and what it says with them."""

    def start(count: int, words: list[object], *, before: str = "") -> tuple[list[int], str]:
        script = tmp_path_factory.mktemp("script") / "script.py"
        script.write_text(f"{before}\nfrom qalora.cli import main\nmain()\n", encoding="utf-8")
        done = launched(TORCHRUN, count, script, *words)
        return [done.returncode], done.stderr

    return start


def launched(launcher: tuple[str, ...], count: int, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, (*launcher, count, *words))],
        capture_output=True,
        text=True,
        env={**os.environ, **ALWAYS},
        timeout=500,
        check=False,
    )


@pytest.fixture(params=["forked", pytest.param("by_torchrun", marks=pytest.mark.long)])
def start(request: pytest.FixtureRequest) -> Start:
    found: Start = request.getfixturevalue(request.param)
    return found


def ours(stderr: str) -> list[str]:
    lines = [line for line in stderr.splitlines() if line.startswith(("qalora: ", "note: "))]
    return besides_data(lines)


def assert_same_training(one: Path, other: Path, processes: int, *, shard: bool = False) -> None:
    """The same up to the order of float32 sums.

    A loss is of logits from 64-term sums in a dozen products: 12 * 64 * 2^-24 of the largest. Gradients differ by 2^-14
    of their norm at most, as in test_loop. AdamW's first steps move a number by the rate whatever its gradient's size,
    so one whose gradient is noise may go either way: 1 in 1,000 may be elsewhere, the others are within a hundredth of
    what the steps can move them.
    """
    logs = [json.loads((folder / "training.json").read_text("utf-8")) for folder in (one, other)]
    assert "processes" not in logs[0]["options"]
    assert logs[1]["options"].pop("processes") == processes
    assert logs[1]["options"].pop("shard", False) == shard
    curves = [log.pop("losses") + [entry["loss"] for entry in log["held_out"]] for log in logs]
    for log in logs:
        for entry in log["held_out"]:
            del entry["loss"]
    assert logs[0] == logs[1]
    bound = 12 * 64 * 2.0**-24 * max(curves[0]) + 1e-5  # and the six digits that are written
    assert len(curves[0]) == STEPS + 3
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= bound
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    far = [((weights[1][name] - value).abs() > 0.01 * STEPS * 3e-3).flatten() for name, value in weights[0].items()]
    assert float(torch.cat(far).float().mean()) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_loss_curve_of_one_process(place: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    done = launched(launcher, 2, "-m", "qalora", *train(place, tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1
    assert done.stderr.count(f"step {STEPS} of {STEPS}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_same_training(place / "one", tmp_path / "adapter", 2)


@pytest.mark.slow
def test_more_processes_than_sequences(place: Path, tmp_path: Path, start: Start) -> None:
    statuses, stderr = start(6, train(place, tmp_path / "adapter"))
    assert not any(statuses), stderr
    assert stderr.count(f"step {STEPS} of {STEPS}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_same_training(place / "one", tmp_path / "adapter", 6)


IN_STEP_2 = """
import os, signal
import qalora.training.loop as loop
held, steps = loop._schedule, 0
def schedule(*given):
    global steps
    steps += 1
    if os.environ.get("RANK", "0") == "1" and steps == 2:
        os.kill(os.getpid(), signal.{number})
    return held(*given)
loop._schedule = schedule
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_one_goes_on(
    forks: Forks, place: Path, tmp_path: Path, start: Start
) -> None:
    """Two processes are left after step 2; one process goes on from there."""
    out = tmp_path / "adapter"
    statuses, stderr = start(2, train(place, out), before=IN_STEP_2.format(number="SIGINT"))
    assert set(statuses) == {1}
    assert ours(stderr) == [
        f"qalora: interrupted after step 2 of {STEPS}; continue from {out}.checkpoint with --resume"
    ]
    done = forks.run("-m", "qalora", *train(place, out, "--resume"))
    assert done.returncode == 0, done.stderr
    log = json.loads((out / "training.json").read_text("utf-8"))
    whole = json.loads((place / "one" / "training.json").read_text("utf-8"))
    # six digits are written, and the bound of assert_same_training
    assert max(abs(a - b) for a, b in zip(log["losses"], whole["losses"], strict=True)) <= 3e-4


FAILURES: dict[str, tuple[str, str]] = {
    "all": ("import sys; sys.argv += ['--target-modules', 'nothing']", "qalora: --target-modules: expected some of"),
    "one": (
        "import os, sys\nif os.environ['RANK'] == '1': sys.argv = [a.replace('text.txt', 'no.txt') for a in sys.argv]",
        "no.txt: no such file",
    ),
    "other data": (
        "import os, sys\n"
        "if os.environ['RANK'] == '1': sys.argv = [a.replace('text.txt', 'other.txt') for a in sys.argv]",
        "qalora: data_sha256: expected the same in every process, got ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_is_said_once(forked: Start, place: Path, tmp_path: Path, kind: str) -> None:
    before, words = FAILURES[kind]
    statuses, stderr = forked(2, train(place, tmp_path / "adapter"), before=before)
    assert statuses == [2, 2]
    (sentence,) = ours(stderr)
    assert words in sentence
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind == "one" else pytest.param(kind, marks=pytest.mark.long) for kind in FAILURES]
)
def test_the_launcher_says_which_processes_failed(by_torchrun: Start, place: Path, tmp_path: Path, kind: str) -> None:
    before, words = FAILURES[kind]
    _, stderr = by_torchrun(2, train(place, tmp_path / "adapter"), before=before)
    (sentence,) = ours(stderr)
    assert words in sentence
    assert stderr.count("(exitcode: 2)") + stderr.count("exitcode  : 2") >= 2
    assert "qalora/training" not in stderr  # the launcher's own traceback is the only one
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_others_notice_that_a_process_was_killed(forked: Start, place: Path, tmp_path: Path) -> None:
    killed = IN_STEP_2.format(number="SIGKILL")
    statuses, stderr = forked(2, train(place, tmp_path / "adapter", "--save-every", 1), before=killed)
    assert statuses == [2, -signal.SIGKILL]
    (sentence,) = ours(stderr)
    assert sentence.startswith("qalora: another process of this run has ended (")
    assert sentence.endswith("; continue with --resume")
    assert "Traceback" not in stderr
    assert (tmp_path / "adapter.checkpoint" / "state.json").is_file()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
@pytest.mark.long
def test_the_launcher_ends_a_run_of_which_a_process_was_killed(by_torchrun: Start, place: Path, tmp_path: Path) -> None:
    killed = IN_STEP_2.format(number="SIGKILL")
    statuses, stderr = by_torchrun(2, train(place, tmp_path / "adapter", "--save-every", 1), before=killed)
    assert statuses != [0]
    assert len(ours(stderr)) <= 1  # the launcher may end the other before it has noticed
    assert (tmp_path / "adapter.checkpoint" / "state.json").is_file()
    assert not (tmp_path / "adapter").exists()


# ---- a base that is spread over the processes

FIVE = ("--batch-size", 1, "--gradient-accumulation-steps", 5)
"""Two processes have 3 and 2 sequences of a step, each a forward of its own: one of them makes an idle one."""

SPREAD: dict[str, tuple[object, ...]] = {
    "float32": FIVE,
    "bfloat16": ("--dtype", "bfloat16", "--gradient-checkpointing", "--rank", "auto", "--budget", 6000),
    "packed": (*FIVE, "--weights", "packed", "--target-modules", "q_proj", "--target-modules", "down_proj"),
}

COUNT = """
import gc, json, sys
import torch
import qalora.training.loop as loop
from torch.distributed.tensor import DTensor
from qalora.training.layer import FoldedLinear
from qalora.training.sharding import Table
held = loop._schedule
def schedule(*given):
    found = gc.get_objects()
    mine = whole = 0
    for layer in (one for one in found if type(one) is FoldedLinear):
        for value in (layer.packed, layer.scale, layer.minimum):
            mine += (value.to_local() if isinstance(value, DTensor) else value).nbytes
            whole += value.nbytes
    tables = {one._rows.data_ptr(): len(one._rows) for one in found if type(one) is Table}
    codes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found
             if type(one) in (torch.Tensor, torch.nn.Parameter) and one.dtype == torch.uint8}
    counted = {"mine": mine, "whole": whole, "rows": list(tables.values()), "codes": sum(codes.values())}
    sys.stderr.write(f"counted {json.dumps(counted)}\\n")
    return held(*given)
loop._schedule = schedule
"""
"""What a process holds of the base at the end of a step's backward, to stderr: bytes of the layers, and of every uint8
tensor that there is, and rows of each table."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPREAD)
def test_a_base_that_is_spread_trains_to_the_same_bits(forked: Start, place: Path, tmp_path: Path, kind: str) -> None:
    """Each process holds half of the base's bytes: every weight here has an even number of rows."""
    counts = {}
    for name, flags in (("kept", ()), ("spread", ("--shard",))):
        words = train(place, tmp_path / name, *SPREAD[kind], *flags)
        statuses, stderr = forked(2, words, before=COUNT)
        assert statuses == [0, 0], stderr
        assert "Warning" not in stderr
        lines = [line.removeprefix("counted ") for line in stderr.splitlines() if line.startswith("counted ")]
        assert len(lines) == 2 * STEPS
        (line,) = set(lines)
        counts[name] = json.loads(line)
    kept, spread = counts["kept"], counts["spread"]
    assert kept["mine"] == kept["whole"] == spread["whole"] == 2 * spread["mine"] > 0
    assert [-(-rows // 2) for rows in kept["rows"]] == spread["rows"]
    assert kept["codes"] == 2 * spread["codes"] > 0
    assert_same_bytes(tmp_path / "kept", tmp_path / "spread")


def assert_same_bytes(kept: Path, spread: Path) -> None:
    """The same adapter, and the same log but for the word that says it was spread."""
    logs = [json.loads((folder / "training.json").read_text("utf-8")) for folder in (kept, spread)]
    logs[1]["options"].pop("shard", None)
    assert logs[0] == logs[1]
    names = [sorted(path.name for path in folder.iterdir()) for folder in (kept, spread)]
    assert names[0] == names[1]
    for name in set(names[0]) - {"training.json"}:
        assert (kept / name).read_bytes() == (spread / name).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_with_a_base_that_is_spread_or_not(forked: Start, place: Path, tmp_path: Path) -> None:
    """Steps 1 and 3 and 4 spread, step 2 not: the bytes of a run without it."""
    assert forked(2, train(place, tmp_path / "kept"))[0] == [0, 0]
    out, stop = tmp_path / "adapter", IN_STEP_2.replace("steps == 2", "steps == 1").format(number="SIGINT")
    for flags, before, status in (
        (("--shard",), stop, 1),
        (("--resume",), stop, 1),
        (("--resume", "--shard"), "", 0),
    ):
        statuses, stderr = forked(2, train(place, out, *flags), before=before)
        assert statuses == [status, status], stderr
    assert_same_bytes(tmp_path / "kept", out)


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_spreads_a_base(place: Path, tmp_path: Path) -> None:
    done = launched(TORCHRUN, 2, "-m", "qalora", *train(place, tmp_path / "adapter", "--shard"))
    assert done.returncode == 0, done.stderr
    assert_same_training(place / "one", tmp_path / "adapter", 2, shard=True)


@pytest.mark.slow
def test_one_process_has_nothing_to_spread_over(forks: Forks, place: Path, tmp_path: Path) -> None:
    done = forks.run("-m", "qalora", *train(place, tmp_path / "adapter", "--shard"))
    assert done.returncode == 2
    assert done.stderr == (
        "qalora: --shard: expected several processes, to spread the base over, got one; "
        "start them with torchrun --nproc-per-node 2 -m qalora train ...\n"
    )
    assert not list(tmp_path.iterdir())


IN_A_LAYER = """
import os, signal
import qalora.training.fast as fast
import qalora.training.loop as loop
held, weight, left = loop._schedule, fast.SharedInput.weight, None
def schedule(*given):
    global left
    left = 3
    return held(*given)
def counted(self):
    global left
    if left is not None and os.environ["RANK"] == "1":
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return weight(self)
loop._schedule, fast.SharedInput.weight = schedule, counted
"""
"""A process is killed in the first layer of step 2, while the other waits for the second layer's weights."""


@pytest.mark.slow
def test_the_others_notice_a_kill_while_a_layer_is_gathered(forked: Start, place: Path, tmp_path: Path) -> None:
    words = train(place, tmp_path / "adapter", "--shard", "--save-every", 1, "--evaluate-every", 0)
    statuses, stderr = forked(2, words, before=IN_A_LAYER)
    assert statuses == [2, -signal.SIGKILL], stderr
    (sentence,) = ours(stderr)
    assert sentence.startswith("qalora: another process of this run has ended (")
    assert sentence.endswith("; continue with --resume")
    assert (tmp_path / "adapter.checkpoint" / "state.json").is_file()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_table_is_its_processes_rows(rows: int, size: int) -> None:
    weight = torch.rand(rows, 3)
    parts = [Table.spread(weight, Processes(rank=n, size=size), torch.device("cpu")) for n in range(size)]
    held = [part._rows for part in parts]
    assert {len(part) for part in held} == {-(-rows // size)}
    assert torch.equal(torch.cat(held)[:rows], weight)
    assert {part.untyped_storage().nbytes() for part in held} == {-(-rows // size) * 3 * 4}  # no view of the whole


# ---- parts


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_even_and_miss_nothing(count: int, size: int) -> None:
    shares = [Processes(rank=rank, size=size).share(count) for rank in range(size)]
    assert torch.cat(shares).tolist() == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0"}):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with joined("cpu") as processes:
            assert processes is ALONE
            assert processes.sum(3.5) == 3.5
            assert processes.heard("a") == "a"


def test_an_environment_that_no_launcher_makes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE in the environment: expected a number, got 'two'"), joined("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"the 2 processes of this run did not meet: .*RANK"), joined("cpu"):
        pass
