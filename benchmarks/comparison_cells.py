"""One cell of `compare_training.py`: what is done, and what is stored of it; `comparison_work.py` measures.

Wall and processor seconds are of the training call, from the base's folder to the adapter, model building included,
imports and evaluation not; peak memory is that of the process until then.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from comparison_plan import MADE_OF, VARIANTS, Cell, Done, parse, source
from comparison_work import TRAIN, Work, scaled
from torch import Tensor, nn
from training_peers import ScaledLinear, run_steps, scales_of, trainable, with_lora

from qalora.adapter import Adapter, AdapterLayer, read_adapter
from qalora.calibration import quantize_calibrated
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.converters.torch_module import build, float_linear
from qalora.errors import DivergedError
from qalora.folding import fold, prove_fold
from qalora.parity.runtimes import open_runtime
from qalora.quantization import QuantizeOptions, quantize
from qalora.tensor import GroupQuantTensor
from qalora.training import TrainOptions, train

PASSES = {4: 0, 3: 0, 2: 2}
"""Passes of gptq at each width, as docs/quantize.md found them best."""


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
        save_base(work, cell)
    of = parse(source(done, cell) or "") if cell.kind in MADE_OF else None
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


def save_base(work: Work, cell: Cell) -> QuantizeOptions:
    """Quantize a cell's base, and save it as a folder of ours; gives how."""
    model, method = work.float_model(), "rtn" if cell.base.startswith("rtn") else "gptq"
    options = options_of(work, cell, method)
    if method == "gptq":
        made = quantize_calibrated(model, work.calibration(model), options, requantize=True)
    else:
        made = quantize(model, bits=cell.bits, group_size=work.protocol.group, zeros="real", requantize=True)
    place = work.folder / "bases" / cell.base
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        export(made, ["qalora"], Path(folder))
        place.parent.mkdir(exist_ok=True)
        try:
            (Path(folder) / "qalora").rename(place)
        except OSError:  # another process was faster, with the same bytes
            if not place.exists():
                raise
    return options


def make_base(work: Work, cell: Cell, done: Done) -> dict[str, Any]:
    """The base before training."""
    clock = Clock()
    options = save_base(work, cell)
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
    return {**train_qalora(work, cell, {"learning_rate": rate, **changes[cell.kind]}, base), "source": of.name}


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
        "max_steps": chosen.steps,
        "batch_size": chosen.batch,
        "max_length": chosen.length,
        "held_out": work.share,
        "save_every": 0,
        "seed": cell.seed,
        "device": "cpu",
        "dtype": "float32",
        "force": True,
    }
    options = TrainOptions(**{**settings, **changes})
    clock = Clock()
    try:
        adapter = train(base, options, lambda report: losses.append(report.loss) if report.step else None)
    except DivergedError as error:
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
    """PEFT's LoRA on the base's weights; perplexity with the adapter kept."""
    chosen, base = work.protocol, work.base(cell)
    import_all()
    clock = Clock()
    torch.manual_seed(cell.seed)
    model = with_lora(build(base), chosen.peer_rank)
    return _trained(work, cell, model, clock, lambda: _kept_lora(work, cell, model, base))


def _kept_lora(work: Work, cell: Cell, model: Any, base: Checkpoint) -> dict[str, Any]:
    model.save_pretrained(str(work.adapter(cell.name)), save_embedding_layers=False)
    adapter = read_adapter(work.adapter(cell.name), base)
    return work.at_its_strength(lambda strength: beside(base, scaled(adapter, strength)))


def _trained(work: Work, cell: Cell, model: Any, clock: Clock, kept: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run the plain loop over a peer's model, then keep what was learned and measure it."""
    chosen = work.protocol
    options = {"learning_rate": float(cell.rate), "steps": chosen.steps, "batch": chosen.batch}
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

    model = build(base, linear)
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
