"""Memory: what this process holds and what the system has left, where it tells."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["available_memory", "resident_memory"]


def available_memory() -> int:
    """Bytes that can be had without swapping, as Linux estimates them; where no system says, as good as endless."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return sys.maxsize


def resident_memory() -> int | None:
    """Bytes of this process in memory, None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
