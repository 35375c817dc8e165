"""What a user may choose where work is shared by several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qalora.options.fields import Options, option

__all__ = ["Sharing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing(Options):
    """Who does the work of a command. What comes out is the same."""

    jobs: int | None = option(
        None,
        "Processes that share the work. Default: 1, and with Ray as many as the cluster has CPUs.",
        low=1,
        metavar="N",
        expert=True,
    )
    engine: Literal["local", "ray"] = option(
        "local",
        "local: processes on this machine. ray: tasks on a Ray cluster, at RAY_ADDRESS if it is set.",
        expert=True,
    )
