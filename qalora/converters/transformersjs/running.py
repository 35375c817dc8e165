"""How a person runs a folder for transformers.js: for a model card, and on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qalora.converters.format import Pushed, Released

__all__ = ["openings", "usage"]

_SCRIPT = """```js
// npm install @huggingface/transformers
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "./";
const tokenizer = await AutoTokenizer.from_pretrained("transformersjs");
const model = await AutoModelForCausalLM.from_pretrained("transformersjs"); // { device: "webgpu" } in a browser
const output = await model.generate({ ...tokenizer("Once upon a time"), max_new_tokens: 20, do_sample: false });
console.log(tokenizer.decode(output[0], { skip_special_tokens: true }));
```"""


def usage(released: Released) -> str:
    """A module for Node; a page is the same but for where its files are."""
    return _SCRIPT


def openings(pushed: Pushed) -> Sequence[str]:
    """The library opens folders, and top folders of repositories."""
    opened = 'AutoModelForCausalLM.from_pretrained("transformersjs")'
    return [f'{pushed.fetch}, then in JavaScript {opened} with env.localModelPath = "{pushed.local}/"']
