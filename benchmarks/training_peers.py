"""What others train, in one plain loop like qalora's, for `benchmark_training.py` and `compare_training.py`.

LoRA, by PEFT       on float weights, kept beside them
PEQA                arXiv 2305.14152, and the second phase of EfficientQAT, arXiv 2407.11062: codes and zero points z
                    stay, the scales are trained
                        W = s * (codes - z)     grad_s = sum over the group of grad_W * (codes - z)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qalora.tensor import GroupQuantTensor
from qalora.training.data import Blocks
from qalora.training.loop import _order, _schedule
from qalora.training.loss import IGNORED

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def in_bfloat16(module: Any) -> Any:
    """The module with its frozen parameters in bfloat16; buffers, such as the rotation's frequencies, stay."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return module


def with_lora(module: Any, rank: int, **options: Any) -> Any:
    """PEFT's model with a float32 LoRA on every projection, alpha = rank; options are LoraConfig's."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(module, config)


def loss_of(module: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of some blocks, in float32 from the logits on."""
    tokens, targets = tokens.to(module.device), targets.to(module.device)
    logits = module(input_ids=tokens, use_cache=False).logits.float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)


def run_steps(
    module: Any,
    blocks: Blocks,
    *,
    rate: float,
    steps: int,
    batch: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train what of the module is not frozen, as `qalora.training` does: the loss of each step.

    AdamW without decay, gradients clipped to 1, the same blocks in the same order, the same schedule. ArithmeticError
    where a loss or gradient is no number.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = loss_of(module, *blocks.take(_order(len(blocks), seed, step * batch, batch)))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not bool(torch.isfinite(norm)):
            raise ArithmeticError(f"step {step + 1}: the loss is {losses[-1]} and the gradient's norm {float(norm)}")
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, steps, 0.05)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()
    return losses


class ScaledLinear(nn.Module):
    """A quantized layer whose scales are trained: float32 [out, in/group_size]; see the module.

    Where the scale is 0 there is no zero point: such a group keeps its min and does not learn.
    """

    def __init__(self, tensor: GroupQuantTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.tensor, self.codes = tensor, tensor.codes()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.fixed = tensor.scale == 0
        self.zero = torch.where(self.fixed, 0.0, -tensor.min / torch.where(self.fixed, 1.0, tensor.scale))
        self.scale = nn.Parameter(tensor.scale.clone())
        self.in_features, self.out_features = tensor.shape[1], tensor.shape[0]

    def centred(self) -> Tensor:
        """codes - z in float32 [out, groups, group_size]."""
        out, groups = self.zero.shape
        return self.codes.view(out, groups, -1) - self.zero[..., None]

    def weight(self) -> Tensor:
        """W in float32 [out, in]."""
        kept = torch.where(self.fixed, self.tensor.min, 0.0)
        return self.centred().mul_(self.scale.detach()[..., None]).add_(kept[..., None]).view(self.codes.shape)

    def trained(self, strength: float = 1.0) -> GroupQuantTensor:
        """The layer with what was learned, times a factor; scale and min are rounded to float16."""
        scale = torch.lerp(self.tensor.scale, self.scale.detach(), strength).half().float()
        minimum = torch.where(self.fixed, self.tensor.min, -scale * self.zero).half().float()
        return GroupQuantTensor(
            packed=self.tensor.packed,
            scale=scale,
            min=minimum,
            bits=self.tensor.bits,
            group_size=self.tensor.group_size,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        y: Tensor = _Scaled.apply(x, self.scale, self)
        return y


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, layer: ScaledLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.weight().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        grad_y = grads[0]
        rows = grad_y.reshape(-1, layer.out_features)
        grad_x = grad_y @ layer.weight().to(grad_y.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (rows.t() @ x.reshape(-1, layer.in_features)).float()
        centred = layer.centred()
        grad_s = (grad_w.view(centred.shape) * centred).sum(dim=2).masked_fill_(layer.fixed, 0.0)
        return grad_x, grad_s, None


def scales_of(module: Any) -> dict[str, ScaledLinear]:
    """The layers whose scales are trained, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, ScaledLinear)}


def trainable(parameters: Iterable[Tensor]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
