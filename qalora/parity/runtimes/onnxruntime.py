"""ONNX graphs in ONNX Runtime on the CPU: ours, and those of onnxruntime-genai's builder, which names inputs alike.

`onnxruntime` and `onnxruntime-gpu` share one import folder; with both installed the last one written wins, and nothing
else says so: `check_installed` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.errors import FormatError, InputError, MissingLibraryError
from qalora.parity.runtimes import RuntimeInfo

__all__ = ["check_installed", "open_artifact"]

EXACT = "session.qdq_matmulnbits_accuracy_level"
"""ONNX Runtime fuses DequantizeLinear + MatMul into MatMulNBits at level 4 (int8 activations) unless this says "1"."""

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def check_installed() -> str:
    """The installed distribution's name and version; InputError if there are two of them, or none."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) == 2:
        raise InputError(
            f"{found[0]} and {found[1]} are both installed, and they overwrite each other",
            todo="pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )
    if not found or importlib.util.find_spec("onnxruntime") is None:
        raise MissingLibraryError("onnxruntime", "running an ONNX artefact", "runtimes")
    return found[0]


class OnnxRuntime:
    """A decoder graph with a KV cache."""

    def __init__(self, path: Path, threads: int | None) -> None:
        installed = check_installed()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(EXACT, "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        model = path / "model.onnx" if path.is_dir() else path
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no error tree that could be named
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FormatError(f"{model}: ONNX Runtime does not load it ({reason})") from error
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        if "input_ids" not in self._inputs or "logits" not in self._outputs:
            raise FormatError(f"{model}", expected="a decoder with input_ids and logits", got=", ".join(self._inputs))
        name, _, number = installed.partition(" ")
        self.info = RuntimeInfo(
            name=name,
            version=number,
            backend="CPUExecutionProvider",
            dtype="float32",
            threads=threads or torch.get_num_threads(),
        )

    def _run(self, ids: Sequence[int], past: dict[str, Any], seen: int) -> tuple[Any, dict[str, Any]]:
        feed: dict[str, Any] = {}
        for name, node in self._inputs.items():
            kind = _NUMPY[node.type]
            if name == "input_ids":
                feed[name] = np.array([list(ids)], dtype=kind)
            elif name == "attention_mask":
                feed[name] = np.ones((1, seen + len(ids)), dtype=kind)
            elif name == "position_ids":
                feed[name] = np.arange(seen, seen + len(ids), dtype=kind)[None]
            elif name in past:
                feed[name] = past[name]
            else:
                shape = [1 if n == 0 else 0 if not isinstance(size, int) else size for n, size in enumerate(node.shape)]
                feed[name] = np.zeros(shape, dtype=kind)
        out = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        present = {name.replace("present", "past_key_values"): value for name, value in out.items() if name != "logits"}
        return out["logits"], present

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        out, _ = self._run(tokens, {}, 0)
        return torch.from_numpy(out[0]).float()

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        rows, past = [], dict[str, Any]()
        for seen, token in enumerate(tokens):
            out, past = self._run([token], past, seen)
            rows.append(torch.from_numpy(out[0]).float())
        return torch.cat(rows)

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        made: list[int] = []
        ids, past, seen = list(prompt), dict[str, Any](), 0
        while len(made) < max_tokens:
            out, past = self._run(ids, past, seen)
            seen += len(ids)
            made.append(int(out[0, -1].argmax()))
            ids = made[-1:]
        return made

    def close(self) -> None:
        """Free the session."""
        del self._session


def open_artifact(path: Path | Checkpoint, threads: int | None) -> OnnxRuntime:
    """Open a folder with model.onnx, or the file itself."""
    if not isinstance(path, Path):
        raise FormatError("onnxruntime", expected="an ONNX file or folder", got="a model in memory")
    return OnnxRuntime(path, threads)
