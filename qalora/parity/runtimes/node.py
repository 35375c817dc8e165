"""What runs in Node: a process of it with a script of ours, which takes orders as lines of JSON.

Its packages are those of NODE_PATH, and no others: what lies in the folder that a proof is started in is not run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, MissingLibraryError, QaloraError, shown
from qalora.formats.json_text import read_json_object
from qalora.node_packages import installing, package_folder
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RUNTIMES, RuntimeInfo, Tokenizing
from qalora.parity.runtimes.padding import pad, unpad
from qalora.parity.runtimes.stepping import greedy

__all__ = ["NodeRuntime", "check_packages", "folder_of", "node_versions"]

SCRIPT = Path(__file__).with_name("transformersjs.mjs")
LIMIT = 1 << 20


class NodeRuntime:
    """A folder for transformers.js in a process of Node.

    backend  "cpu": transformers.js with onnxruntime-node; "wasm": onnxruntime-web, which it brings
    """

    follows = frozenset({"text", "chat", "token", "around"})
    words: Tokenizing | None = None

    def __init__(self, kind: str, folder: Path, backend: str, threads: int) -> None:
        node = check_packages(kind)
        self._folder, self._kind = folder, kind
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [node, str(SCRIPT), str(folder.resolve()), backend, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            opened, _ = self._ask({"do": "open"}, "load")
        except BaseException:
            self.close()
            raise
        self._opened = opened
        self.words = self if opened["worded"] else None
        self.info = RuntimeInfo(name=kind, version=opened["version"], backend=backend, dtype="float32", threads=threads)

    def _ask(self, order: Mapping[str, Any], verb: str) -> tuple[dict[str, Any], bytes]:
        """What the script answers to an order, and the bytes behind it; FormatError for an error of the library."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ValueError("the runtime is closed")
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            reason = f"Node ended with status {process.wait()}"
            raise FormatError(f"{self._folder}: {self._kind} does not {verb} it ({reason})")
        content: dict[str, Any] = json.loads(line)
        if "error" in content:
            raise FormatError(f"{self._folder}: {self._kind} does not {verb} it ({shown(content['error'])})")
        return content, _exactly(process.stdout, content["bytes"])

    def _run(self, ids: Tensor, mask: Tensor, *, onwards: bool = False) -> Tensor:
        """float32 [batch, new, vocabulary] for new tokens, behind those of the run before where it goes onwards."""
        order = {"do": "run", "ids": ids.tolist(), "mask": mask.tolist(), "onwards": onwards}
        content, data = self._ask(order, "run")
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(content["shape"])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        ids = torch.tensor([list(tokens)])
        return self._run(ids, torch.ones_like(ids))[0]

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        ids = torch.tensor([list(tokens)])
        ones = torch.ones_like(ids)
        return torch.cat([self._run(ids[:, n : n + 1], ones[:, : n + 1], onwards=n > 0)[0] for n in range(len(tokens))])

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, from one batch that is padded on the right, as the graph wants
        it.
        """
        return unpad(self._run(*pad(sequences, "right")), sequences, "right")

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """Nothing: the library does not tell."""
        return []

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, by the library's own loop; stops at an end token."""
        content, _ = self._ask({"do": "generate", "ids": list(prompt), "count": max_tokens}, "run")
        return [int(token) for token in content["tokens"]]

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""

        def step(ids: list[int], before: int) -> Tensor:
            mask = torch.ones(1, before + len(ids), dtype=torch.int64)
            return self._run(torch.tensor([ids]), mask, onwards=before > 0)[0]

        return greedy(step, prompt, max_tokens)

    def tokenize(self, text: str, *, special: bool = False, around: bool = False) -> list[int]:
        """The tokens of a text; special ones are always parsed."""
        content, _ = self._ask({"do": "tokens", "text": text, "around": around}, "run")
        return [int(token) for token in content["tokens"]]

    def ends(self) -> RuntimeEnds | None:
        """What the library's generate ends at."""
        return RuntimeEnds(ids=frozenset(self._opened["ends"]))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count) if count else b""
    if len(data) != count:
        raise FormatError("Node", expected=f"{count} bytes", got=str(len(data)))
    return data


def folder_of(kind: str, path: Path | Checkpoint) -> Path:
    """The folder that a runtime of Node opens; FormatError for a model in memory."""
    if not isinstance(path, Path):
        raise FormatError(kind, expected="a folder for transformers.js", got="a model in memory")
    return path


def check_packages(kind: str) -> str:
    """The path of Node; MissingLibraryError where it, or a package that a runtime of RUNTIMES has to have, is not
    there.
    """
    parts = RUNTIMES[kind]
    node = shutil.which("node")
    if node is None:
        raise MissingLibraryError("Node", parts.purpose, "", todo="install Node 20 or newer")
    package = parts.node[0]
    if package_folder(package) is None:
        raise MissingLibraryError(package, parts.purpose, "", todo=installing(package))
    return node


def node_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of Node's packages that are there."""
    found = {}
    for name in packages:
        folder = package_folder(name)
        if folder is not None:
            found[name] = _version(folder)
    return found


def _version(folder: Path) -> str:
    try:
        version = read_json_object(folder / "package.json", LIMIT).get("version")
    except QaloraError:
        version = None
    return version if isinstance(version, str) else "unknown"
