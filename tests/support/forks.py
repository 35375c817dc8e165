"""Python commands in processes of their own, forked from one that has imported torch and transformers.

A cold `python -m qalora train` imports for seconds, and then works for less than one. Here one process imports, once,
and then forks a real process for each command: its own process group, signals, limits, environment, working directory,
standard streams and exit status, all as `python` with the same words gives them (tests/test_forks.py).

What a fork cannot have anew it does not pretend to have: the modules are imported, Python's hash seed is the server's,
and so are the variables that Python and the libraries read while they are imported. A command that would change one of
those (READ_AT_IMPORT) is refused. Tests whose subject is an import, or a launcher, start cold processes.

A server is single-threaded, which it makes sure of before it forks. It ends with whoever started it, however that ends,
and ends what it forked.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

READ_AT_IMPORT = {
    "sys": ("LANG", "LC_", "LD_", "PYTHON", "TZ"),
    "torch": ("MKL_", "OMP_", "OPENBLAS_", "PYTORCH_", "TORCH_"),
    "triton": ("TRITON_",),
    "huggingface_hub": ("HF_", "HOME", "HUGGING", "XDG_"),
    "transformers": ("TRANSFORMERS_", "USE_"),
}
"""How the names of variables begin that are read once, while a module is imported."""

ALWAYS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NO_CUDA = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Of the server alone: a module that asks for a GPU while it is imported must not leave all forks without one."""

LENGTH = struct.Struct("!Q")


# ---- both ends


def send(end: socket.socket, message: dict[str, Any], descriptors: Iterable[int] = ()) -> None:
    data = json.dumps(message).encode()
    socket.send_fds(end, [LENGTH.pack(len(data))], list(descriptors))
    end.sendall(data)


def receive(end: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message; EOFError where the other end is closed."""
    head, descriptors, *_ = socket.recv_fds(end, LENGTH.size, 2, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    found: dict[str, Any] = json.loads(end.recv(length, socket.MSG_WAITALL))
    return found, descriptors


def stop(pid: int) -> None:
    """Kill a process that was forked, and those of its group, which it may not have come to have."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


# ---- the end of the tests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fork:
    """A process that was started: its words, its number, and what it writes."""

    words: tuple[str, ...]
    pid: int
    pipes: tuple[IO[bytes], IO[bytes]]


class Forks:
    """A server of forks: `Forks("torch", "qalora.training")` has imported these modules."""

    def __init__(self, *modules: str) -> None:
        self.environment = {**os.environ, **ALWAYS}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - __exit__ closes it
        self._end, other = socket.socketpair()
        with other:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno()), str(self._log.fileno()), *modules],
                env={**self.environment, NO_CUDA: "1"},
                pass_fds=[other.fileno(), self._log.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        for pipe in (self._server.stdout, self._server.stderr):  # the server has no more than the looks of them
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._server.wait()
        self._log.close()

    def run(self, *words: object, timeout: float = 300, **more: Any) -> subprocess.CompletedProcess[str]:
        """What `python` and these words do, as subprocess.run gives it; `more` as for `start`."""
        return self.finish(self.start(*words, **more), timeout=timeout)[0]

    def start(
        self,
        *words: object,
        before: str = "",
        environment: Mapping[str, str | None] | None = None,
        folder: Path | None = None,
        limit: int | None = None,
    ) -> Fork:
        """Start `python` with these words: `-c CODE`, `-m MODULE` or a script's path, and arguments.

        before       Python that is run first, in the same namespace if it is followed by CODE
        environment  variables beside those that the server began with, None to take one away; what a library has set
                     in this process since then is not passed on. ValueError for one that a module has read
        folder       the working directory, this process's by default
        limit        bytes that a file may have at most (RLIMIT_FSIZE)
        """
        variables = {**self.environment, **(environment or {})}
        request = {
            "words": list(map(str, words)),
            "before": before,
            "environment": {name: value for name, value in variables.items() if value is not None},
            "folder": str(folder or Path.cwd()),
            "limit": limit,
        }
        pipes = [os.pipe() for _ in range(2)]
        try:
            answer = self._ask(request, [write for _, write in pipes])
        finally:
            for _, write in pipes:
                os.close(write)
        if "refused" in answer:
            for read, _ in pipes:
                os.close(read)
            raise ValueError(answer["refused"])
        out, err = (os.fdopen(read, "rb", buffering=0) for read, _ in pipes)
        return Fork(words=tuple(request["words"]), pid=answer["pid"], pipes=(out, err))

    def finish(self, *forks: Fork, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
        """What became of processes that were started; TimeoutExpired, and no process left, where they take longer."""
        end = time.monotonic() + timeout
        status: dict[int, int] = {}
        try:
            written = _read([pipe for fork in forks for pipe in fork.pipes], end)
            for fork in forks:
                status[fork.pid] = self._wait(fork.pid, end)
        except BaseException as error:
            for fork in forks:
                if fork.pid not in status:
                    stop(fork.pid)
                    self._wait(fork.pid, float("inf"))
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(["python", *forks[0].words], timeout) from error
            raise
        finally:
            for pipe in (pipe for fork in forks for pipe in fork.pipes):
                pipe.close()
        texts = [data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n") for data in written]
        return [
            subprocess.CompletedProcess(["python", *fork.words], status[fork.pid], out, err)
            for fork, out, err in zip(forks, texts[::2], texts[1::2], strict=True)
        ]

    def _wait(self, pid: int, end: float) -> int:
        pause = 0.001
        while (status := self._ask({"wait for": pid})["status"]) is None:
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return int(status)

    def _ask(self, message: dict[str, Any], descriptors: Iterable[int] = ()) -> dict[str, Any]:
        try:
            send(self._end, message, descriptors)
            return receive(self._end)[0]
        except (EOFError, OSError) as error:
            self._log.seek(0)
            raise RuntimeError(f"the server of forks has ended:\n{self._log.read()}") from error


def _read(pipes: list[IO[bytes]], end: float) -> list[bytes]:
    """Everything that is written to pipes, until each is closed at its other end; TimeoutError at `end`."""
    found = [bytearray() for _ in pipes]
    with selectors.DefaultSelector() as selector:
        for pipe, buffer in zip(pipes, found, strict=True):
            selector.register(pipe, selectors.EVENT_READ, buffer)
        while selector.get_map():
            ready = selector.select(max(0.0, end - time.monotonic()))
            if time.monotonic() > end:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                key.data.extend(data)
                if not data:
                    selector.unregister(key.fileobj)
    return [bytes(buffer) for buffer in found]


# ---- the server


def main() -> None:
    """Import, serve, and in each process that is forked, do what it was forked for, as the last thing."""
    end, log = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for number in (1, 2):  # sys.stdout and sys.stderr have begun as pipes, which they will be again
        os.dup2(log, number)
    os.close(log)
    sys.path[0] = ""  # where this file's folder is
    for module in sys.argv[3:]:
        importlib.import_module(module)
    tasks = Path("/proc/self/task")  # with those that are not Python's, where they are to be seen
    threads = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    if threads > 1:
        sys.exit(f"{threads} threads, and only the one that forks would go on in a fork: import less")
    del os.environ[NO_CUDA]
    gc.collect()
    gc.freeze()  # so that forks do not copy what they only look at
    request = serve(end)
    end.close()
    become(request)


def serve(end: socket.socket) -> dict[str, Any]:
    """Answer until the other end is closed, then leave; returns, in each process that is forked, what that is to do."""
    forks: set[int] = set()
    while True:
        try:
            request, descriptors = receive(end)
        except (EOFError, ConnectionError):
            leave(forks)
        if "wait for" in request:
            pid, status = os.waitpid(request["wait for"], os.WNOHANG)
            forks.discard(pid)
            send(end, {"status": os.waitstatus_to_exitcode(status) if pid else None})
            continue
        refused = read_before(request["environment"])
        pid = -1 if refused else os.fork()
        if pid == 0:
            os.setsid()
            for number, descriptor in enumerate(descriptors, 1):
                os.dup2(descriptor, number)
        for descriptor in descriptors:
            os.close(descriptor)
        if pid == 0:
            return request
        if refused:
            send(end, {"refused": refused})
        else:
            forks.add(pid)
            send(end, {"pid": pid})


def read_before(environment: Mapping[str, str]) -> str | None:
    """What is wrong with an environment: a variable that is another here, where a module has read it."""
    for module, starts in READ_AT_IMPORT.items():
        for name in sorted(environment.keys() | os.environ.keys()) if module in sys.modules else ():
            if name.startswith(starts) and environment.get(name) != os.environ.get(name):
                return f"{name} is read while {module} is imported, which it is: start a cold process"
    return None


def leave(forks: set[int]) -> NoReturn:
    """End with everything that is not waited for yet."""
    for pid in forks:
        stop(pid)
        os.waitpid(pid, 0)
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Make this process what a cold one would be at its start, and run the command."""
    sys.excepthook = without_this_file
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell had the tests ignore it
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    if "numpy" in sys.modules:  # random numbers that no one has seeded: others in each process
        sys.modules["numpy"].random.seed()
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    run(request["before"], *request["words"])


def run(before: str, kind: str, *words: str) -> None:
    """The command, in a new `__main__`: `python -c CODE`, `python -m MODULE`, or `python SCRIPT`."""
    space = types.ModuleType("__main__")
    space.__dict__.update(__annotations__={}, __builtins__=builtins)
    sys.modules["__main__"] = space
    sys.argv = [kind, *words]
    code: str | bytes = ""
    name = "<string>"
    if kind == "-c":
        code = sys.argv.pop(1)
    elif kind == "-m":
        del sys.argv[1]
        sys.path[0] = str(Path.cwd())
    else:
        code, name = Path(kind).read_bytes(), str(Path(kind).absolute())
        sys.path[0] = str(Path(name).parent)
        space.__dict__.update(__file__=name, __cached__=None)
    if before:
        exec(compile(before, "<before>", "exec"), space.__dict__)  # noqa: S102 - the tests' own
    if kind == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        exec(compile(code, name, "exec"), space.__dict__)  # noqa: S102


def without_this_file(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """A traceback as of a cold process, which begins with the command."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


if __name__ == "__main__":
    main()
