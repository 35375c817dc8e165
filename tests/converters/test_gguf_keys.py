"""Keys of GGUF files that other programs write, or wrote: llama.cpp's own logits of the same file are the oracle."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gguf_files import Keys, rewritten
from qalora import export
from qalora.converters import load
from qalora.errors import InputError
from qalora.parity.runtimes.llamacpp import LlamaCpp
from qalora.testing import tiny_model

U, F, B, S = (getattr(gguf.GGUFValueType, name) for name in ("UINT32", "FLOAT32", "BOOL", "STRING"))
ONES = np.ones(64, dtype=np.float32)
TOKENS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the F32 file of a tiny model of a family, made once."""
    files: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in files:
            place = tmp_path_factory.mktemp("keys")
            export(load(tiny_model(place / "model", family)), "gguf", place / "out")
            (files[family],) = (place / "out" / "gguf").glob("*.gguf")
        return files[family]

    return get


def llama_cpp(path: Path) -> torch.Tensor:
    runtime = LlamaCpp(path, 1)
    try:
        return runtime.logits(TOKENS.tolist()).double()
    finally:
        runtime.close()


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


CLOSE = {"gemma2": 2.0**-6, "gemma3_text": 2.0**-6}
"""ggml's gelu is a table of float16, 2^-11 for each of its values, which the layers after it add up. Elsewhere F32
tensors leave float32's noise, far below 2^-14. What a key that is read otherwise changes is 2^-4 and more."""

LINEAR: Keys = {"rope.scaling.type": ("linear", S)}
YARN: Keys = {"rope.scaling.type": ("yarn", S), "rope.scaling.original_context_length": (16, U)}
FACTOR: Keys = {"rope.scaling.factor": (4.0, F)}

SAME: dict[str, tuple[str, Keys, tuple[str, ...]]] = {
    "scale_linear": ("llama", {"rope.scale_linear": (4.0, F)}, ()),
    "scale_linear in a qwen2": ("qwen2", {"rope.scale_linear": (4.0, F)}, ()),
    "a factor without a type": ("llama", FACTOR, ()),
    "a factor without a type in a qwen3": ("qwen3", FACTOR, ()),
    "a factor without a type in a gemma2": ("gemma2", FACTOR, ()),
    "a factor without a type in a gemma3": ("gemma3_text", FACTOR, ()),
    "a factor without a type in a smollm3": ("smollm3", FACTOR, ()),
    "both names of the factor": ("llama", {**FACTOR, "rope.scale_linear": (2.0, F)}, ()),
    "both names, and a type": ("llama", {**LINEAR, **FACTOR, "rope.scale_linear": (2.0, F)}, ()),
    "a factor of 0": ("llama", {"rope.scaling.factor": (0.0, F), "rope.scale_linear": (2.0, F)}, ()),
    "a factor that type none switches off": ("llama", {**FACTOR, "rope.scaling.type": ("none", S)}, ()),
    "linear without a factor": ("llama", LINEAR, ()),
    "an old factor of 0": ("llama", {"rope.scale_linear": (0.0, F)}, ()),
    "an original context without yarn": ("llama", {"rope.scaling.original_context_length": (8, U)}, ()),
    "the size of the vocabulary": ("llama", {"vocab_size": (256, U)}, ()),
    "longrope without lists": ("llama", {**FACTOR, "rope.scaling.type": ("longrope", S)}, ()),
    "yarn without a factor": ("llama", YARN, ()),
    "yarn with the old name of the factor": ("llama", {**YARN, "rope.scale_linear": (4.0, F)}, ()),
    "yarn, no original context": ("qwen2", {**FACTOR, "rope.scaling.type": ("yarn", S)}, ()),
    "yarn, attn_factor": ("llama", {**YARN, **FACTOR, "rope.scaling.attn_factor": (1.5, F)}, ()),
    "finetuned": ("llama", {**LINEAR, **FACTOR, "rope.scaling.finetuned": (True, B)}, ()),
    "no base": ("llama", {}, ("rope.freq_base",)),
    "no base in a gemma2": ("gemma2", {}, ("rope.freq_base",)),
    "no base of windows in a gemma3": ("gemma3_text", {}, ("rope.freq_base_swa",)),
    "no count of rotated elements": ("llama", {}, ("rope.dimension_count",)),
    "no lengths of keys": ("llama", {}, ("attention.key_length", "attention.value_length")),
    "no window in a gemma2": ("gemma2", {}, ("attention.sliding_window",)),
    "a pattern of windows in a gemma2": ("gemma2", {"attention.sliding_window_pattern": (3, U)}, ()),
    "a pattern of windows in a gemma3": ("gemma3_text", {"attention.sliding_window_pattern": (3, U)}, ()),
    "a window in a llama": ("llama", {"attention.sliding_window": (3, U)}, ()),
    "a window in a qwen2": ("qwen2", {"attention.sliding_window": (3, U)}, ()),
    "a window in a phi3": ("phi3", {"attention.sliding_window": (3, U), "context_length": (64, U)}, ()),
    "no caps in a gemma2": ("gemma2", {}, ("attn_logit_softcapping", "final_logit_softcapping")),
    "a cap of logits in a gemma3": ("gemma3_text", {"final_logit_softcapping": (3.0, F)}, ()),
    "zeros": ("llama", {"expert_count": (0, U), "attention.scale": (0.0, F), "nextn_predict_layers": (0, U)}, ()),
}
"""Files that are read: family, keys, and keys that they do not have."""


@pytest.mark.parametrize("case", SAME)
def test_keys_are_read_as_llama_cpp_reads_them(
    case: str, made: Callable[[str], Path], tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    family, keys, gone = SAME[case]
    path = rewritten(made(family), tmp_path / "model.gguf", keys, gone)
    assert distance(by_decoder(load(path), TOKENS), llama_cpp(path)) < CLOSE.get(family, 2.0**-14)


@pytest.mark.parametrize("case", ["scale_linear", "a factor without a type", "both names of the factor"])
def test_what_counts_is_noted_and_goes_on(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """A file that is written from it says the same to llama.cpp."""
    family, keys, gone = SAME[case]
    path = rewritten(made(family), tmp_path / "model.gguf", keys, gone)
    model = load(path)
    assert any("llama.cpp's reading of it counts" in note for note in model.notes)
    export(model, "gguf", tmp_path / "again")
    (again,) = (tmp_path / "again" / "gguf").glob("*.gguf")
    assert torch.equal(llama_cpp(again), llama_cpp(path))


REFUSED: dict[str, tuple[str, Keys, Keys, str]] = {
    "a kind of scaling that is none": ("llama", {"rope.scaling.type": ("foo", S)}, {}, "rope.scaling.type"),
    "llama3 as a kind": ("llama", {"rope.scaling.type": ("llama3", S), **FACTOR}, {}, "rope.scaling.type"),
    "attn_factor without yarn": ("llama", {"rope.scaling.attn_factor": (1.5, F)}, {}, r"attn_factor 1\.5"),
    "attn_factor beside linear": ("qwen2", {**FACTOR, "rope.scaling.attn_factor": (1.5, F)}, {}, r"attn_factor 1\.5"),
    "yarn in a phi3": ("phi3", {**YARN, **FACTOR}, {}, "rope.scaling: expected one of default, longrope"),
    "linear in a phi3": ("phi3", FACTOR, {}, "rope.scaling: expected one of default, longrope"),
    "lists of factors in a qwen2": ("qwen2", {}, {"rope_freqs.weight": ONES[:8]}, "rotary factors"),
    "lists beside a factor": ("llama", FACTOR, {"rope_freqs.weight": ONES[:8]}, "and a factor of 4"),
    "one list of two": ("phi3", {}, {"rope_factors_long.weight": ONES[:16]}, "rotary factors"),
    "yarn's strength": ("llama", {**YARN, "rope.scaling.yarn_ext_factor": (0.5, F)}, {}, "yarn_ext_factor"),
    "not causal": ("llama", {"attention.causal": (False, B)}, {}, r"attention\.causal: expected true"),
    "half a head": ("llama", {"attention.head_count_kv": (0.5, F)}, {}, "expected a positive integer, got 0.5"),
    "half of a head rotated": ("llama", {"rope.dimension_count": (8, U)}, {}, "rope.dimension_count: expected 16"),
    "keys of another length": (
        "llama",
        {"attention.key_length": (8, U)},
        {},
        "value_length: expected 8, the head size",
    ),
    "another epsilon": (
        "llama",
        {"attention.layer_norm_epsilon": (0.1, F)},
        {},
        "layer_norm_epsilon: expected no such",
    ),
    "values of another length": ("qwen3", {"attention.value_length": (16, U)}, {}, "value_length: expected 32"),
    "a scale of scores": ("llama", {"attention.scale": (0.5, F)}, {}, r"attention\.scale: expected no such key, or 0"),
    "a factor of embeddings": ("llama", {"embedding_scale": (3.0, F)}, {}, "embedding_scale: expected no such key"),
    "layers that predict": ("llama", {"nextn_predict_layers": (1, U)}, {}, "nextn_predict_layers: expected no such"),
    "groups of experts": ("llama", {"expert_group_count": (3, U)}, {}, "expert_group_count: expected no such key"),
    "a key of tomorrow": ("qwen2", {"attention.new_gate": (True, B)}, {}, "it may change what llama.cpp computes"),
    "windows in every layer": (
        "gemma3_text",
        {"attention.sliding_window_pattern": (1, U)},
        {},
        "sliding_window_pattern: expected 2 or more",
    ),
    "another head size": (
        "llama",
        {f"attention.{name}_length": (8, U) for name in ("key", "value")} | {"rope.dimension_count": (8, U)},
        {},
        r"k_proj\.weight: expected shape \[16, 64\], as its metadata say",
    ),
    "rotated elements of windows": ("gemma3_text", {"rope.dimension_count_swa": (8, U)}, {}, "dimension_count_swa"),
    "a bias of a norm": ("llama", {}, {"blk.0.attn_norm.bias": ONES}, "llama.cpp reads no such bias of a llama"),
    "a bias of the output in a qwen3": ("qwen3", {}, {"blk.0.attn_output.bias": ONES}, "no such bias of a qwen3"),
    "a bias of the MLP in a qwen2": ("qwen2", {}, {"blk.0.ffn_down.bias": ONES}, "no such bias of a qwen2"),
    "norms of queries": ("llama", {}, {"blk.0.attn_q_norm.weight": ONES[:16]}, "is not one of a llama model"),
    "one layer more": ("llama", {}, {"blk.2.attn_norm.weight": ONES}, "is not one of a llama model"),
    "a bias of the logits": ("qwen2", {}, {"output.bias": np.ones(256, dtype=np.float32)}, "is not one of a qwen2"),
    "an output layer in a gemma2": (
        "gemma2",
        {},
        {"output.weight": np.ones((256, 64), dtype=np.float32)},
        "ties the output layer of a gemma2",
    ),
}
"""Files that are refused: family, keys, tensors, and what the refusal says."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    family, keys, more, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        load(rewritten(made(family), tmp_path / "model.gguf", keys, more=more))


def test_a_gemma3_without_windows_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp then has other positions in all its layers."""
    path = rewritten(made("gemma3_text"), tmp_path / "model.gguf", gone=["attention.sliding_window"])
    with pytest.raises(InputError, match=r"attention\.sliding_window: expected a positive number"):
        load(path)


BIASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "queries, keys and values of a llama": ("llama", ("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v")),
    "the output of a llama": ("llama", ("blk.1.attn_output",)),
    "one of the MLP of a llama": ("llama", ("blk.1.ffn_down",)),
    "queries of a qwen3": ("qwen3", ("blk.0.attn_q",)),
}


@pytest.mark.parametrize("case", BIASES)
def test_optional_biases_count_one_by_one(
    case: str, made: Callable[[str], Path], tmp_path: Path, by_decoder: Callable[..., torch.Tensor]
) -> None:
    """llama.cpp adds those that are there; what transformers wants beside them is zeros, and goes back out again."""
    family, modules = BIASES[case]
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(made(family)).tensors}
    rng = np.random.default_rng(1)
    more = {f"{name}.bias": rng.normal(size=shapes[f"{name}.weight"][1]).astype(np.float32) for name in modules}
    path = rewritten(made(family), tmp_path / "model.gguf", more=more)
    wanted, model = llama_cpp(path), load(path)
    assert distance(wanted, llama_cpp(made(family))) > 2.0**-7
    assert distance(by_decoder(model, TOKENS), wanted) < 2.0**-14
    export(model, "gguf", tmp_path / "again")
    (again,) = (tmp_path / "again" / "gguf").glob("*.gguf")
    assert distance(llama_cpp(again), wanted) < 2.0**-14
