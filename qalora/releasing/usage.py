"""The blocks of a model card that try each artefact, and what stands beside them.

A block runs in the release's folder as it is; `tests/release/test_card.py` runs them. Of the lines for a shell, those
of llama-cli and ollama are not run there, as no package index has these programs: the test holds their files and flags
only, and the block of Python beside them loads the same file in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.errors import FormatError

__all__ = ["adapter_usage", "check_usage", "usage"]

_TRANSFORMERS = """```python
# pip install transformers optimum gptqmodel peft accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

quantization = GPTQConfig(bits={bits}, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(
    "gptq", dtype="float32", device_map="cpu", quantization_config=quantization
)
tokenizer = AutoTokenizer.from_pretrained("gptq")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

What lies beside the weights is part of the model, and is loaded with them: see `gptq/README.md`."""

_LLAMA_CPP = """```sh
llama-cli -m gguf/{gguf} -p "Once upon a time" -n 20
```

```sh
ollama create {model} -f gguf/Modelfile
ollama run {model} "Once upon a time"
```

or in Python:

```python
# pip install xllamacpp
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "gguf/{gguf}"
params.n_ctx = 256
server = xllamacpp.Server(params)
answer = server.handle_completions({{"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}})
print(answer["choices"][0]["text"])
```"""

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
session = onnxruntime.InferenceSession("onnx/portable/model.onnx", providers=["CPUExecutionProvider"])
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

_MLX = """```sh
python -m mlx_lm generate --model mlx --prompt "Once upon a time" --max-tokens 20
```

```python
# pip install mlx-lm
from mlx_lm import generate, load

model, tokenizer = load("mlx")
print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=20))
```"""

_HQQ = """```python
# pip install 'qalora[hqq]': hqq's layers load the tensors as they are, in a model that qalora builds
from pathlib import Path

from qalora.parity.runtimes import open_runtime
from transformers import AutoTokenizer

model = open_runtime("hqq", Path("hqq"))
tokenizer = AutoTokenizer.from_pretrained("hqq")
ids = tokenizer("Once upon a time")["input_ids"]
print(tokenizer.decode(ids + model.generate(ids, 20)))
```"""

_QALORA = """```python
import qalora  # transformers opens the folder once qalora is imported; its layers stay packed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("qalora", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("qalora")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

It can be exported again and fine-tuned further: `qalora.load("qalora")`."""

_TITLES = {
    "gptq": "GPTQ: transformers with GPTQModel",
    "gguf": "GGUF: llama.cpp, Ollama",
    "onnx": "ONNX: onnxruntime-genai, ONNX Runtime",
    "mlx": "MLX: mlx-lm",
    "hqq": "HQQ: hqq's layers",
    "qalora": "qalora: transformers",
}

_CONVENTIONS = {
    "paper": "inputs are summed over a group, as in the paper",
    "official": "inputs are averaged over a group, as in the authors' code",
    "peft": "inputs are averaged over a group, and multiplied by the count of groups, as PEFT's `use_qalora` does",
}


def usage(artifact: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The section of one artefact of a manifest."""
    target, files = artifact["target"], artifact["files"]
    if target not in _TITLES:
        raise FormatError("manifest.json: target", expected=", ".join(_TITLES), got=f"{target!r:.40}")
    ggufs = sorted(name.partition("/")[2] for name in files if name.endswith(".gguf"))
    if target == "gguf" and not ggufs:
        raise FormatError("manifest.json: gguf", expected="a file that ends in .gguf", got="none")
    facts = {"bits": _bits(artifact), "gguf": _plain(ggufs[0]) if ggufs else "", "model": _tag(manifest["name"])}
    if target == "gptq":
        body = _TRANSFORMERS.format(**facts)
    elif target == "gguf":
        body = _LLAMA_CPP.format(**facts)
    elif target == "onnx":
        blocks = [_GENAI if "onnx/genai_config.json" in files else _ONNX_RUNTIME]
        body = "\n\n".join([*blocks, *([_PORTABLE] if "onnx/portable/model.onnx" in files else [])])
    else:
        body = {"mlx": _MLX, "hqq": _HQQ, "qalora": _QALORA}[target]
    if not any(name.rpartition("/")[2] in ("tokenizer.json", "tokenizer.model") for name in files) and target != "gguf":
        body += "\n\nThe base model has no tokenizer in a form that could be written here: take its own instead."
    return f"### {_TITLES[target]}\n\n{body}"


def adapter_usage(manifest: Mapping[str, Any]) -> str:
    """The section about the adapter's folder; empty where there is none."""
    adapter = manifest["adapter"]
    if adapter is None or not manifest["options"]["with_adapter"]:
        return ""
    told = _CONVENTIONS.get(adapter["convention"], "see qalora's documentation")
    return f"""## The adapter alone

`adapter/` holds the QA-LoRA adapter that was folded, in PEFT's layout with qalora's keys beside PEFT's. Its scaling is
of the convention `{_plain(adapter["convention"])}`: {told}. As an ordinary LoRA it gives another model.

```sh
qalora inspect adapter
```"""


def check_usage() -> str:
    """How a stranger checks the folder."""
    return """```sh
sha256sum --check --quiet SHA256SUMS
qalora check .
```

The first compares every file with its digest. The second reads `manifest.json`, opens every artefact and renders this
card again from `manifest.json` and `report.json`; with `--base` and `--adapter` it computes every byte anew. What is in
the folder, and what it was made with, is also in `sbom.cdx.json` (CycloneDX 1.6)."""


def _bits(artifact: Mapping[str, Any]) -> int:
    """Of the words of a GPTQ folder: what most carriers say."""
    found = [word for row in artifact["tensors"] if (word := row["carrier"].partition("-bit")[0]).isdigit()]
    return int(max(set(found), key=lambda word: (found.count(word), word))) if found else 4


def _plain(name: str) -> str:
    """A name that goes into a block of code: letters, digits and - _ . + alone."""
    if not name or len(name) > 255 or not all(char.isalnum() or char in "-_.+" for char in name):
        raise FormatError("manifest.json: a name in it", expected="letters, digits and - _ . +", got=f"{name!r:.80}")
    return name


def _tag(name: str) -> str:
    """A name for Ollama, which takes lower-case letters, digits, - _ and . in it."""
    plain = "".join(char if char.isascii() and char.isalnum() else "-" for char in name.lower()).strip("-")
    return plain[:60] or "model"
