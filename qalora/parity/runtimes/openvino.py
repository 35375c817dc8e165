"""OpenVINO graphs on the CPU, with the options that keep it at float32: ours, and those that optimum makes.

What a graph asks for itself in its runtime_options is not asked: a proof is of what the artefact holds, and says which
options it ran with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.converters.openvino.decoder import layer_end
from qalora.converters.openvino.files import EXACT_OPTIONS, MODEL
from qalora.errors import FormatError, first_line
from qalora.parity.ends import RuntimeEnds
from qalora.parity.runtimes import RuntimeInfo, Tokenizing, check_libraries
from qalora.parity.runtimes.padding import pad, positions, unpad
from qalora.parity.runtimes.stepping import greedy

__all__ = ["OpenvinoRuntime", "graph_of", "open_artifact"]

_NUMPY = {"i64": np.int64, "i32": np.int32}


class OpenvinoRuntime:
    """A graph with input_ids, whose cache is its state. options: what OpenVINO is told of its precision.

    Its products add their terms one after the other, as oneDNN's kernels do. On 256 to 4096 columns their error was
    1.9 to 3.5 times torch's, and `roundings.running_sum` says 2.2 to 3.
    """

    running_sums = True
    words: Tokenizing | None = None

    def __init__(self, file: Path, threads: int | None, options: Mapping[str, str] = EXACT_OPTIONS) -> None:
        self._file, self._threads = file, threads or torch.get_num_threads()
        self._options = options
        self._open: Any = None
        compiled = self._compiled()
        self._request: Any = compiled.create_infer_request()
        self.info = RuntimeInfo(
            name="openvino",
            version=version("openvino"),
            backend="CPU",
            dtype="float32" if options else compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
            threads=self._threads,
        )

    def _compiled(self, outputs: Sequence[str] = ()) -> Any:
        """The graph, compiled; with the outputs of these layers too."""
        import openvino

        core = openvino.Core()
        options = {**self._options, "INFERENCE_NUM_THREADS": self._threads}
        try:
            model = core.read_model(self._file)
            if outputs:
                model.add_outputs([(name, 0) for name in outputs])
            self._open = core.compile_model(model, "CPU", options)
        except Exception as error:  # the library raises what it likes
            raise FormatError(f"{self._file}: OpenVINO does not load it ({_reason(error)})") from error
        self._inputs = {port.any_name: port.element_type.get_type_name() for port in self._open.inputs}
        if "input_ids" not in self._inputs:
            got = ", ".join(self._inputs) or "no inputs"
            raise FormatError(f"{self._file}", expected="a decoder with input_ids and logits", got=got)
        return self._open

    def _run(self, ids: Tensor, mask: Tensor, request: Any = None) -> list[Any]:
        """All outputs, for new tokens [batch, new] behind those of the state; the mask is over all of them."""
        batch, new = ids.shape
        known = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask)[:, mask.shape[1] - new :],
            "beam_idx": torch.arange(batch),
        }
        unknown = sorted(self._inputs.keys() - known.keys())
        if unknown:
            raise FormatError(f"{self._file}: inputs", expected=", ".join(known), got=", ".join(unknown))
        feed = {name: known[name].numpy().astype(_NUMPY[kind]) for name, kind in self._inputs.items()}
        request = request or self._request
        try:
            request.infer(feed)
        except Exception as error:  # as above
            raise FormatError(f"{self._file}: OpenVINO does not run it ({_reason(error)})") from error
        return [request.get_output_tensor(n).data.copy() for n in range(len(request.model_outputs))]

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(self._run(ids, mask)[0]).float()

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary]."""
        self._request.reset_state()
        return self._logits(torch.tensor([list(tokens)]), torch.ones(1, len(tokens), dtype=torch.int64))[0]

    def steps(self, tokens: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], a token at a time."""
        self._request.reset_state()
        ones = torch.ones(1, len(tokens), dtype=torch.int64)
        return torch.cat([self._logits(torch.tensor([[token]]), ones[:, : n + 1])[0] for n, token in enumerate(tokens)])

    def batch(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each sequence, from one batch padded on the left."""
        self._request.reset_state()
        return unpad(self._logits(*pad(sequences, "left")), sequences, "left")

    def layers(self, tokens: Sequence[int]) -> list[Tensor]:
        """float32 [tokens, hidden] after each layer: the graph is compiled again, with these outputs."""
        import openvino

        names = {op.get_friendly_name() for op in openvino.Core().read_model(self._file).get_ops()}
        known = list(takewhile(names.__contains__, map(layer_end, count())))
        if not known:
            return []
        self.close()
        request = self._compiled(known).create_infer_request()
        outputs = self._run(torch.tensor([list(tokens)]), torch.ones(1, len(tokens), dtype=torch.int64), request)
        self._request = request
        return [torch.from_numpy(output[0]).float() for output in outputs[1:]]

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, step by step with the cache."""
        self._request.reset_state()

        def step(ids: list[int], before: int) -> Tensor:
            return self._logits(torch.tensor([ids]), torch.ones(1, before + len(ids), dtype=torch.int64))[0]

        return greedy(step, prompt, max_tokens)

    def ends(self) -> RuntimeEnds | None:
        """None: a graph has no end; openvino-genai, which generates, says it."""
        return None

    def close(self) -> None:
        """Free the model."""
        self._request = self._open = None


def _reason(error: Exception) -> str:
    """The line of OpenVINO's error that says something: the first ones name its own source files."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines or [first_line(error)])[0][:200]


def graph_of(path: Path | Checkpoint) -> Path:
    """The graph of a folder, or the file itself; MissingLibraryError if OpenVINO is not installed."""
    check_libraries("openvino")
    if not isinstance(path, Path):
        raise FormatError("openvino", expected="an OpenVINO graph or folder", got="a model in memory")
    return path / MODEL if path.is_dir() else path


def open_artifact(path: Path | Checkpoint, threads: int | None) -> OpenvinoRuntime:
    """Open a folder with openvino_model.xml, or the file itself."""
    return OpenvinoRuntime(graph_of(path), threads)
