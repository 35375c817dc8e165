"""ONNX, in two graphs: one for ONNX Runtime and onnxruntime-genai, and a portable one of standard operators.

    onnx/           model.onnx  model.onnx.data  genai_config.json  config.json  tokenizer files
    onnx/portable/  model.onnx  model.onnx.data  genai_config.json  config.json

Both take input_ids [batch, sequence], attention_mask [batch, total] and past_key_values.<n>.key/value [batch,
key-value heads, past, head size], and give logits [batch, sequence, vocabulary] and present.<n>.key/value; all floats
are float32.
"""

from qalora.converters.onnx.planner import plan
from qalora.converters.onnx.reader import read
from qalora.converters.onnx.writer import write

__all__ = ["plan", "read", "write"]
