"""A model's layers one after another, each with the inputs that the changed layers before it give.

The module is built without its linear weights. For each decoder layer they are read; linear layers that share an input
make a stage (q, k and v; o; gate and up; down); for each stage the second moments of its input are gathered over all
windows, the visitor replaces the weights, and the next stage sees what they do. Then the windows go through the changed
layer and its weights are let go. So memory is bounded by a decoder layer, the embedding, the windows' activations, and
square matrices of the widest layer's inputs: moments in float32 here, and what the visitor makes of them.

On a device other than the CPU there is one decoder layer at a time, and one window; the embedding, and the activations
between layers, stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.torch_module import build
from qalora.devices import CPU
from qalora.tensor import check_finite

__all__ = ["LinearLayer", "Visitor", "by_layer", "stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer:
    """A linear layer, and the moments of its input in the model as changed so far.

    name    of its weight
    weight  float32 [out, in], as the model has it; it and the moments are on the device of `stream`
    moments float32 [in, in], mean(x x^T) over every token of the windows, x the layer's input
    """

    name: str
    weight: Tensor
    moments: Tensor


Visitor = Callable[[Sequence[LinearLayer]], Iterable[Tensor | None]]
"""Given the layers of one input, gives the weights that take their places, float32 [out, in], on the same device; None
leaves one."""


def by_layer(visit: Callable[[LinearLayer], Tensor | None]) -> Visitor:
    """A visitor of one layer after another."""
    return lambda stage: map(visit, stage)


class _Streamed(nn.Module):
    """A linear layer whose weight comes and goes."""

    bias: Tensor | None

    def __init__(self, source: LazyTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.source = source
        self.register_buffer("bias", bias)  # which goes where its layer goes
        self.in_features, self.out_features = source.shape[1], source.shape[0]
        self.loaded: Tensor | None = None
        self.watch: Callable[[Tensor], None] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, where it is loaded; a placeholder of no memory otherwise."""
        return torch.empty(self.source.shape, device="meta") if self.loaded is None else self.loaded

    def forward(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        return functional.linear(x, self.weight, self.bias)


class _Reached(Exception):
    """Enough of a layer was computed."""


@torch.no_grad()
def stream(
    model: Checkpoint,
    windows: Tensor,
    visitor: Visitor,
    tick: Callable[[], None] = lambda: None,
    known: Callable[[str], Tensor | None] = lambda name: None,
    *,
    device: torch.device = CPU,
) -> None:
    """Visit the decoder's linear layers in the order of computation.

    windows  int64 [windows, tokens], token ids, each a sequence of its own
    tick     called after each decoder layer
    known    gives the changed weight of a name where it is there already: a decoder layer whose weights are all known
             is computed and not visited
    device   where the layers are computed

    Raises NotFiniteError, an InputError, where the inputs of a layer are no numbers.
    """
    module = build(model, lambda path, weight, bias: _Streamed(weight, bias))
    names = {module.get_submodule(module_of(name)): name for name in model.linears}
    layers: Sequence[nn.Module] = module.model.layers
    hidden, settings = _entry(module, layers, windows)
    for n, layer in enumerate(layers):
        inside = [part for part in layer.to(device).modules() if isinstance(part, _Streamed)]
        changed_before = [known(names[part]) for part in inside]
        visited = any(weight is None for weight in changed_before)
        for part, weight in zip(inside, changed_before, strict=True):
            loaded = part.source.load_float().float() if visited or weight is None else weight
            part.loaded = loaded.to(device)
        beside = _moved(settings[n], device)

        def run(x: Tensor, layer: nn.Module = layer, beside: dict[str, Any] = beside) -> Tensor:
            output: Tensor | tuple[Tensor, ...] = layer(x.to(device), **beside)
            return output[0] if isinstance(output, tuple) else output

        for stage in _stages(inside, run, hidden[0]) if visited else ():
            moments = _moments(stage[0], run, hidden, device)
            check_finite(f"the inputs of {names[stage[0]]}", moments)
            linears = [LinearLayer(name=names[part], weight=part.weight, moments=moments) for part in stage]
            for part, changed in zip(stage, visitor(linears), strict=True):
                part.loaded = part.loaded if changed is None else changed
        hidden = [run(x).to(CPU) for x in hidden]
        for part in inside:
            part.loaded = None
        tick()


def _entry(module: Any, layers: Sequence[nn.Module], windows: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer is given for each window, and what each layer is given beside: masks and positions, which
    are the same for all windows, as they are of one length.
    """
    hidden: list[Tensor] = []
    settings: list[dict[str, Any]] = [{} for _ in layers]

    def recorder(n: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            if n == 0:
                hidden.append(hidden_states)
            settings[n] = {**kwargs, "past_key_values": None, "use_cache": False}
            return hidden_states

        return forward

    for n, layer in enumerate(layers):
        layer.forward = recorder(n)
    try:
        for window in windows:
            module.model(input_ids=window[None], use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return hidden, settings


def _stages(parts: Sequence[_Streamed], run: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[list[_Streamed]]:
    """The linear layers in the order of computation, those that are given the very same input together."""
    calls: list[tuple[_Streamed, Tensor]] = []

    def watcher(part: _Streamed) -> Callable[[Tensor], None]:
        return lambda layer_input: calls.append((part, layer_input))

    with _watched({part: watcher(part) for part in parts}):
        run(x)
    stages: list[tuple[Tensor, list[_Streamed]]] = []
    for part, layer_input in calls:
        if stages and stages[-1][0] is layer_input:
            stages[-1][1].append(part)
        else:
            stages.append((layer_input, [part]))
    return iter([stage for _, stage in stages])


def _moments(
    part: _Streamed, run: Callable[[Tensor], Tensor], hidden: Sequence[Tensor], device: torch.device
) -> Tensor:
    """mean(x x^T) of a layer's input over all windows; what comes after it is not computed."""
    total = torch.zeros(part.in_features, part.in_features, device=device)
    count = 0

    def add(x: Tensor) -> None:
        nonlocal count
        rows = x.reshape(-1, x.shape[-1])
        total.addmm_(rows.t(), rows)
        count += rows.shape[0]
        raise _Reached

    with _watched({part: add}):
        for x in hidden:
            try:
                run(x)
            except _Reached:
                continue
    return total.div_(count)


def _moved(value: Any, device: torch.device) -> Any:
    """What a layer is given beside, with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if type(value) in (tuple, list) else value


@contextmanager
def _watched(watchers: dict[_Streamed, Callable[[Tensor], None]]) -> Iterator[None]:
    for part, watch in watchers.items():
        part.watch = watch
    try:
        yield
    finally:
        for part in watchers:
            part.watch = None
