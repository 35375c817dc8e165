"""ONNX graphs in ONNX Runtime: ours, and those of onnxruntime-genai's builder, which names inputs alike and leaves the
head size of its cache open.

`onnxruntime` and `onnxruntime-gpu` share one import folder; with both installed the last one written wins, and nothing
else says so: `check_installed` does.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.huggingface import read_config
from qalora.errors import FormatError, InputError, MissingLibraryError, first_line
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, Tokenizing
from qalora.parity.runtimes.padding import Side, pad, positions, unpad
from qalora.parity.runtimes.stepping import greedy

__all__ = ["DecoderRuntime", "OnnxRuntime", "check_installed", "open_artifact"]

EXACT = "session.qdq_matmulnbits_accuracy_level"
"""ONNX Runtime fuses DequantizeLinear + MatMul into MatMulNBits at level 4 (int8 activations) unless this says "1"."""

FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the weights of a graph lie that is opened from memory."""

LAYER = re.compile(r"layer(\d+)\.end(\.sum)?")
"""What our graphs call the output of a layer."""

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def check_installed() -> str:
    """The installed distribution's name and version; InputError if there are two of them, or none."""
    distributions = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            distributions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(distributions) == 2:
        raise InputError(
            f"{distributions[0]} and {distributions[1]} are both installed, and they overwrite each other",
            todo="pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )
    if not distributions or importlib.util.find_spec("onnxruntime") is None:
        raise MissingLibraryError("onnxruntime", "running an ONNX artefact", "runtimes")
    return distributions[0]


class DecoderRuntime(ABC):
    """A decoder graph with a KV cache, whatever evaluates it: inputs are bound by name, and filled by what they are.

    inputs   {name: (element type as ONNX Runtime writes it, shape with names for sizes that vary)}
    outputs  names
    padding  the side on which the graph takes shorter sequences of a batch: GroupQueryAttention counts the ones of the
             mask from the left, so that it takes them on the right only
    head_size  of the cache, where its shape leaves that open
    """

    info: RuntimeInfo
    words: Tokenizing | None = None

    def __init__(
        self,
        inputs: Mapping[str, tuple[str, Sequence[Any]]],
        outputs: Sequence[str],
        padding: Side,
        head_size: int = 0,
    ) -> None:
        self._inputs, self._outputs = dict(inputs), list(outputs)
        self._padding, self._head_size = padding, head_size

    @abstractmethod
    def _evaluate(self, outputs: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        """Values of the outputs."""

    @abstractmethod
    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer."""

    def ends(self) -> RuntimeEnds | None:
        """None: a graph has no end; onnxruntime-genai, which generates, says it."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the graph."""

    def _feed(self, ids: Tensor, mask: Tensor, past: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs for new tokens [batch, new] behind those of `past`; the mask is over all of them."""
        batch, new = ids.shape
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, mask.shape[1] - new :]}
        feed: dict[str, Any] = {}
        for name, (kind, shape) in self._inputs.items():
            dtype = _NUMPY[kind]
            if name in known:
                feed[name] = known[name].numpy().astype(dtype)
            elif name in past:
                feed[name] = past[name]
            else:
                feed[name] = np.zeros(self._empty(shape, batch), dtype=dtype)
        return feed

    def _empty(self, shape: Sequence[Any], batch: int) -> list[int]:
        """The shape of an empty cache: no positions, and the head size, which a graph may leave open."""
        sizes = [size if isinstance(size, int) else 0 for size in shape]
        sizes[0] = batch
        if len(shape) > 2 and not isinstance(shape[-1], int):
            sizes[-1] = self._head_size
        return sizes

    def _run(self, ids: Sequence[int], past: Mapping[str, Any], position: int) -> tuple[Tensor, dict[str, Any]]:
        """float32 logits [tokens, vocabulary] of one sequence, and its cache."""
        mask = torch.ones(1, position + len(ids), dtype=torch.int64)
        values = self._evaluate(self._outputs, self._feed(torch.tensor([list(ids)]), mask, past))
        out = dict(zip(self._outputs, values, strict=True))
        present = {name.replace("present", "past_key_values"): value for name, value in out.items() if name != "logits"}
        return torch.from_numpy(out["logits"][0]).float(), present

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        return self._run(tokens, {}, 0)[0]

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        rows, past = [], dict[str, Any]()
        for position, token in enumerate(tokens):
            out, past = self._run([token], past, position)
            rows.append(out)
        return torch.cat(rows)

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, from one padded batch."""
        (logits,) = self._evaluate(["logits"], self._feed(*pad(sequences, self._padding), {}))
        return unpad(torch.from_numpy(logits).float(), sequences, self._padding)

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        past: dict[str, Any] = {}

        def step(ids: list[int], before: int) -> Tensor:
            nonlocal past
            out, past = self._run(ids, past, before)
            return out

        return greedy(step, prompt, max_tokens)


class OnnxRuntime(DecoderRuntime):
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None, provider: str = "CPUExecutionProvider") -> None:
        installed = check_installed()
        self._file = path / "model.onnx" if path.is_dir() else path
        self._threads = threads or torch.get_num_threads()
        self._providers: list[Any] = [provider]
        if provider == "CUDAExecutionProvider":  # without TF32, whose products have 11 significant bits
            self._providers = [(provider, {"use_tf32": "0"}), "CPUExecutionProvider"]
        self._open: Any = None
        inputs = {node.name: (node.type, node.shape) for node in self._session.get_inputs()}
        outputs = [node.name for node in self._session.get_outputs()]
        if "input_ids" not in inputs or "logits" not in outputs:
            raise FormatError(f"{self._file}", expected="a decoder with input_ids and logits", got=", ".join(inputs))
        unknown = sorted({kind for kind, _ in inputs.values()} - _NUMPY.keys())
        if unknown:
            raise FormatError(f"{self._file}: inputs", expected=", ".join(_NUMPY), got=", ".join(unknown))
        super().__init__(inputs, outputs, _padding(self._file), _head_size(self._file.parent))
        name, _, number = installed.partition(" ")
        self.info = RuntimeInfo(
            name=name,
            version=number,
            backend=self._session.get_providers()[0],
            dtype="float16" if any(kind == "tensor(float16)" for kind, _ in inputs.values()) else "float32",
            threads=self._threads,
        )

    @property
    def _session(self) -> Any:
        """The graph in ONNX Runtime, opened where it is not open."""
        import onnxruntime

        if self._open is None:
            options = self._options()
            try:
                self._open = onnxruntime.InferenceSession(str(self._file), options, providers=self._providers)
            except Exception as error:  # onnxruntime has no error tree that could be named
                raise _refused(self._file, "load", error) from error
        return self._open

    def _options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(EXACT, "1")
        options.intra_op_num_threads = self._threads
        return options

    def _evaluate(self, outputs: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        try:
            values: list[Any] = self._session.run(outputs, feed)
        except Exception as error:  # as above
            raise _refused(self._file, "run", error) from error
        return values

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer: from another session, whose graph has these outputs too. The first
        one is closed for it, as two take twice the memory.
        """
        import onnx
        import onnxruntime

        model = onnx.load(str(self._file), load_external_data=False)
        names = [name for node in model.graph.node for name in node.output if LAYER.fullmatch(name)]
        if not names:
            return []
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
        )
        options = self._options()
        options.add_session_config_entry(FOLDER, str(self._file.parent.resolve()))
        self.close()
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=self._providers)
        feed = self._feed(torch.tensor([list(tokens)]), torch.ones(1, len(tokens), dtype=torch.int64), {})
        return [torch.from_numpy(output[0]).float() for output in session.run(names, feed)]

    def close(self) -> None:
        """Free the session; it is opened again where it is needed."""
        self._open = None


def _refused(file: Path, verb: str, error: Exception) -> FormatError:
    reason = first_line(error)
    return FormatError(f"{file}: ONNX Runtime does not {verb} it ({reason})")


def _padding(file: Path) -> Side:
    import onnx

    nodes = onnx.load(str(file), load_external_data=False).graph.node
    return "right" if any(node.op_type == "GroupQueryAttention" for node in nodes) else "left"


def _head_size(folder: Path) -> int:
    """What genai_config.json or config.json says; 0 where neither does."""
    for name in ("genai_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        config = read_config(folder, name)
        model = config.get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        size = decoder.get("head_size") if isinstance(decoder, dict) else config.get("head_dim")
        if isinstance(size, int) and 0 < size < 1 << 16:
            return size
    return 0


def open_artifact(path: Path | Checkpoint, threads: int | None) -> OnnxRuntime:
    """Open a folder with model.onnx, or the file itself."""
    if not isinstance(path, Path):
        raise FormatError("onnxruntime", expected="an ONNX file or folder", got="a model in memory")
    return OnnxRuntime(path, threads)
