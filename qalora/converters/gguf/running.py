"""How a person runs a GGUF file: for a model card, and on the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qalora.converters.format import Pushed, Released, plain_name
from qalora.errors import FormatError

__all__ = ["openings", "usage"]

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


def usage(released: Released) -> str:
    """Lines for llama-cli and Ollama, and a block of Python that loads the same file."""
    files = [name for name in released.files if name.endswith(".gguf")]
    if not files:
        raise FormatError("manifest.json: gguf", expected="a file that ends in .gguf", got="none")
    return _LLAMA_CPP.format(gguf=plain_name(files[0]), model=_tag(released.model))


def _tag(name: str) -> str:
    """A name for Ollama, which takes lower-case letters, digits, - _ and . in it."""
    plain = "".join(char if char.isascii() and char.isalnum() else "-" for char in name.lower()).strip("-")
    return plain[:60] or "model"


def openings(pushed: Pushed) -> Sequence[str]:
    """llama.cpp's `-hf REPO:TAG` looks for the tag in the paths of all *.gguf files, sub-folders too."""
    lines = []
    for name in pushed.files:
        stem = name.removesuffix(".gguf")
        split = re.search(r"-(\d{5})-of-\d{5}$", stem)
        if stem == name or (split and split[1] != "00001"):
            continue
        tag = re.search(r"[-.]([A-Za-z0-9_]+)$", stem[: split.start()] if split else stem)
        lines.append(f"llama-cli -hf {pushed.repo}" + (f":{tag[1]}" if tag else f" -hff gguf/{name}"))
    if "Modelfile" in pushed.files:
        lines.append(f"{pushed.fetch} && ollama create {pushed.local.lower()} -f {pushed.local}/gguf/Modelfile")
    return lines
