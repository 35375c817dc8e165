"""The runtimes by themselves: sentences for what is missing or clashes, and generation that follows the logits."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from in_node import IN_NODE, skip_without_node
from qalora.errors import FormatError, InputError, MissingLibraryError
from qalora.parity.runtimes import RUNTIMES, open_runtime
from qalora.parity.runtimes.onnxruntime import check_installed
from targets import OF_REAL_ZEROS, skip_without_mnn

TOKENS = [(7 * n) % 300 for n in range(20)]


@pytest.fixture(scope="module")
def artefacts(made: Callable[[str, str], Path], tiny: Path) -> dict[str, Path]:
    """What each runtime opens: one model in each format."""
    places = {form: made(form, "base") for form in OF_REAL_ZEROS}
    return {
        "torch": places["qalora"],
        "transformers": tiny,
        "onnxruntime": places["onnx"],
        "onnxruntime-cuda": places["onnx"],
        "onnx.reference": places["onnx"] / "portable",
        "onnxruntime-genai": places["onnx"],
        "openvino": places["openvino"],
        "openvino-fast": places["openvino"],
        "transformers.js": places["transformersjs"],
        "onnxruntime-web": places["transformersjs"],
        "llama.cpp": next(places["gguf"].glob("*.gguf")),
        "gptqmodel": places["gptq"],
        "mlx": places["mlx"],
        "hqq": places["hqq"],
        "torchao": places["torchao"],
        "mnn": places["mnn"],
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: generation on CUDA"),
            ]
            if kind == "onnxruntime-cuda"
            else [],
        )
        for kind in RUNTIMES
        # one gives no logits, the other wants a base of integer zero points: they have tests of their own
        if kind not in ("openvino-genai", "compressed-tensors")
    ],
)
def test_generation_follows_the_logits(kind: str, artefacts: dict[str, Path]) -> None:
    """Greedy tokens, made with the cache, are the best ones of one pass without it."""
    if kind == "hqq":
        pytest.importorskip("hqq", reason="pip install 'qalora[hqq]'")
    if kind == "mnn":
        skip_without_mnn()
    if kind in IN_NODE:
        skip_without_node()
    runtime = open_runtime(kind, artefacts[kind], threads=1)
    made = runtime.generate(TOKENS[:8], 6)
    assert len(made) == 6
    logits = runtime.logits([*TOKENS[:8], *made])
    assert logits.shape[0] == 14
    assert logits.dtype == torch.float32
    best = logits[7:13].topk(2).values
    clear = (best[:, 0] - best[:, 1]) > 0.05  # the two ways may sum, and round inputs, differently
    assert bool(clear.any())
    assert all(a == b for a, b, sure in zip(made, logits[7:13].argmax(1).tolist(), clear, strict=True) if sure)
    steps = runtime.steps([*TOKENS[:8], *made])
    assert steps.shape == logits.shape
    assert torch.equal(steps.argmax(1)[7:13][clear], logits.argmax(1)[7:13][clear])
    assert runtime.info.version
    assert runtime.info.threads >= 1
    runtime.close()


def test_a_runtime_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runtime: expected one of torch, transformers, llama\.cpp, .* got 'abacus'"):
        open_runtime("abacus", tmp_path)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("onnxruntime", "does not load it"),
        ("onnxruntime-genai", "does not load it"),
        ("gptqmodel", "expected model.safetensors or model.safetensors.index.json, got neither"),
        ("mlx", "does not load it"),
        ("openvino", "does not load it"),
        ("openvino-genai", "does not load it"),
    ],
)
def test_what_they_do_not_load_is_one_sentence(kind: str, sentence: str, tmp_path: Path) -> None:
    for name in ("model.onnx", "openvino_model.xml"):
        (tmp_path / name).write_bytes(b"nonsense")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FormatError, match=sentence) as caught:
        open_runtime(kind, tmp_path)
    assert "\n" not in str(caught.value)


def test_two_onnxruntimes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages' metadata are on the path, as after two pip installs; only pip can tell, and does not."""
    here = check_installed()
    name = "onnxruntime" if here.startswith("onnxruntime-gpu") else "onnxruntime-gpu"
    folder = tmp_path / f"{name.replace('-', '_')}-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert version(name) == "9.9"
    with pytest.raises(InputError, match="are both installed, and they overwrite each other; pip uninstall -y"):
        check_installed()


@pytest.mark.parametrize(
    ("kind", "absent", "words"),
    [
        ("llama.cpp", ("xllamacpp", "llama_cpp"), r"qalora\[llama-cpp\]"),
        ("gptqmodel", ("optimum",), r"optimum, which is not installed; pip install 'qalora\[gptq\]'"),
        ("onnxruntime-genai", ("onnxruntime_genai",), r"qalora\[genai\]"),
        ("openvino", ("openvino",), r"openvino, which is not installed; pip install 'qalora\[openvino\]'"),
        ("openvino-genai", ("openvino_genai",), r"openvino-genai, which is not installed; .*qalora\[openvino\]"),
        ("hqq", ("hqq",), r"hqq, which is not installed; pip install 'qalora\[hqq\]'"),
        ("mlx", ("mlx_lm",), r"mlx-lm, which is not installed; pip install 'qalora\[mlx\]'"),
        ("mlx", ("mlx",), r"needs mlx, which is not installed; pip install 'qalora\[mlx\]'"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    kind: str, absent: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    with pytest.raises(MissingLibraryError, match=words):
        open_runtime(kind, tmp_path)
