"""Open every artefact of a release in its runtime, each in a fresh process, and run a few tokens.

A fresh process has no module, no cache and no setting that made the artefact, and one that crashes takes nothing along.
`python -m qalora.releasing.opening` is that process: it reads a request as JSON from stdin and writes a reply.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora.errors import InputError, MissingLibraryError
from qalora.releasing.findings import Finding

__all__ = ["open_all"]

TOKENS = (1, 2, 3, 4)
"""Token ids that every vocabulary has."""

TIMEOUT = 1800
"""Seconds after which a runtime counts as hung."""


def open_all(
    folder: Path, *, progress: Callable[[str], None] = lambda name: None
) -> tuple[list[Finding], list[tuple[str, str]]]:
    """Findings, and (artefact, why) for each that was not opened because its runtime is not installed."""
    from qalora.parity.artifacts import recognize

    try:
        artifacts = recognize([folder], relative_to=folder)
    except InputError as error:
        return [Finding(where=folder.name, problem=str(error))], []
    findings, unproven = [], []
    for artifact in artifacts:
        for kind in artifact.layout.runtimes:
            progress(f"{artifact.name} in {kind}")
            lora = None if artifact.lora is None else str(artifact.lora)
            reply = _ask({"path": str(artifact.path), "runtime": kind, "lora": lora})
            if reply.get("missing"):
                unproven.append((f"{artifact.name} in {kind}", str(reply["missing"])))
            elif reply.get("problem"):
                findings.append(Finding(where=f"{artifact.name} in {kind}", problem=str(reply["problem"])))
    return findings, unproven


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "qalora.releasing.opening"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"it did not answer within {TIMEOUT} seconds"}
    lines = done.stdout.strip().splitlines()
    try:
        reply = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"problem": f"the process that opened it ended with status {done.returncode}: {last[:300]}"}
    return reply if isinstance(reply, dict) else {"problem": "the process that opened it gave no readable answer"}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Open and run one artefact; what goes wrong in a runtime, whatever it is, is the answer."""
    import torch

    from qalora.parity.runtimes import open_runtime

    lora = None if request["lora"] is None else Path(request["lora"])
    try:
        runtime = open_runtime(request["runtime"], Path(request["path"]), lora=lora)
        try:
            logits = runtime.logits(TOKENS)
        finally:
            runtime.close()
    except MissingLibraryError as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"problem": f"it does not open: {str(error) or type(error).__name__}"[:600]}
    if logits.shape[0] != len(TOKENS) or not bool(torch.isfinite(logits).all()):
        return {"problem": "its logits are not finite"}
    return {"problem": ""}


def main() -> None:
    """The fresh process. Runtimes chat on stdout: the reply is the last line."""
    reply = _answer(json.load(sys.stdin))
    sys.stdout.write(f"\n{json.dumps(reply)}\n")


if __name__ == "__main__":
    main()
