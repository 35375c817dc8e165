"""A model as transformers' torch module, in float32: what the others are measured against, and what is trained.

The modules are built without memory and then filled from the checkpoint, a tensor at a time, so that nothing is held
twice. A `linear` factory decides what a decoder's linear layer is: by default a dequantized nn.Linear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.decoder import decoder_of
from qalora.errors import FormatError, InputError, first_line

__all__ = ["LinearFactory", "build", "float_linear", "layer_outputs"]

LinearFactory = Callable[[str, LazyTensor, Tensor | None], nn.Module]
"""Makes a linear layer from its module path, its weight and its bias."""


def float_linear(path: str, weight: LazyTensor, bias: Tensor | None) -> nn.Module:
    """A frozen nn.Linear of the dequantized weight in float32."""
    out, columns = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(columns, out, bias=bias is not None)
    linear.weight = nn.Parameter(weight.load_float().float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def build(
    model: Checkpoint, linear: LinearFactory = float_linear, complete: Callable[[nn.Module], None] = lambda layer: None
) -> Any:
    """A transformers *ForCausalLM of the model in eval mode: float32, frozen, on the CPU.

    complete  called with each decoder layer once its linear layers are in place, when its norms are not filled yet

    Raises InputError for a config that transformers does not take, FormatError for a tensor of another shape than the
    config says.
    """
    module = _empty(model.config, model.path)
    names, waiting = set(model.linears), Counter(map(_decoder_layer, model.linears))
    for name in model.linears:
        path = name.removesuffix(".weight")
        _check_shape(model, name, module.get_submodule(path).weight)
        bias = model.tensors.get(f"{path}.bias")
        layer = linear(path, model.tensors[name], None if bias is None else bias.load_float().float())
        names.add(f"{path}.bias")
        module.set_submodule(path, layer)
        waiting[_decoder_layer(name)] -= 1
        if not waiting[_decoder_layer(name)]:
            complete(module.get_submodule(_decoder_layer(name)))
    for name, parameter in list(module.named_parameters()):
        if name.rsplit(".", 1)[0] + ".weight" not in names and parameter.is_meta:
            _fill(model, module, name, parameter)
    module.tie_weights()
    _rebuild_buffers(module)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise FormatError(f"{model.path}: missing tensor {left[0]}, which config.json requires")
    return module.eval()


def _decoder_layer(name: str) -> str:
    """model.layers.N, where a tensor of this name is."""
    return ".".join(name.split(".")[:3])


def _empty(config: Mapping[str, Any], where: object) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    try:
        attention = "sdpa" if decoder_of(config, where).softcap is None else "eager"  # sdpa has no cap of scores
        with torch.device("meta"):
            settings = AutoConfig.for_model(**plain)
            return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=attention)
    except InputError:  # of ours, and a sentence already
        raise
    except Exception as error:  # whatever a config that is damaged makes transformers raise
        reason = first_line(error)
        raise InputError(f"{where}: config.json", expected="a config that transformers takes", got=reason) from error


def _fill(model: Checkpoint, module: Any, name: str, parameter: Tensor) -> None:
    if name not in model.tensors:
        if name == "lm_head.weight":  # the embedding, or what is left without values, and refused
            return
        raise FormatError(f"{model.path}: missing tensor {name}, which config.json requires")
    _check_shape(model, name, parameter)
    filled = torch.empty(parameter.shape)
    for row, tile in model.tensors[name].float_tiles():
        filled[row : row + tile.shape[0]] = tile
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(filled, requires_grad=False))


def _check_shape(model: Checkpoint, name: str, parameter: Tensor) -> None:
    if tuple(parameter.shape) != model.tensors[name].shape:
        raise FormatError(
            f"{model.path}: {name}", expected=f"shape {list(parameter.shape)}", got=str(list(model.tensors[name].shape))
        )


def _rebuild_buffers(module: Any) -> None:
    """Make modules with computed buffers again, now with memory, and the scale of Gemma's embeddings."""
    for path, part in list(module.named_modules()):
        if isinstance(part, nn.Embedding):
            if hasattr(part, "embed_scale"):
                part.embed_scale = torch.tensor(part.scalar_embed_scale)
        elif any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            module.set_submodule(path, type(part)(module.config))


@torch.inference_mode()
def layer_outputs(module: Any, tokens: Sequence[int]) -> list[Tensor]:
    """float32 [tokens, hidden] on the CPU after each decoder layer of a transformers *ForCausalLM, for one sequence."""
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: object, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu().clone())

    hooks = [layer.register_forward_hook(keep) for layer in module.get_decoder().layers]
    try:
        module(input_ids=torch.tensor([list(tokens)]).to(module.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
