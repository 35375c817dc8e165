"""A proof leaves the process as it found it: logs, progress bars, environment, warnings, random numbers; errors too."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from in_node import IN_NODE, skip_without_node
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import FormatError
from qalora.parity import verify
from qalora.parity.runtimes import RUNTIMES, open_runtime
from qalora.parity.runtimes.settings import keep_settings, quiet
from qalora.testing import byte_tokenizer, tiny_llama
from targets import OF_REAL_ZEROS, skip_without_mnn


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    """What these tests set."""
    level, bars, hub = transformers_logging.get_verbosity(), True, not are_progress_bars_disabled()
    yield
    transformers_logging.set_verbosity(level)
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if hub else disable_progress_bars)()


def state() -> dict[str, Any]:
    """What a library may change of the process."""
    return {
        "verbosity": transformers_logging.get_verbosity(),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "bars of the Hub": not are_progress_bars_disabled(),
        "environment": dict(os.environ),
        "root": (logging.root.level, list(logging.root.handlers)),
        "loggers": {
            name: (one.level, one.propagate, one.disabled, len(one.handlers))
            for name, one in sorted(logging.root.manager.loggerDict.items())
            if isinstance(one, logging.Logger)
        },
        "filters": list(warnings.filters),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "signals": signal_stack(),
    }


def signal_stack() -> str:
    """Where Linux puts the frame of a signal's handler; "" elsewhere."""
    if sys.platform != "linux":
        return ""
    stack = ctypes.create_string_buffer(24)
    assert ctypes.CDLL(None).sigaltstack(None, stack) == 0
    return stack.raw.hex()


def assert_as_before(before: dict[str, Any]) -> None:
    now = state()
    now["loggers"] = {name: value for name, value in now["loggers"].items() if name in before["loggers"]}
    assert {key for key in before if now[key] != before[key]} == set()


def choose(level: int, *, bars: bool, hub: bool) -> None:
    transformers_logging.set_verbosity(level)
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if hub else disable_progress_bars)()


CHOICES = [
    (level, bars, hub) for level in (logging.INFO, logging.ERROR) for bars in (True, False) for hub in (True, False)
]


@pytest.mark.parametrize(("level", "bars", "hub"), CHOICES)
@pytest.mark.parametrize("fails", [False, True])
def test_quiet_is_for_a_while(level: int, bars: bool, hub: bool, fails: bool) -> None:
    choose(level, bars=bars, hub=hub)
    before = state()
    try:
        with quiet():
            assert transformers_logging.get_verbosity() == logging.ERROR
            assert not transformers_logging.is_progress_bar_enabled()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert_as_before(before)


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_library_changes_is_undone(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setenv("OURS", "1")
    before = state()
    try:
        with keep_settings():
            os.environ["THEIRS"] = "1"
            del os.environ["OURS"]
            logging.basicConfig(level=logging.DEBUG, force=True)
            logging.getLogger("transformers").setLevel(logging.CRITICAL)
            logging.getLogger("urllib3").addHandler(logging.NullHandler())
            warnings.simplefilter("always")
            torch.rand(3), np.random.rand(3), random.random()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert_as_before(before)


ARTEFACTS = {
    "torch": "qalora",
    "onnxruntime": "onnx",
    "onnx.reference": "onnx/portable",
    "onnxruntime-genai": "onnx",
    "openvino": "openvino",
    "openvino-genai": "talking/openvino",
    "transformers.js": "transformersjs",
    "onnxruntime-web": "transformersjs",
    "llama.cpp": "gguf",
    "gptqmodel": "gptq",
    "mlx": "mlx",
    "hqq": "hqq",
    "torchao": "torchao",
    "mnn": "mnn",
    "compressed-tensors": "compressed-tensors",
    "transformers": "",
}


@pytest.fixture(scope="module")
def artefacts(tiny: Path, base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kept")
    export(base, OF_REAL_ZEROS, folder)
    talking = tiny_llama(folder / "talking" / "float", tokenizer=byte_tokenizer())
    export(load(talking), ["openvino"], folder / "talking")
    export(base, ["compressed-tensors"], folder, ExportOptions(allow_loss=frozenset({"zeros"})))
    found = {kind: folder / place for kind, place in ARTEFACTS.items()}
    return {**found, "transformers": tiny, "llama.cpp": next((folder / "gguf").glob("*.gguf"))}


def test_every_runtime_is_tried_here() -> None:
    assert set(ARTEFACTS) == set(RUNTIMES) - {"onnxruntime-cuda", "openvino-fast"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ARTEFACTS)
def test_a_proof_in_each_runtime(kind: str, artefacts: dict[str, Path], base: Checkpoint) -> None:
    if kind == "hqq":
        pytest.importorskip("hqq", reason="pip install 'qalora[hqq]'")
    if kind == "mnn":
        skip_without_mnn()
    if kind in IN_NODE:
        skip_without_node()
    choose(logging.INFO, bars=True, hub=True)
    before = state()
    reference = load(artefacts[kind]) if kind == "openvino-genai" else base  # it takes none without a tokenizer
    report = verify(reference, [artefacts[kind]], tokens=[5, 6, 7, 8] * 4, generate=2, threads=1)
    assert kind in {run.kind for run in report.artifacts[0].runs if run.runtime is not None}
    assert_as_before(before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvino", "openvino-genai"])
def test_an_open_runtime_leaves_signals_where_they_were(kind: str, artefacts: dict[str, Path]) -> None:
    """OpenVINO gives the thread a stack for signals, and frees it with the model; where another thread does that, the
    next signal, such as Ctrl-C, would end the process.
    """
    before = signal_stack()
    runtime = open_runtime(kind, artefacts[kind], threads=1)
    assert signal_stack() == before
    assert len(runtime.generate([5, 6, 7], 3)) == 3
    with ThreadPoolExecutor(1) as pool:
        pool.submit(runtime.close).result()
    assert signal_stack() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gptqmodel", "mlx", "onnxruntime", "llama.cpp"])
def test_a_runtime_that_refuses(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    for name in ("model.onnx", "model.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"no model")
    choose(logging.WARNING, bars=True, hub=True)
    before = state()
    with pytest.raises(FormatError):
        open_runtime(kind, tmp_path / "model.gguf" if kind == "llama.cpp" else tmp_path)
    assert_as_before(before)
