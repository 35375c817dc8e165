"""Quantizations that are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.quantization_config import QuantizationMethod

from qalora.converters import by_config, load
from qalora.converters.unread import METHODS
from qalora.errors import FormatError

NAMED = "which is not read here; start from the float model, or from its GPTQ, AWQ or GGUF version"


def folder_of(place: Path, **settings: Any) -> Path:
    (place / "config.json").write_text(json.dumps({"quantization_config": settings}), encoding="utf-8")
    return place


@pytest.mark.parametrize("method", sorted({*METHODS, *(one.value for one in QuantizationMethod)}))
def test_every_method_of_transformers_is_read_or_named(method: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, quant_method=method)
    try:
        assert by_config(folder).name == method
    except FormatError as error:
        assert NAMED in str(error)


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes' NF4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes' FP4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"LLM.int8\(\), integers with outliers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8, floats of 8 bits"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt's FP8 or NVFP4"),
        ({"quant_method": "mxfp4"}, "MXFP4, floats of 4 bits"),
    ],
)
def test_what_is_held_is_said(settings: dict[str, Any], held: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"quantization_config: .*{held}.*{NAMED}"):
        load(folder_of(tmp_path, **settings))
