"""OpenVINO graphs that ask for no precision, as OpenVINO runs them by itself: what that loses is measured alone."""

from __future__ import annotations

from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters.openvino.files import options_of
from qalora.parity.runtimes.openvino import OpenvinoRuntime, graph_of

__all__ = ["open_artifact", "takes"]


def takes(path: Path, nbytes: int) -> bool:
    """Whether a graph leaves the precision to the runtime: `--openvino-precision fast`."""
    return not options_of(path)


def open_artifact(path: Path | Checkpoint, threads: int | None) -> OpenvinoRuntime:
    """Open a folder with openvino_model.xml, or the file itself."""
    return OpenvinoRuntime(graph_of(path), threads, {})
