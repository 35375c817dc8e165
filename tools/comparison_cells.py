"""One cell of `compare_training.py`: what is done, and what is measured.

Perplexity is always of the same held-out windows, in float32, whatever training multiplied. The rate, and the strength,
a factor of what was learned, are chosen on validation windows, which are others. Wall and processor seconds are of the
training call, from the base's folder to the adapter, model building included, imports and evaluation not; peak memory
is that of the process until then.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comparison_plan import VARIANTS, Cell, Done, parse, source
from torch import Tensor, nn
from training_peers import ScaledLinear, in_bfloat16, run_steps, scales_of, trainable, with_lora

from qalora.adapter import Adapter, AdapterLayer, read_adapter
from qalora.calibration import Calibration, calibration_windows, quantize_calibrated
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build, float_linear
from qalora.demo import smollm2_file
from qalora.errors import InputError
from qalora.folding import fold, prove_fold
from qalora.parity.runtimes import open_runtime
from qalora.quantization import QuantizeOptions, quantize
from qalora.tensor import GroupQuantTensor
from qalora.training import TrainOptions, train
from qalora.training.data import Blocks, make_blocks, read_documents
from qalora.training.strength import best_of, try_strengths

PASSES = {4: 0, 3: 0, 2: 2}
"""Passes of gptq at each width, as docs/quantize.md found them best."""

TRAIN, WINDOWS, PROTOCOL = "train.txt", "windows.json", "protocol.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What all cells of a folder share; it stands in protocol.json, and other runs are refused there.

    model, text    files, or empty for SmolLM2-135M-Instruct and the language reference
    steps          of batch * length tokens: one pass over that much of the text's head
    held_out       tokens of what follows, in windows of `length`, spread over all of it
    validation     as many more, between those, to choose rates and strengths by
    calibration    tokens of what is trained on, in windows of `window`
    rank           of QA-LoRA; peer_rank of LoRA
    """

    model: str = ""
    text: str = ""
    steps: int = 61
    batch: int = 4
    length: int = 128
    held_out: int = 8192
    validation: int = 4096
    calibration: int = 4096
    window: int = 256
    group: int = 32
    rank: int = 15
    peer_rank: int = 8


def prepare(work: Path, protocol: Protocol) -> None:
    """Write protocol, the text to train on and the windows, once. InputError for a folder, or a cell in it, of another
    protocol or text.
    """
    stored = work / PROTOCOL
    if not stored.exists():
        cut(work, protocol)
    elif json.loads(stored.read_text("utf-8")) != asdict(protocol):
        raise InputError(f"{work}", expected="cells of the same protocol", got="another", todo="use another --work")
    shared = Work(work).shared
    for path in filter(lambda path: parse(path.stem), sorted(work.glob("*.json"))):
        cell = json.loads(path.read_text("utf-8"))
        if any(cell.get(name) != value for name, value in shared.items()):
            raise InputError(
                f"{path}", expected="a cell of the same protocol and text", got="another's", todo="use another --work"
            )


def cut(work: Path, protocol: Protocol) -> None:
    """Cut the text into what is trained on and windows."""
    work.mkdir(parents=True, exist_ok=True)
    text = Path(protocol.text).read_text("utf-8") if protocol.text else shuffled_topics()
    tokenizer = load_tokenizer(load(protocol.model or smollm2_file()))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = found["input_ids"], found["offset_mapping"]
    # a block more than is trained on, for the held-out part that `train` wants, and half of one that is dropped
    head = (protocol.steps * protocol.batch + 1) * protocol.length + protocol.length // 2
    rest = [ids[at : at + protocol.length] for at in range(head, len(ids) - protocol.length + 1, protocol.length)]
    wanted = (protocol.held_out + protocol.validation) // protocol.length
    if len(rest) < wanted:
        expected = f"{head + protocol.held_out + protocol.validation} tokens"
        raise InputError("text", expected=expected, got=f"{len(ids)}")
    (work / TRAIN).write_text(text[: places[head][0]], encoding="utf-8")
    spread = [rest[k * len(rest) // wanted] for k in range(wanted)]
    held, between = shared_out(spread, protocol.validation // protocol.length)
    write_whole(work / WINDOWS, {"held_out": held, "validation": between})
    write_whole(work / PROTOCOL, asdict(protocol))


def shared_out(windows: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """(the others, `count` windows spread over all)."""
    chosen = {(2 * k + 1) * len(windows) // (2 * count) for k in range(count)}
    return [w for n, w in enumerate(windows) if n not in chosen], [w for n, w in enumerate(windows) if n in chosen]


def shuffled_topics() -> str:
    """The language reference with its topics in an order of chance: in their own, which is the alphabet's, what is held
    out would be of other subjects than what is trained on.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    return "\n\n".join(topics[name] for name in names)


def write_whole(path: Path, content: object) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


class Work:
    """A folder of cells, opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.protocol = Protocol(**json.loads((folder / PROTOCOL).read_text("utf-8")))
        windows = json.loads((folder / WINDOWS).read_text("utf-8"))
        self.held, self.validation = (torch.tensor(windows[name]) for name in ("held_out", "validation"))

    @property
    def shared(self) -> dict[str, Any]:
        """What stands in every cell: the protocol, and a digest of the text, which differs between Pythons."""
        found = hashlib.sha256((self.folder / TRAIN).read_bytes() + (self.folder / WINDOWS).read_bytes())
        return {"protocol": asdict(self.protocol), "text_sha256": found.hexdigest()}

    def float_model(self) -> Checkpoint:
        """The model before anything."""
        return load(self.protocol.model or smollm2_file())

    def base(self, cell: Cell) -> Checkpoint:
        """The integers that a cell trains on."""
        return load(self.folder / "bases" / cell.base)

    def calibration(self, model: Checkpoint) -> Tensor:
        """int64 [windows, tokens] of the text that is trained on."""
        chosen, text = self.protocol, str(self.folder / TRAIN)
        return calibration_windows(model, Calibration(data=text, tokens=chosen.calibration, length=chosen.window))

    def blocks(self, model: Checkpoint) -> Blocks:
        """What is trained on, as `train` cuts it."""
        tokenizer = load_tokenizer(model)
        documents = read_documents(str(self.folder / TRAIN), tokenizer)
        return make_blocks(documents, tokenizer, self.protocol.length).split(self.share)[0]

    @property
    def share(self) -> float:
        """The share of the text that makes one block held out."""
        return 0.5 / (self.protocol.steps * self.protocol.batch + 1)

    def adapter(self, name: str) -> Path:
        """Where a cell's adapter lies."""
        return self.folder / "adapters" / name

    def perplexity(self, model: Any, windows: Tensor | None = None) -> float | None:
        """exp of the mean loss over every token but the first of each window, of a module or a Checkpoint; held-out
        windows are what is measured.
        """
        module = build(model) if isinstance(model, Checkpoint) else model
        chosen = self.held if windows is None else windows
        return perplexity_of(lambda rows: module(input_ids=rows, use_cache=False).logits, chosen)

    def at_its_strength(self, model: Callable[[float], Any]) -> dict[str, Any]:
        """What is stored of a training, given the model at each strength: the strength that validation prefers, and
        held-out perplexity with it, and at full strength.
        """

        def at(strength: float) -> float:
            found = self.perplexity(model(strength), self.validation)
            return math.inf if found is None else found

        tried = try_strengths(at(1.0), at)
        best, validation = best_of(tried)
        if not math.isfinite(validation):
            return {"perplexity": None, "failed": "the loss is no number"}
        full = self.perplexity(model(1.0))
        return {
            "perplexity": full if best == 1 else self.perplexity(model(best)),
            "full": full,
            "strength": best,
            "validation": validation,
            "strengths": {f"{strength:g}": value for strength, value in tried if math.isfinite(value)},
        }

    def strengthened(self, name: str, base: Checkpoint, done: Done) -> Adapter:
        """A trained cell's adapter at its strength."""
        return scaled(read_adapter(self.adapter(name), base), done[name]["strength"])


@torch.no_grad()
def perplexity_of(logits: Callable[[Tensor], Tensor], windows: Tensor, batch: int = 4) -> float | None:
    """exp of the mean loss; logits gives float32 [batch, tokens, vocabulary]. None where that is no number."""
    total = 0.0
    for rows in torch.split(windows, batch):
        found = logits(rows)[:, :-1].flatten(0, 1)
        total += nn.functional.cross_entropy(found, rows[:, 1:].flatten(), reduction="sum").item()
    mean = total / (windows.numel() - len(windows))
    return math.exp(mean) if mean < 700 else None


def import_all() -> None:
    """Import what a training would import while the clock runs; PEFT alone takes seconds. The same for every method."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401


class Clock:
    """Wall and processor seconds, and peak memory, from when it is made to when it is read."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        """What has passed."""
        from resource import RUSAGE_SELF, getrusage

        return {
            "seconds": round(time.perf_counter() - self._wall, 1),
            "processor_seconds": round(time.process_time() - self._processor, 1),
            "peak_bytes": getrusage(RUSAGE_SELF).ru_maxrss * 1024,
        }


def make(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """Do what a cell is, and give what is stored of it.

    Base and adapter that it is made of, and that are not in the folder though their cells are, are made again.
    """
    if cell.base and cell.kind != "base" and not (work.folder / "bases" / cell.base).exists():
        make_base(work, Cell(name=f"base-{cell.base}", kind="base", base=cell.base), done)
    of = parse(source(done, cell) or "") if cell.kind in ("requantized", "exported") else None
    if of is not None and not work.adapter(of.name).exists():
        KINDS[of.kind](work, of, done)
    found = KINDS[cell.kind](work, cell, done)
    shared = {"threads": torch.get_num_threads(), **work.shared}
    return (
        {"cell": cell.name, "kind": cell.kind, "bits": cell.bits, "rate": cell.rate, "seed": cell.seed} | found | shared
    )


def make_float(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """The model before anything."""
    return {"perplexity": work.perplexity(work.float_model())}


def options_of(work: Work, cell: Cell, method: str) -> QuantizeOptions:
    """How a base is quantized, and QLoRA's result again."""
    return QuantizeOptions(
        bits=cell.bits, group_size=work.protocol.group, zeros="real", method=method, passes=PASSES.get(cell.bits, 2)
    )


def make_base(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """Quantize, and save as a folder of ours."""
    clock, model = Clock(), work.float_model()
    method = "rtn" if cell.base.startswith("rtn") else "gptq"
    options = options_of(work, cell, method)
    if method == "gptq":
        made = quantize_calibrated(model, work.calibration(model), options, requantize=True)
    else:
        made = quantize(model, bits=cell.bits, group_size=work.protocol.group, zeros="real", requantize=True)
    place = work.folder / "bases" / cell.base
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=work.folder) as folder:
            export(made, ["qalora"], Path(folder))
            place.parent.mkdir(exist_ok=True)
            try:
                (Path(folder) / "qalora").rename(place)
            except OSError:  # another process was faster, with the same bytes
                if not place.exists():
                    raise
    taken = clock.read()
    return {"perplexity": work.perplexity(work.base(cell)), "options": asdict(options), **taken}


def make_qalora(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """QA-LoRA with the fold in the loop: perplexity of the folded model."""
    return train_qalora(work, cell, {"learning_rate": float(cell.rate)})


def make_variant(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """QA-LoRA at its best rate with one thing changed."""
    of = parse(source(done, cell) or "")
    if of is None:
        raise ValueError(f"{cell.name} needs QA-LoRA's best rate")
    rank, rate = work.protocol.rank, float(of.rate)
    changes: dict[str, dict[str, Any]] = {
        "uniform": {"start": "uniform"},
        "auto": {"rank": "auto", "budget": done[of.name]["parameters"]},
        "plus": {"alpha": 4.0 * rank, "learning_rate": rate / 4},
        "mean": {"alpha": rank / work.protocol.group},
        "fitted": {},
        "decay": {"weight_decay": 0.9},
    }
    base = fitted(work, cell) if cell.kind == "fitted" else None
    return train_qalora(work, cell, {"learning_rate": rate, **changes[cell.kind]}, base)


def fitted(work: Work, cell: Cell) -> Checkpoint:
    """The base, its minima fitted to the inputs that the calibration gives each layer."""
    model, options = work.float_model(), replace(options_of(work, cell, "gptq"), fit_minima=True)
    return quantize_calibrated(model, work.calibration(model), options, requantize=True)


def train_qalora(work: Work, cell: Cell, changes: dict[str, Any], base: Checkpoint | None = None) -> dict[str, Any]:
    """Train with some options changed, or on another base, fold, and measure."""
    chosen, base, losses = work.protocol, base or work.base(cell), []
    import_all()
    settings: dict[str, Any] = {
        "data": str(work.folder / TRAIN),
        "out": work.adapter(cell.name),
        "rank": chosen.rank,
        "steps": chosen.steps,
        "batch_size": chosen.batch,
        "sequence_length": chosen.length,
        "held_out": work.share,
        "save_every": 0,
        "seed": cell.seed,
        "device": "cpu",
        "compute": "bfloat16",
        "force": True,
    }
    options = TrainOptions(**{**settings, **changes})
    clock = Clock()
    try:
        adapter = train(base, options, lambda report: losses.append(report.loss))
    except InputError as error:
        return {"perplexity": None, "failed": str(error), "losses": losses, "options": options.to_json()}
    taken = clock.read()
    folded = fold(base, adapter)
    proofs = [
        prove_fold(base.tensors[name].load_quantized(), layer, folded.tensors[name].load_quantized())
        for name, layer in ((f"{path}.weight", layer) for path, layer in adapter.layers.items())
    ]
    return {
        **work.at_its_strength(lambda strength: fold(base, scaled(adapter, strength))),
        "codes_differ": sum(proof.codes_differ for proof in proofs),
        "scales_differ": sum(proof.scales_differ for proof in proofs),
        "parameters": sum(layer.a.numel() + layer.b.numel() for layer in adapter.layers.values()),
        "losses": losses,
        "options": options.to_json(),
        **taken,
    }


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter, times a factor."""
    layers = {path: replace(layer, factor=layer.factor * strength) for path, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


class Beside(nn.Module):
    """A float layer with an adapter beside it: y = linear(x) + factor * pool(x) @ A^T @ B^T."""

    def __init__(self, linear: nn.Module, layer: AdapterLayer) -> None:
        super().__init__()
        self.linear, self.layer = linear, layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        pooled = x.view(*x.shape[:-1], -1, self.layer.pool_size).sum(dim=-1)
        return self.linear(x) + self.layer.factor * (pooled @ self.layer.a.t() @ self.layer.b.t())


def beside(base: Checkpoint, adapter: Adapter) -> Any:
    """The base in float32 with an adapter in side branches: nothing is folded, nothing rounded."""

    def linear(path: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
        made = float_linear(path, weight, bias)
        return Beside(made, adapter.layers[path]) if path in adapter.layers else made

    return build(base, linear)


def make_qlora(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """PEFT's LoRA on the base's weights in bfloat16; perplexity with the adapter kept, in float32."""
    chosen, base = work.protocol, work.base(cell)
    import_all()
    clock = Clock()
    torch.manual_seed(cell.seed)
    model = with_lora(in_bfloat16(build(base)), chosen.peer_rank)
    return _trained(work, cell, model, clock, lambda: _kept_lora(work, cell, model, base))


def _kept_lora(work: Work, cell: Cell, model: Any, base: Checkpoint) -> dict[str, Any]:
    model.save_pretrained(str(work.adapter(cell.name)), save_embedding_layers=False)
    adapter = read_adapter(work.adapter(cell.name), base)
    return work.at_its_strength(lambda strength: beside(base, scaled(adapter, strength)))


def _trained(work: Work, cell: Cell, model: Any, clock: Clock, kept: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run the plain loop over a peer's model, then keep what was learned and measure it."""
    chosen = work.protocol
    options = {"learning_rate": float(cell.rate), "steps": chosen.steps, "batch": chosen.batch, "compute": "bfloat16"}
    blocks = work.blocks(work.base(cell))
    try:
        losses = run_steps(model, blocks, rate=float(cell.rate), steps=chosen.steps, batch=chosen.batch, seed=cell.seed)
    except ArithmeticError as error:
        return {"perplexity": None, "failed": str(error), "options": options}
    taken = clock.read()
    found = {"parameters": trainable(model.parameters()), "losses": losses, "options": options, **taken}
    return {**kept(), **found}


def make_peqa(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """The scales alone trained; perplexity of the result with scales and minima in float16."""
    base = work.base(cell)
    import_all()
    clock = Clock()

    def linear(path: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
        return ScaledLinear(weight.load_quantized(), bias)

    model = in_bfloat16(build(base, linear))
    return _trained(work, cell, model, clock, lambda: _kept_scales(work, cell, model, base))


def _kept_scales(work: Work, cell: Cell, model: Any, base: Checkpoint) -> dict[str, Any]:
    from safetensors.torch import save_file

    def made(strength: float) -> dict[str, GroupQuantTensor]:
        return {f"{path}.weight": layer.trained(strength) for path, layer in scales_of(model).items()}

    place = work.adapter(cell.name)
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.scale.half() for name, tensor in made(1.0).items()}, place / "scales.safetensors")
    return work.at_its_strength(lambda strength: with_tensors(base, made(strength)))


def with_tensors(model: Checkpoint, made: dict[str, GroupQuantTensor]) -> Checkpoint:
    """The model with some of its quantized weights replaced."""
    lazily = {name: replace(model.tensors[name], read=tensor.rows) for name, tensor in made.items()}
    return replace(model, tensors={**model.tensors, **lazily})


def merged(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base as floats with an ordinary LoRA added to them."""

    def lazily(old: LazyTensor, layer: AdapterLayer) -> LazyTensor:
        def read(start: int, stop: int) -> Tensor:
            rows = old.rows(start, stop)
            weight = rows.dequantize() if isinstance(rows, GroupQuantTensor) else rows.float()
            return weight + layer.factor * (layer.b[start:stop] @ layer.a)

        return LazyTensor(name=old.name, shape=old.shape, dtype=torch.float32, read=read)

    changed = {f"{path}.weight": lazily(base.tensors[f"{path}.weight"], of) for path, of in adapter.layers.items()}
    return replace(base, tensors={**base.tensors, **changed})


def make_requantized(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """QLoRA merged and quantized again: by gptq as the base was (perplexity), and by rounding."""
    base, name = work.base(cell), source(done, cell) or ""
    model = merged(base, work.strengthened(name, base, done))
    options = options_of(work, cell, "gptq")
    again = quantize_calibrated(model, work.calibration(model), options, requantize=True)
    rounded = quantize(model, bits=cell.bits, group_size=work.protocol.group, zeros="real", requantize=True)
    return {
        "perplexity": work.perplexity(again),
        "rounded": work.perplexity(rounded),
        "merged": work.perplexity(model),
        "source": name,
        "options": asdict(options),
    }


@torch.no_grad()
def make_exported(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """QA-LoRA folded, written as GGUF, and measured in llama.cpp on the same windows; and unfolded, in float32."""
    base, name = work.base(cell), source(done, cell) or ""
    adapter = work.strengthened(name, base, done)
    folded = fold(base, adapter)
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        export(folded, ["gguf"], Path(folder), ExportOptions(name="folded"))
        (file,) = Path(folder).rglob("*.gguf")
        stored = load(file)
        differing = [_codes_differ(base, stored, weight) for weight in base.linears]
        runtime = open_runtime("llama.cpp", file, threads=torch.get_num_threads())
        module = build(folded)
        losses, agreement = torch.zeros(2, dtype=torch.float64), 0.0
        for window in work.held:  # the logits of all windows would take gigabytes
            ours = module(input_ids=window[None], use_cache=False).logits[0]
            theirs = runtime.logits(window.tolist())
            for n, logits in enumerate((theirs, ours)):
                losses[n] += nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum")
            agreement += float((ours.argmax(1) == theirs.argmax(1)).float().mean())
        measured, folded_torch = (losses / (work.held.numel() - len(work.held))).exp().tolist()
        info = runtime.info
        runtime.close()
    return {
        "perplexity": measured,
        "folded": folded_torch,
        "unfolded": work.perplexity(beside(base, adapter)),
        "same_first_token": agreement / len(work.held),
        "codes_differ": sum(differing),
        "runtime": f"{info.name} {info.version}, {info.dtype}",
        "source": name,
    }


def _codes_differ(base: Checkpoint, stored: Checkpoint, name: str) -> int:
    return int((base.tensors[name].load_quantized().codes() != stored.tensors[name].load_quantized().codes()).sum())


KINDS: dict[str, Callable[[Work, Cell, Done], dict[str, Any]]] = {
    "float": make_float,
    "base": make_base,
    "qalora": make_qalora,
    **dict.fromkeys(VARIANTS, make_variant),
    "qlora": make_qlora,
    "peqa": make_peqa,
    "requantized": make_requantized,
    "exported": make_exported,
}
