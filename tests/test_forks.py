"""What is forked is as a cold process would be, and nothing of it stays."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forks import Forks


def cold_run(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process that imports everything anew; Ctrl-C ends it, also where a shell had these tests ignore that."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        check=False,
    )


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    """Whether a process that was killed is gone: what is not one's own child ends when the kernel comes to it."""
    for _ in range(500):
        if not alive(pid):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("good", [True, False])
def test_a_command_does_what_it_does_in_a_cold_process(forks: Forks, tiny: Path, tmp_path: Path, good: bool) -> None:
    words = ["inspect", tiny] if good else ["train", tiny, "--data", tmp_path / "no.txt", "-o", tmp_path / "adapter"]
    command = ["-m", "qalora", *map(str, words)]
    cold = cold_run(*command)
    found = forks.run(*command)
    assert (found.returncode, found.stdout, found.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert cold.returncode == (0 if good else 2)
    assert len(cold.stdout if good else cold.stderr) > 20


ENDS = {
    "as it should": "print('out'); import sys; print('err', file=sys.stderr)",
    "with a number": "import sys; sys.exit(7)",
    "with a sentence": "import sys; sys.exit('no')",
    "with an error": "def f():\n    1 / 0\nf()",
    "with an error of syntax": "1 +",
    "at once": "import os; print('lost', end=''); os._exit(3)",
    "with what is done at the end": "import atexit, sys; atexit.register(print, 'end'); sys.exit(4)",
    "with Ctrl-C": "import signal; signal.raise_signal(signal.SIGINT)",
    "by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "with its surroundings": "import sys; print(sys.argv, sys.path[0], __name__, sorted(globals()), sys.stdin.read())\n"
    "print([(s.isatty(), s.seekable(), s.line_buffering, s.encoding, s.errors) for s in (sys.stdout, sys.stderr)])",
    "with what others import": "import sys, __main__; print(vars(__main__) is globals(), sys.modules['__main__'].here)",
    "with its signals": "import signal; print({s.name: str(signal.getsignal(s))[:25] for s in signal.valid_signals()"
    " if isinstance(s, signal.Signals)})",
    "with its files": "import os; print([n for n in range(64) if os.path.exists(f'/proc/self/fd/{n}')])",
}


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_as_a_cold_process_does(light_forks: Forks, how: str) -> None:
    words = ["-c", f"here = {how!r}\n{ENDS[how]}", "a", "-b"]
    cold = cold_run(*words)
    found = light_forks.run(*words)
    assert (found.returncode, found.stdout, found.stderr) == (cold.returncode, cold.stdout, cold.stderr)


def test_a_script_and_a_module(light_forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("here = 'beside'", encoding="utf-8")
    (tmp_path / "script.py").write_text("import beside, sys\nprint(beside.here, sys.argv, __name__, __file__)", "utf-8")
    for words in (["script.py", "a"], ["-m", "script", "a"], [str(tmp_path / "script.py")], ["-m", "nothing"]):
        cold = cold_run(*words, folder=tmp_path)
        found = light_forks.run(*words, folder=tmp_path)
        assert (found.returncode, found.stdout) == (cold.returncode, cold.stdout)
        assert (cold.returncode == 0) == bool(cold.stdout) == (words[-1] != "nothing")


def test_its_folder_its_variables_its_limit_and_what_goes_before(light_forks: Forks, tmp_path: Path) -> None:
    code = "import os, pathlib; print(os.getcwd(), os.environ.get('MINE'), 'PATH' in os.environ, made)\n"
    code += "pathlib.Path('a').write_bytes(b'123456')"
    mine = {"MINE": "x", "PATH": None}
    done = light_forks.run("-c", code, before="made = 7", folder=tmp_path, limit=5, environment=mine)
    assert done.stdout == f"{tmp_path} x False 7\n"
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert done.returncode == 1
    assert (tmp_path / "a").read_bytes() == b"12345"
    done = light_forks.run("-c", code.partition("\n")[0].replace("made", "0"))
    assert (done.returncode, done.stdout) == (0, f"{Path.cwd()} None True 0\n")


def test_it_is_a_process_of_its_own(light_forks: Forks) -> None:
    code = "import os, sys; print(os.getpid(), os.getpgid(0), os.getsid(0), 'torch' in sys.modules); made = 1"
    rows = [light_forks.run("-c", code).stdout.split() for _ in range(2)]
    assert [row[1:] for row in rows] == [[row[0], row[0], "True"] for row in rows]
    assert rows[0][0] != rows[1][0]
    assert light_forks.run("-c", "made").returncode == 1, "nothing is left of the one before"


def test_several_write_more_than_a_pipe_has_room_for(light_forks: Forks) -> None:
    code = "import sys; print('x' * 300_000, file=sys.stderr); print('y' * 300_000)"
    for done in light_forks.finish(*(light_forks.start("-c", code) for _ in range(3))):
        assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 300_001, 300_001)


@pytest.mark.parametrize("closed", ["", "os.close(1); os.close(2); "])
def test_one_that_takes_too_long_is_killed_with_what_it_started(
    light_forks: Forks, tmp_path: Path, closed: str
) -> None:
    code = f"""
import os, pathlib, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("some").write_text(f"{{os.getpid()}} {{other.pid}}")
os.rename("some", "pids")
{closed}time.sleep(600)
"""
    started = light_forks.start("-c", code, folder=tmp_path)
    while not (tmp_path / "pids").exists():
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        light_forks.finish(started, timeout=0.1)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text("utf-8").split())
    assert light_forks.run("-c", "print(1)").stdout == "1\n"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "PYTHONHASHSEED", "LANG"])
def test_what_was_read_at_import_cannot_be_changed(light_forks: Forks, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is read while (sys|torch) is imported"):
        light_forks.run("-c", "", environment={name: "2"})


def test_what_is_not_imported_has_its_variables(light_forks: Forks) -> None:
    code = "import sys; print('huggingface_hub' in sys.modules)\n"
    code += "from huggingface_hub import constants; print(constants.ENDPOINT)"
    assert (
        light_forks.run("-c", code, environment={"HF_ENDPOINT": "http://localhost:7"}).stdout
        == "False\nhttp://localhost:7\n"
    )


def test_what_is_set_in_the_tests_process_is_not_passed_on(light_forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MINE", "x")
    code = "import os; print('TORCH_MINE' in os.environ)"
    assert light_forks.run("-c", code).stdout == "False\n"


def test_a_server_that_cannot_fork_safely_does_not(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with Forks("threaded") as made, pytest.raises(RuntimeError, match="ended:\n2 threads, and only the one that"):
            made.run("-c", "")


STARTED = """
import sys
sys.path.insert(0, {folder!r})
from forks import Forks
with Forks() as made:
    print(made._server.pid, made.start("-c", "import time; time.sleep(600)").pid, flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "import os; os.kill(os.getpid(), 9)"])
def test_nothing_outlives_who_started_it(end: str) -> None:
    code = STARTED.format(folder=str(Path(sys.modules["forks"].__file__).parent), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (0 if end == "pass" else -signal.SIGKILL), done.stderr
    assert all(gone(int(pid)) for pid in done.stdout.split())
    assert len(done.stdout.split()) == 2
