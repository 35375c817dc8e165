"""Rotary tables in graphs of ours, and the config.json beside them: transformers' own tables are the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora import export
from qalora.converters import load
from qalora.converters.onnx.rotary import CLOSE, second_rows
from qalora.converters.rope import Rope, rotary_table, two_tables
from qalora.errors import FormatError
from qalora.testing import tiny_model

ORIGINAL = {"original_max_position_embeddings": 64}
LISTS = {"short_factor": (1.0, 1.25) * 4, "long_factor": (1.5, 4.0) * 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, **ORIGINAL}

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "linear": ("linear", {"factor": 4.0}),
    "llama3": ("llama3", LLAMA3),
    "yarn": ("yarn", YARN),
    "yarn with other ends": ("yarn", {**YARN, "beta_fast": 8, "beta_slow": 2}),
    "yarn that is not truncated": ("yarn", {**YARN, "truncate": False}),
    "yarn with an attention factor": ("yarn", {**YARN, "attention_factor": 1.5}),
    "yarn with two scales": ("yarn", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
    "longrope": ("longrope", {**LISTS, **ORIGINAL}),
    "longrope with a factor": ("longrope", {**LISTS, **ORIGINAL, "factor": 2.0}),
    "longrope with an attention factor": ("longrope", {**LISTS, **ORIGINAL, "attention_factor": 1.5}),
    "longrope that was not extended": ("longrope", {**LISTS, "original_max_position_embeddings": 256}),
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("case", ROPES)
def test_the_second_row_is_that_of_the_table(case: str, theta: float) -> None:
    kind, numbers = ROPES[case]
    rope = Rope(kind=kind, theta=theta, numbers=numbers)
    tables, rows = rotary_table(rope, 16, 256, "here"), second_rows(rope, 16, 256)
    assert len(rows) == (2 if two_tables(rope, 256) else 1)
    for start, row in zip((0, 64), rows, strict=False):
        for table, wanted in zip(tables, row, strict=True):
            assert torch.allclose(table[start + 1].double(), wanted, rtol=CLOSE, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10010.0}},
        {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    ],
)
@pytest.mark.parametrize("graph", ["", "portable"])
def test_a_config_that_denies_the_graph_is_refused(change: dict[str, Any], graph: str, tmp_path: Path) -> None:
    """The tables are what runs. What config.json says of them in another form is no difference."""
    export(load(tiny_model(tmp_path / "model", "llama", config={"eos_token_id": 2})), "onnx", tmp_path)
    path = tmp_path / "onnx" / graph / "config.json"
    config = json.loads(path.read_text())
    same = {key: value for key, value in config.items() if key != "rope_parameters"}
    path.write_text(json.dumps({**same, "rope_theta": 10000.0, "rope_scaling": None}))
    assert load(path.parent).notes == ()
    path.write_text(json.dumps({**config, **change}))
    with pytest.raises(
        FormatError, match=r"rotary\.cos: expected rotary positions as config\.json says.* got different positions"
    ):
        load(path.parent)
