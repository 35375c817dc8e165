"""How a person runs an ONNX folder: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_GENAI = """```python
# pip install onnxruntime-genai
import onnxruntime_genai

model = onnxruntime_genai.Model("onnx")
tokenizer = onnxruntime_genai.Tokenizer(model)
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=40, do_sample=False)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""

_PORTABLE = """`onnx/portable/model.onnx` is the same model in standard operators, for whatever runs ONNX:

```python
# pip install onnxruntime transformers
import numpy
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("onnx")
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay float32
session = onnxruntime.InferenceSession("onnx/portable/model.onnx", options, providers=["CPUExecutionProvider"])
ids = tokenizer("Once upon a time")["input_ids"]
for _ in range(20):
    feed = {}
    for node in session.get_inputs():
        if node.name == "input_ids":
            feed[node.name] = numpy.array([ids], dtype=numpy.int64)
        elif node.name == "attention_mask":
            feed[node.name] = numpy.ones((1, len(ids)), dtype=numpy.int64)
        elif node.name == "position_ids":
            feed[node.name] = numpy.arange(len(ids), dtype=numpy.int64)[None]
        else:  # no tokens are cached: every step computes all
            feed[node.name] = numpy.zeros((1, node.shape[1], 0, node.shape[3]), dtype=numpy.float32)
    logits = session.run(["logits"], feed)[0]
    ids.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(ids))
```"""

_ONNX_RUNTIME = _PORTABLE.replace("onnx/portable/", "onnx/").split("\n\n", 1)[1]


def usage(released: Released) -> str:
    """A block for each graph: onnxruntime-genai's where its settings are there, ONNX Runtime's alone for the other."""
    blocks = [_GENAI if "genai_config.json" in released.files else _ONNX_RUNTIME]
    return "\n\n".join([*blocks, *([_PORTABLE] if "portable/model.onnx" in released.files else [])])


def openings(pushed: Pushed) -> Sequence[str]:
    """onnxruntime-genai opens folders, and knows no repository."""
    return [f'{pushed.fetch}, then onnxruntime_genai.Model("{pushed.local}/onnx")']
