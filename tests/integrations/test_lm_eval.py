"""lm-eval on our own folder, by the command and the task of docs/evaluate.md, against our own float32 loss."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from qalora.adapter import Adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build, float_linear
from qalora.folding import fold
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama
from qalora.training.layer import FoldedLinear
from qalora.training.loss import summed_cross_entropy

PAGE = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text("utf-8")
DOCUMENTS = [topics[name][:400] for name in sorted(topics)[:4]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm-eval==0.4.13"),
]


def command(line: str, **settings: str) -> list[str]:
    """The command of the page, with options of its own."""
    words = shlex.split(line)
    for name, value in settings.items():
        words[words.index(f"--{name}") + 1] = value
    return [sys.executable, *words[1:]]


def evaluated(folder: Path, place: Path) -> list[float]:
    """The log-likelihood of each document, as lm-eval gives it."""
    (line,) = re.findall(r"^    (python -c .*lm_eval.*)$", PAGE, re.MULTILINE)
    task = re.search(r"^    task: .*?(?=^\S)", PAGE, re.MULTILINE | re.DOTALL)
    assert task is not None
    (place / "tasks").mkdir(parents=True)
    (place / "tasks" / "held_out.yaml").write_text(re.sub(r"^    ", "", task[0], flags=re.MULTILINE), encoding="utf-8")
    lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS]
    (place / "held-out.jsonl").write_text("".join(lines), encoding="utf-8")
    words = command(line, model_args=f"pretrained={folder},dtype=float32", tasks="held_out", batch_size="1")
    words += ["--include_path", "tasks", "--device", "cpu", "--output_path", "out", "--log_samples"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "word_perplexity" in done.stdout
    (samples,) = (place / "out").glob("*/samples_held_out_*.jsonl")
    rows = [json.loads(row) for row in samples.read_text("utf-8").splitlines()]
    return [float(row["filtered_resps"][0]) for row in sorted(rows, key=lambda row: row["doc_id"])]


@torch.no_grad()
def our_loss(module: Any, ids: list[int], targets: list[int]) -> tuple[float, float]:
    """The summed loss of float32 logits, and by how much lm-eval's may differ from it.

    u = 2^-24, K the hidden size, V the vocabulary, n the tokens. Up to the last hidden states both compute the same
    bits. A logit is a sum of K products, each way within K u |h| |w| of the exact one: two differ by D = 2 K u |h| |w|
    at most, and a log-softmax by twice the largest D. Its own rounding, with R the spread of the logits: R u in the
    differences to the largest, which is relative in the exponentials; 2 u for exp; V u for their sum; (R + log V) u
    each for the logarithm and the last difference; so E = (3 R + 2 log V + V + 2) u each way. lm-eval adds n of them,
    each below R + log V, in float32: n u times their sum.
    """
    u = 2.0**-24
    hidden = module.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    weight = module.lm_head.weight
    loss = float(summed_cross_entropy(hidden, weight, torch.tensor(targets)))
    logits = hidden.double() @ weight.double().t()
    spread, words = float((logits.amax(1) - logits.amin(1)).max()), torch.tensor(float(weight.shape[0]))
    apart = 2 * hidden.shape[1] * u * float((hidden.abs() @ weight.abs().t()).max())
    each = (3 * spread + 2 * float(words.log()) + float(words) + 2) * u
    return loss, len(ids) * (2 * apart + 2 * each) + len(ids) * u * loss


def with_adapter_beside(base: Checkpoint, adapter: Adapter) -> Any:
    """The base as it is trained: the adapter in the layers, the base's codes and minima beside it."""

    def linear(path: str, weight: Any, bias: Tensor | None) -> torch.nn.Module:
        if path not in adapter.layers:
            return float_linear(path, weight, bias)
        layer = adapter.layers[path]
        made = FoldedLinear(
            weight.load_quantized(),
            bias,
            name=path,
            rank=layer.rank,
            factor=layer.factor,
            pool_size=layer.pool_size,
            minima="float16",
            rng=torch.Generator(),
        )
        made.a.data, made.b.data = layer.a, layer.b
        return made

    return build(base, linear)


def test_lm_eval_gives_our_own_loss(tmp_path: Path) -> None:
    """The folded folder that of the folded model and of base and adapter in training; the base's is another."""
    base = quantize(load(tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())), bits=4, group_size=32)
    adapter = random_adapter(base, seed=1)
    folded = fold(base, adapter)
    tokenizer = load_tokenizer(base)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    given = {}
    for name, model in (("base", base), ("folded", folded)):
        export(model, ["qalora"], tmp_path / name)
        given[name] = evaluated(tmp_path / name / "qalora", tmp_path / f"{name}-run")
    modules = {"base": [build(base)], "folded": [build(folded), with_adapter_beside(base, adapter)]}
    for number, text in enumerate(DOCUMENTS):
        targets = tokenizer.encode(text, add_special_tokens=False)
        for name in given:
            for module in modules[name]:
                loss, bound = our_loss(module, [begin, *targets[:-1]], targets)
                assert abs(given[name][number] + loss) <= bound
                assert bound < 1e-4 * loss
        assert abs(given["base"][number] - given["folded"][number]) > 10 * bound


def test_lm_eval_alone_says_that_it_does_not_know_the_folder(tmp_path: Path) -> None:
    """What the page says of it."""
    base = quantize(load(tiny_llama(tmp_path / "float", tokenizer=byte_tokenizer())), bits=4, group_size=32)
    export(base, ["qalora"], tmp_path)
    (line,) = re.findall(r"^    (python -c .*lm_eval.*)$", PAGE, re.MULTILINE)
    words = command(line.replace("import qalora, ", "import "), model_args=f"pretrained={tmp_path / 'qalora'}")
    done = subprocess.run([*words, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown quantization type, got qalora" in done.stderr
