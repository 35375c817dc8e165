"""Training with the fold in the loop: each step trains the model of the minima that would be folded now.

The adapter, its gradients and AdamW are float32. Steps multiply the base's weights and what the fold adds to them, in
float32 or bfloat16 (`qalora.training.fast`). Held-out losses are always those of the folded model, by the exact forward
in float32 (`qalora.training.layer`), and the adapter that is written folds to the very minima of the last one.
Runs are deterministic: the same options, data and model give the same adapter on the same machine with the same number
of threads, whether or not the run was interrupted and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qalora.adapter import ADAPTER_FILES, Adapter, convert, write_adapter
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of
from qalora.converters.torch_module import LinearFactory
from qalora.devices import find_device
from qalora.errors import DivergedError, OutputError
from qalora.folding import FLOAT16_MAX
from qalora.formats.output import check_apart, check_writable, new_folder, write_json
from qalora.options.train import TrainOptions
from qalora.training.checks import check_before
from qalora.training.compute import dtype_of
from qalora.training.data import Blocks
from qalora.training.distributed import ALONE, Processes, joined
from qalora.training.documents import Account
from qalora.training.fast import SharedInput, refresh, share_inputs
from qalora.training.interrupt import Interrupted, deferred
from qalora.training.layer import FoldedLinear
from qalora.training.lean import checkpoint_layers, fit
from qalora.training.loss import IGNORED, summed_cross_entropy
from qalora.training.pace import Pace, Progress, StepReport
from qalora.training.plan import data_of, targets_of
from qalora.training.sharding import Sharding, Table, whole
from qalora.training.starting import SEQUENCES, first_rows
from qalora.training.state import (
    State,
    checkpoint_of,
    fingerprint,
    forget_state,
    has_state,
    layer_digest,
    read_ranks,
    read_state,
    write_state,
)
from qalora.training.strength import Tried, at_strength, best_of, try_strengths

__all__ = ["LOG", "train"]

LOG = "training.json"

EVALUATED = 2048
"""Tokens of a forward for held-out losses, at most, if a step's have no more: each forward unpacks every weight."""


def train(
    model: Checkpoint,
    options: TrainOptions,
    progress: Progress = lambda report: None,
    on_account: Callable[[Account], None] = lambda account: None,
) -> Adapter:
    """Train an adapter, write it to `options.out`, and give it as it was written.

    on_account  called with what is learned

    The folder holds an adapter that PEFT can read, and training.json: options, losses by step, held-out losses, in nats
    per token. Raises InputError for a float or act-order model, one without tokenizer, target modules that match
    nothing, data that is too short or not as `qalora.training.data` says, an output that exists or cannot be made,
    and a checkpoint of an earlier run, which only resume or force touch; DivergedError for a loss that is no number;
    Interrupted, a KeyboardInterrupt, after Ctrl-C or SIGTERM, with a checkpoint of the step that was under way if there
    are checkpoints. In a process that a launcher started it is that process's part of one run, see
    `qalora.training.distributed`: each gets the adapter, the first writes it and gets the progress.
    """
    with joined(options.device) as processes:
        with processes.together():
            check_before(options)
            check_apart(options.out, model.path)
            if processes.first:
                check_writable(options.out)
            targets = targets_of(model, options)
            training, evaluation = data_of(model, options)
            if processes.first:
                on_account(training.account)
            run = _Run(model, options, targets, training, evaluation, processes)
            state = run.resumed() if options.resume else State()
        run.check_same(state)
        with deferred(options.save_every > 0) as interrupted:
            with processes.noticing():
                run.to_the_end(state, progress if processes.first else lambda report: None, interrupted)
                adapter = convert(run.adapter(), options.convention)
            with processes.together():
                if processes.first:
                    run.write(adapter, state)
    return adapter


class _Run:
    """A model that is being trained."""

    def __init__(
        self,
        model: Checkpoint,
        options: TrainOptions,
        targets: frozenset[str],
        training: Blocks,
        evaluation: Blocks,
        processes: Processes = ALONE,
    ) -> None:
        self._options, self._training, self._evaluation, self._processes = options, training, evaluation, processes
        self._device = find_device(options.device)
        self._dtype = dtype_of(options.dtype, self._device)
        self._sharding = Sharding(processes, self._device) if options.shard else None
        self._layers: dict[str, FoldedLinear] = {}
        digests: dict[str, bytes] = {}
        self._tried: Tried = ()
        self._pace = Pace()
        self._say: Callable[[], None] = lambda: None
        self._rng = torch.Generator().manual_seed(options.seed)

        def linear(path: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
            trained = path in targets
            if weight.spec is None:
                from qalora.converters.torch_module import float_linear

                return float_linear(path, weight, bias)
            layer = FoldedLinear(
                weight.load_quantized(),
                bias,
                name=f"{path}.weight",
                rank=options.first_rank,
                factor=options.scaling,
                pool_size=options.pool_size or weight.spec.group_size,
                minima=options.minima,
                rng=self._rng,
                trained=trained,
            )
            if trained:
                self._layers[path] = layer
            digests[path] = layer_digest(layer)
            return layer

        self._build(model, linear)
        decoder = decoder_of(model.config, model.path)
        self._softcap, self._divisor = decoder.logit_softcap, decoder.logit_divisor
        self._shared: list[SharedInput] = []
        if self._dtype != torch.float32 or options.weights == "kept":
            fit(self._module, decoder, self._dtype)
            layers = ((path, part) for path, part in self._module.named_modules() if isinstance(part, FoldedLinear))
            shared = share_inputs(layers, self._dtype, keep=options.weights == "kept" and not options.shard)
            self._shared = [] if options.shard else shared
        if options.gradient_checkpointing:
            checkpoint_layers(self._module)
        self._take_parameters()
        self._each = options.batch_size * options.gradient_accumulation_steps
        self._steps = options.max_steps or max(1, len(training) // self._each)
        self._chosen = {
            **{key: value for key, value in options.to_json().items() if key != "data"},
            "max_steps": self._steps,
            "device": str(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
        }
        self._identity = {
            **self._chosen,
            "data_sha256": training.digest() + evaluation.digest(),
            "model_sha256": fingerprint(model.config, self._module, digests),
        }

    def _build(self, model: Checkpoint, linear: LinearFactory) -> None:
        """The module on its device, the embedding, and the output layer in each dtype that it is used in."""
        from qalora.converters.torch_module import build

        if self._sharding is None:
            self._module = build(model, linear).to(self._device)
            self._embedding = Table(self._module.model.embed_tokens.weight.detach())
            head = Table(self._module.lm_head.weight.detach())
        else:
            self._module = build(model, linear, self._sharding.take_layer)
            self._embedding, head = self._sharding.take_rest(self._module)
            self._module.to(self._device)
        self._heads = {dtype: head.to(dtype) for dtype in (torch.float32, self._dtype)}

    def _take_parameters(self) -> None:
        """The layers' A and B by name, and a new optimizer for them."""
        options = self._options
        self._parameters = {
            f"{path}.{part}": getattr(layer, part) for path, layer in self._layers.items() for part in ("a", "b")
        }
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        # In one piece: small tensors that a backward makes would lie between the large ones, and leave gaps.
        self._gradients = torch.zeros(sum(sizes), device=self._device)
        for parameter, part in zip(self._parameters.values(), torch.split(self._gradients, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=options.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=options.weight_decay,
            fused=True,
        )

    @property
    def _of_start(self) -> int:
        """Sequences whose gradient is gathered before the first step."""
        options = self._options
        return min(SEQUENCES, len(self._training)) if options.start == "gradient" or options.rank == "auto" else 0

    def start(self) -> None:
        """Rows of A, and ranks, from the first gradient, where options ask for them."""
        if not self._of_start:
            return
        for path, a in first_rows(self._first_gradients(), self._options, self._rng).items():
            self._layers[path].start_from(a)
        self._take_parameters()

    def _first_gradients(self) -> dict[str, Tensor]:
        """The gradient of each layer's B @ A, float32 [out, in/pool_size], over the first sequences of the run."""
        gradients = {path: layer.gather() for path, layer in self._layers.items()}
        mean = self._backward(0, self._of_start, say=True)
        for layer in self._layers.values():
            layer.gathered = None
        self._gradients.zero_()
        self._processes.sum_tensors(list(gradients.values()))
        if not math.isfinite(mean):
            raise DivergedError(
                "the model's loss on the first sequences", expected="a number", got=f"{mean}", todo="look at the base"
            )
        return {path: gradient.cpu() for path, gradient in gradients.items()}

    def resumed(self) -> State:
        """The state of the checkpoint, after it was put into the model."""
        if self._options.rank == "auto":
            for path, rank in read_ranks(self._options.out, self._identity, list(self._layers)).items():
                self._layers[path].start_from(torch.zeros(rank, self._layers[path].a.shape[1]))
            self._take_parameters()
        return read_state(self._options.out, self._identity, self._parameters, self._optimizer)

    def check_same(self, state: State) -> None:
        """InputError where the processes are not of one run: other options, data, model, or step."""
        self._processes.check_same({**self._identity, "step": state.step})

    def to_the_end(self, state: State, progress: Progress, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Every step that is left; Interrupted after the step in which `interrupted` says so, in whichever process."""
        options = self._options
        self._plan(state)
        self._say = lambda: progress(self._report(state, ""))
        if state.step == 0:
            self.start()
        if not state.held_out:
            state.held_out.append((0, self.evaluate()))
        self._say = lambda: None
        if state.step == self._steps:
            self._try_strengths(state)
            progress(self._report(state, ""))
        while state.step < self._steps:
            self._pace.begin()
            state.losses.append(self._step(state.step))
            self._pace.trained(self._each)
            state.step += 1
            if state.step == self._steps or (options.evaluate_every and state.step % options.evaluate_every == 0):
                state.held_out.append((state.step, self.evaluate()))
            if state.step == self._steps:
                self._try_strengths(state)
            stop = self._processes.sum(interrupted()) > 0
            due = options.save_every and state.step % options.save_every == 0 and state.step < self._steps
            note = self._saved(state) if stop or due else ""
            progress(self._report(state, "" if stop else note))
            if stop:
                where = self._processes.heard(note) or f"continue from {checkpoint_of(options.out)} with `resume`"
                raise Interrupted(f"interrupted after step {state.step} of {self._steps}; {where}")

    def _plan(self, state: State) -> None:
        """Sequences that are left; a strength that is tried at the end is one more held-out loss, at least."""
        steps, every = self._steps - state.step, self._options.evaluate_every or self._steps
        evaluations = math.ceil(self._steps / every) - state.step // every
        evaluations += (not state.held_out) + (self._options.strength != 1)
        self._pace.training = steps * self._each + (0 if state.step else self._of_start)
        self._pace.evaluation = evaluations * len(self._evaluation)
        self._pace.begin()

    def _try_strengths(self, state: State) -> None:
        """Held-out losses after the last step, at the strength that was asked for, or at those that are to be tried."""
        strength, full = self._options.strength, state.held_out[-1][1]
        if strength == "auto":
            self._tried = try_strengths(full, self._loss_at)
        else:
            self._tried = ((strength, full if strength == 1 else self._loss_at(strength)),)

    def _loss_at(self, strength: float) -> float:
        with at_strength(list(self._layers.values()), strength):
            return self.evaluate()

    def _report(self, state: State, note: str) -> StepReport:
        latest = state.held_out[-1][1] if state.held_out else math.nan
        strength, held_out = best_of(self._tried) if self._tried else (1.0, latest)
        return StepReport(
            step=state.step,
            steps=self._steps,
            loss=state.losses[-1] if state.losses else math.nan,
            held_out=held_out,
            tokens_per_second=self._pace.speed(self._options.max_length),
            seconds_left=self._pace.left,
            strength=strength,
            note=note,
        )

    def _saved(self, state: State) -> str:
        """Write a checkpoint; gives what is to be said where that failed, which ends no run."""
        if not self._processes.first:
            return ""
        try:
            write_state(self._options.out, state, self._identity, self._parameters, self._optimizer)
        except OutputError as error:
            remains = "; an earlier one stays" if has_state(self._options.out) else ""
            return f"no checkpoint of step {state.step}: {error}{remains}"
        return ""

    def write(self, adapter: Adapter, state: State) -> None:
        """Write the adapter's folder and remove the checkpoint; where it fails, a checkpoint of the end stays."""
        options = self._options
        try:
            with new_folder(options.out, force=options.force, names=ADAPTER_FILES) as folder:
                write_adapter(adapter, folder)
                write_json(folder / LOG, self.log(state))
        except (OutputError, KeyboardInterrupt) as error:
            if not options.save_every:
                raise
            left = self._saved(state) or f"everything that was trained is in {checkpoint_of(options.out)}: use `resume`"
            raise type(error)(f"{str(error) or 'interrupted'}; {left}") from error
        forget_state(options.out)

    def _step(self, step: int) -> float:
        """One optimizer step; gives the mean loss of its tokens before it."""
        options = self._options
        mean = self._backward(step * self._each, self._each)
        self._processes.sum_tensors([self._gradients])
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), options.max_gradient_norm)
        if not math.isfinite(mean) or not bool(torch.isfinite(norm)):
            raise DivergedError(
                f"step {step + 1}: the loss is {mean} and the gradient's norm {float(norm)}",
                todo="train with a lower `learning_rate`",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step, self._steps, options.warmup)
        self._optimizer.step()
        self._gradients.zero_()
        return mean

    def _backward(self, first: int, sequences: int, *, say: bool = False) -> float:
        """Forward and backward over this process's share of the run's sequences number first, first+1, ...; gives the
        mean loss of all their tokens, which is what the processes' gradients add up to the gradient of.
        """
        refresh(self._shared)
        tokens, targets = self._training.take(_order(len(self._training), self._options.seed, first, sequences))
        count = max(1, int((targets != IGNORED).sum()))
        total = 0.0
        for rows in self._forwards(sequences, self._options.batch_size):
            loss = self._loss(*_of_rows(tokens, targets, rows), self._dtype)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            if say:
                self._pace.trained(len(rows) * self._processes.size)
                self._say()
        return self._processes.sum(total) / count

    def _forwards(self, sequences: int, most: int) -> Iterator[Tensor]:
        """This process's share of some sequences, so many at most at a time; where the base is spread over processes,
        none at the end, so that all make as many forwards.
        """
        forwards = [rows for rows in torch.split(self._processes.share(sequences), most) if len(rows)]
        if self._sharding is not None:
            all_of_them = math.ceil(math.ceil(sequences / self._processes.size) / most)
            forwards += [torch.empty(0, dtype=torch.int64)] * (all_of_them - len(forwards))
        return iter(forwards)

    def _loss(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        table = {"weight": self._embedding.whole()}
        embedded = functional_call(self._module.model.embed_tokens, table, tokens.to(self._device)).to(dtype)
        del table
        out = self._module.model(inputs_embeds=embedded, use_cache=False)
        hidden = out.last_hidden_state.flatten(0, 1)
        if self._divisor != 1.0:  # of the logits, which are linear in it
            hidden = hidden / self._divisor
        flat_targets = targets.to(self._device).flatten()
        return summed_cross_entropy(hidden, self._heads[dtype].whole(), flat_targets, self._softcap)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The held-out loss in nats per token, of the folded model in float32: the exact forward."""
        options = self._options
        total = 0.0
        self._pace.begin()
        for rows in self._forwards(len(self._evaluation), max(options.batch_size, EVALUATED // options.max_length)):
            held_out = self._evaluation.tokens, self._evaluation.targets
            total += self._loss(*_of_rows(*held_out, rows), torch.float32).item()
            self._pace.evaluated(len(rows) * self._processes.size)
            self._say()
        return self._processes.sum(total) / int((self._evaluation.targets != IGNORED).sum())

    def adapter(self) -> Adapter:
        """What was learned, at its strength, in the paper's convention.

        DivergedError for minima that float16 does not reach.
        """
        with at_strength(list(self._layers.values()), best_of(self._tried)[0]):
            for path, largest in self._largest_minima():
                if self._options.minima == "float16" and not largest <= FLOAT16_MAX:
                    raise DivergedError(
                        f"the minima of {path}",
                        expected="values that float16 reaches",
                        got=f"{largest:g}",
                        todo="train with `minima` float32 or a lower `learning_rate`",
                    )
            return Adapter(
                layers={path: layer.adapter_layer() for path, layer in self._layers.items()},
                convention="paper",
                minima=self._options.minima,
            )

    def _largest_minima(self) -> Iterator[tuple[str, float]]:
        """The largest |min'| of each layer that is trained."""
        paths = {layer: path for path, layer in self._layers.items()}
        for decoder_layer in self._module.model.layers:
            with whole(decoder_layer):
                for layer in filter(paths.__contains__, decoder_layer.modules()):
                    yield paths[layer], float(layer.folded().abs().max())

    def log(self, state: State) -> dict[str, Any]:
        """What training.json holds. The last held-out loss is that of the adapter that is written."""
        strength, last = best_of(self._tried)
        held_out = [*state.held_out[:-1], (state.held_out[-1][0], last)]
        return {
            "options": {
                **self._chosen,
                "data": Path(self._options.data).name,
                "weights": self._options.weights,
                "gradient_checkpointing": self._options.gradient_checkpointing,
                **({"processes": self._processes.size} if self._processes.size > 1 else {}),
                **({"shard": True} if self._options.shard else {}),
            },
            "data_sha256": self._identity["data_sha256"],
            "data": self._training.account.to_json(),
            "trained_parameters": sum(parameter.numel() for parameter in self._parameters.values()),
            "trained_tokens": self._steps * self._each * self._options.max_length,
            "held_out_tokens": int((self._evaluation.targets != IGNORED).sum()),
            "losses": [_short(loss) for loss in state.losses],
            "held_out": [{"step": step, "loss": _short(loss)} for step, loss in held_out],
            "strength": strength,
            "strengths": [{"strength": tried, "held_out_loss": _short(loss)} for tried, loss in self._tried],
        }


def _of_rows(tokens: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences of these numbers; for none the first, of which nothing is learned."""
    if len(rows):
        return tokens[rows], targets[rows]
    return tokens[:1], torch.full_like(targets[:1], IGNORED)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _schedule(step: int, steps: int, warmup: float) -> float:
    """1 at most: up in a line over the first share of the steps, then down in a line to 1/(steps left)."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


def _order(blocks: int, seed: int, first: int, count: int) -> Sequence[int]:
    """The blocks number first .. first+count-1 of an endless sequence of epochs, each a permutation of its own."""
    order: list[int] = []
    while len(order) < count:
        epoch, at = divmod(first + len(order), blocks)
        rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(blocks, generator=rng)[at : at + count - len(order)].tolist()
    return order
