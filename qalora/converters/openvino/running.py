"""How a person runs an OpenVINO folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_GENAI = """```python
# pip install openvino-genai
import openvino_genai

pipeline = openvino_genai.LLMPipeline("openvino", "CPU", INFERENCE_PRECISION_HINT="f32")
print(pipeline.generate("Once upon a time", max_new_tokens=20, do_sample=False, apply_chat_template=False))
```"""

_OPENVINO = """```python
# pip install openvino transformers
import numpy
import openvino
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("openvino")
options = {"INFERENCE_PRECISION_HINT": "f32"}
request = openvino.Core().compile_model("openvino/openvino_model.xml", "CPU", options).create_infer_request()
ids, past = tokenizer("Once upon a time")["input_ids"], 0
new = ids
for _ in range(20):
    feed = {
        "input_ids": numpy.array([new], dtype=numpy.int64),
        "attention_mask": numpy.ones((1, len(ids)), dtype=numpy.int64),
        "position_ids": numpy.arange(past, len(ids), dtype=numpy.int64)[None],
        "beam_idx": numpy.zeros(1, dtype=numpy.int32),
    }
    logits, past = request.infer(feed)["logits"], len(ids)
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids))
```"""


def usage(released: Released) -> str:
    """A block for openvino-genai where its tokenizer is there, for OpenVINO alone elsewhere."""
    return _GENAI if "openvino_tokenizer.xml" in released.files else _OPENVINO


def openings(pushed: Pushed) -> Sequence[str]:
    """openvino-genai opens folders, and knows no repository."""
    opened = f'LLMPipeline("{pushed.local}/openvino", "CPU", INFERENCE_PRECISION_HINT="f32")'
    return [f"{pushed.fetch}, then openvino_genai.{opened}"]
