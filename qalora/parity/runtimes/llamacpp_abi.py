"""The few structs and functions of llama.cpp's C interface that are needed, for one pinned build.

The wheel xllamacpp exports them from its one shared object. Struct layouts belong to a build: they are declared for
XLLAMACPP and checked at run time against the defaults that the library itself fills in, so that another build is one
clear sentence and not a crash. Source: ggml-org/llama.cpp, include/llama.h.

Where xllamacpp is absent, llama-cpp-python's own ctypes module serves: it declares the same structs for its own build.
That package compiles for minutes, so this path is not part of the test suite.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
from importlib.metadata import version
from typing import Any

from qalora.errors import InputError, MissingLibraryError

__all__ = ["EVAL_CALLBACK", "XLLAMACPP", "ContextParams", "load_library"]

XLLAMACPP = "2026.10.11549"

LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)

EVAL_CALLBACK = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)
"""(tensor, ask, user data): asked before a tensor of the graph is computed, and, if the answer is yes, told after."""


class ModelParams(c.Structure):
    """llama_model_params; the defaults are kept as they are."""

    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("placement", c.c_int32 * 3),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("flags", c.c_bool * 8),
    )


class ContextParams(c.Structure):
    """llama_context_params."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("reserved", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    )


class Batch(c.Structure):
    """llama_batch: tokens with their positions and sequences, and which of them give logits."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
}
"""What llama_context_default_params fills in: field by field another value, so that a moved field shows."""

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LOG_CALLBACK, c.c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c.c_void_p, (c.c_char_p, ModelParams)),
    "llama_model_free": (None, (c.c_void_p,)),
    "llama_init_from_model": (c.c_void_p, (c.c_void_p, ContextParams)),
    "llama_free": (None, (c.c_void_p,)),
    "llama_model_get_vocab": (c.c_void_p, (c.c_void_p,)),
    "llama_vocab_n_tokens": (c.c_int32, (c.c_void_p,)),
    "llama_vocab_type": (c.c_int32, (c.c_void_p,)),
    "llama_vocab_is_eog": (c.c_bool, (c.c_void_p, c.c_int32)),
    "llama_vocab_get_text": (c.c_char_p, (c.c_void_p, c.c_int32)),
    "llama_tokenize": (
        c.c_int32,
        (c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool),
    ),
    "llama_batch_init": (Batch, (c.c_int32, c.c_int32, c.c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c.c_int32, (c.c_void_p, Batch)),
    "llama_adapter_lora_init": (c.c_void_p, (c.c_void_p, c.c_char_p)),
    "llama_set_adapters_lora": (
        c.c_int32,
        (c.c_void_p, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)),
    ),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
    "ggml_get_name": (c.c_char_p, (c.c_void_p,)),
    "ggml_nbytes": (c.c_size_t, (c.c_void_p,)),
    "ggml_backend_tensor_get": (None, (c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t)),
}


def load_library() -> tuple[Any, str]:
    """llama.cpp's C functions, ready to call, and what they come from.

    Raises MissingLibraryError if neither package is installed, InputError if xllamacpp is another build.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        if importlib.util.find_spec("llama_cpp") is not None:
            import llama_cpp

            return llama_cpp, f"llama-cpp-python {version('llama_cpp_python')}"
        raise MissingLibraryError("xllamacpp", "running a GGUF artefact", "llama-cpp")
    import xllamacpp.xllamacpp as extension

    library = c.CDLL(extension.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    release, params = version("xllamacpp"), library.llama_context_default_params()
    differing = [name for name, value in _DEFAULTS.items() if getattr(params, name) != value]
    if differing:
        raise InputError(
            f"xllamacpp {release}: llama.cpp's {differing[0]} is not where version {XLLAMACPP} has it",
            todo=f"pip install xllamacpp=={XLLAMACPP}",
        )
    return library, f"xllamacpp {release}"
