"""Decide how a model goes into a folder for transformers.js: graph, data, and what the library reads around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from qalora.checkpoint import Checkpoint
from qalora.converters.cutting import digits_by_expression
from qalora.converters.decoder import Decoder, decoder_of
from qalora.converters.ends import GENERATION, config_for_transformers, end_notes, generation_bytes
from qalora.converters.onnx.files import JS_KEY
from qalora.converters.onnx.weights import Weights, weights_of
from qalora.converters.plan import ExportOptions, Plan
from qalora.converters.tokenizer import converted_files, has_tokenizer
from qalora.converters.transformersjs.files import DTYPE, GRAPH
from qalora.errors import InputError
from qalora.formats.json_text import read_json_object

__all__ = ["DATA", "LONGEST", "SETTINGS", "TOKENIZER", "BrowserPlan", "plan", "rule_of"]

LIMIT = 2_000_000_000
"""Bytes of a file of data: a browser's buffers end at 2 GiB."""

DATA = f"{GRAPH}_data"
SETTINGS = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
LONGEST = 256 << 20
"""Bytes of a tokenizer.json."""

PADDED = (
    "transformersjs: texts of different lengths in one batch have to be padded on the right; the library's pipeline "
    "pads on the left: give it one text at a time"
)
WORDS = (
    "transformersjs: tokenizer.json has its rule for digits in other words, which mean the same, since transformers.js "
    "takes 0 to 9 alone for digits"
)
TEXTLESS = "transformersjs: transformers.js opens no tokenizer but a tokenizer.json, which the model does not have"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BrowserPlan(Plan):
    """A plan with the graph, what its data hold, and config.json."""

    graph: bytes
    weights: Weights
    config: Mapping[str, Any]


def plan(model: Checkpoint, options: ExportOptions) -> BrowserPlan:
    """Decide everything. InputError for a family that transformers.js does not know, and what `weights_of` raises."""
    decoder = decoder_of(model.config, model.path)
    if not decoder.family.transformersjs:
        raise InputError(
            "transformersjs: model_type",
            expected="one that transformers.js knows",
            got=decoder.family.model_type,
            todo="export to onnx with `onnx_embedding` float32, which onnxruntime-web runs",
        )
    options = replace(options, accuracy_level=0, onnx_embedding="auto")  # which are onnx's
    weights = weights_of(model, "transformersjs", options, LIMIT)
    made = weights.fast(model, PurePosixPath(DATA).name, options, in_browsers=True)
    graph = made.SerializeToString(deterministic=True)
    files: dict[str, int | None] = {name: path.stat().st_size for name, path in model.files.items()}
    files |= dict.fromkeys(converted_files(model))
    files |= {SETTINGS: None} if has_tokenizer(model) else {}
    files |= {GENERATION: len(generation_bytes(model)), "config.json": None, GRAPH: len(graph)}
    textless = has_tokenizer(model) and TOKENIZER not in files
    own = read_json_object(model.files[TOKENIZER], LONGEST) if TOKENIZER in model.files else {}
    reworded = rule_of(own) is not None
    files |= {TOKENIZER: None} if reworded else {}
    notes = [*([TEXTLESS] if textless else []), *([WORDS] if reworded else [])]
    return BrowserPlan(
        target="transformersjs",
        tensors=weights.rows(model, DATA),
        files={**files, **weights.files(DATA)},
        notes=(*model.notes, *end_notes(model), PADDED, *notes),
        graph=graph,
        weights=weights,
        config=_config(model, decoder, len(weights.sizes)),
    )


def rule_of(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rule for cutting text of a tokenizer.json in words that transformers.js takes as transformers does; None
    where it is in such words, or damaged, of which others say so."""
    try:
        return digits_by_expression(content.get("pre_tokenizer"))
    except (KeyError, TypeError, AttributeError):
        return None


def _config(model: Checkpoint, decoder: Decoder, parts: int) -> dict[str, Any]:
    """config.json with the graph's entry, and the numbers that the library makes the first cache of: it has no defaults
    for them.
    """
    config = config_for_transformers(model)
    sizes = {
        "head_dim": decoder.head_size,
        "hidden_size": decoder.hidden,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": len(decoder.layers),
        "num_key_value_heads": decoder.kv_heads,
    }
    missing = {key: size for key, size in sizes.items() if config.get(key) is None}
    return {**config, **missing, JS_KEY: {"dtype": DTYPE, "use_external_data_format": parts}}
