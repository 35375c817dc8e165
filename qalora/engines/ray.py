"""A Ray cluster: pieces are tasks, and Ray does those of a process or machine that dies again.

The address comes from Ray's own environment (RAY_ADDRESS); without one, Ray begins on this machine. Models and outputs
lie where every machine of the cluster has them under the same path.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalora.engines import Piece, Result
from qalora.errors import EngineError, MissingLibraryError, first_line, shown

__all__ = ["Cluster", "cluster"]

ANSWER_SECONDS = 10
"""That a cluster has to answer."""

RETRIES = 3
"""Times that a piece is begun again after its process died."""


@contextmanager
def cluster(jobs: int | None) -> Iterator[Cluster]:
    """Connect to the cluster, unless this process is connected already, and leave it at the end."""
    try:
        import ray
    except ImportError as error:
        raise MissingLibraryError("ray", "`engine` ray", "ray") from error
    ours = not ray.is_initialized()
    if ours:
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks see the GPUs of their machine
        try:
            ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            address = os.environ.get("RAY_ADDRESS", "none")
            raise EngineError(
                "no connection to a Ray cluster", got=f"RAY_ADDRESS {address}: {first_line(error)}"
            ) from error
    try:
        yield Cluster(jobs or max(1, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        if ours:
            ray.shutdown()


def _check_address(address: str) -> None:
    """EngineError where nothing answers at host:port: Ray would wait for it for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # none, or one of Ray's words
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            "RAY_ADDRESS",
            expected="host:port of a Ray cluster that answers",
            got=f"{shown(address)} ({first_line(error)})",
            todo="begin the cluster with ray start, or unset it to use this machine alone",
        ) from error


class Cluster:
    """An engine of Ray's tasks, one CPU each."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def map(self, work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Result]]:
        """See `qalora.engines.Engine`."""
        import ray

        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_do)
        kept = ray.put(work)
        waiting = list(pieces)[::-1]
        running: dict[Any, Piece] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    piece = waiting.pop()
                    running[task.remote(kept, piece, str(Path.cwd()))] = piece
                (done, *_), _ = ray.wait(list(running))
                yield running.pop(done), _result(done)
        finally:
            for one in running:
                ray.cancel(one, force=True)


def _do(work: Callable[[Any], Any], piece: Any, folder: str) -> Any:
    """Do a piece in the folder of the process that asked, whose paths may be relative."""
    if Path(folder).is_dir():
        os.chdir(folder)
    return work(piece)


def _result(done: Any) -> Any:
    import ray

    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what `work` raised
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray gave a piece of the work up ({first_line(error)})") from error
