"""Write a planned GPTQ folder, a layer at a time; embedding and output layer by rows."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, module_of
from qalora.converters.decoded import decoded
from qalora.converters.folder import write_beside
from qalora.converters.format import for_the_whole
from qalora.converters.gptq.beside import ADAPTER_CONFIG, ADAPTER_WEIGHTS, plain_lora, pooling_matrix
from qalora.converters.gptq.forms import Encoded, encode
from qalora.converters.gptq.head import HEAD
from qalora.converters.gptq.planner import GptqPlan
from qalora.converters.gptq.readme import readme
from qalora.converters.plan import LOSSES, Plan, Progress
from qalora.converters.specs import narrowed
from qalora.errors import ExactnessError
from qalora.formats.gptq import pack_qweight, pack_qzeros
from qalora.formats.output import write_json
from qalora.formats.safetensors import SafetensorsWriter, ShardedWriter
from qalora.formats.share import Share
from qalora.formats.workers import JOB_BYTES, Workers
from qalora.tensor import GroupQuantTensor

__all__ = ["write"]

WORDS = 1 << 20
"""Words that are laid out at a time."""


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the folder. Raises ExactnessError if a residual needs more than float32 and that was not allowed."""
    if not isinstance(plan, GptqPlan):
        raise TypeError(f"expected GptqPlan, got {type(plan).__name__}")
    if share.frame:
        _write_small_files(plan, model, folder)
    sizes: Counter[str] = Counter()
    for row in plan.tensors:
        sizes[row.name] += row.nbytes
    with ExitStack() as files:
        weights = files.enter_context(ShardedWriter(folder, plan.layout, share))
        beside = None
        if plan.beside is not None:
            beside = files.enter_context(SafetensorsWriter(folder / ADAPTER_WEIGHTS, plan.beside, share))
        workers = files.enter_context(Workers())
        for name, lazy in model.everything.items():
            if not share.writes(name):
                continue
            if name in plan.words:
                _write_linear(plan, lazy, weights, beside, workers)
            else:
                for start, tile in lazy.tiles(JOB_BYTES):
                    workers.do(_write_float, weights, lazy, start, tile)
            progress(name, sizes[name])


def _write_small_files(plan: GptqPlan, model: Checkpoint, folder: Path) -> None:
    write_beside(plan.config, model, folder)
    write_json(folder / "quantize_config.json", plan.config["quantization_config"])
    if plan.adapter_config is not None:
        write_json(folder / ADAPTER_CONFIG, plan.adapter_config)
    text = readme(
        plan.config, plan.adapter_config, residual=plan.adapter is None, name="path/to/this/folder", vllm=plan.vllm
    )
    text = for_the_whole(text, (row.carrier for row in plan.tensors))
    (folder / "README.md").write_text(text, encoding="utf-8")


def _write_float(weights: ShardedWriter, lazy: LazyTensor, row: int, tile: Tensor | GroupQuantTensor) -> None:
    weights.write(lazy.name, decoded(lazy, tile, weights.layout.entry(lazy.name).dtype), row)


def _write_linear(
    plan: GptqPlan,
    lazy: LazyTensor,
    weights: ShardedWriter,
    beside: SafetensorsWriter | None,
    workers: Workers,
) -> None:
    """Groups first, then the words, which need the codes only."""
    tensor = lazy.load_quantized()
    workers.do(_write_groups, plan, lazy.name, tensor, weights, beside)
    if plan.form != "eight-bit" or lazy.name == HEAD:
        step = max(1, WORDS // tensor.shape[0])
        for start in range(0, tensor.packed.shape[1] // 4, step):
            workers.do(_write_words, weights, module_of(lazy.name), tensor.packed, start, start + step)


def _write_words(weights: ShardedWriter, module: str, packed: Tensor, start: int, stop: int) -> None:
    weights.write(f"{module}.qweight", pack_qweight(packed, start, stop), start)


def _write_groups(
    plan: GptqPlan, weight: str, tensor: GroupQuantTensor, weights: ShardedWriter, beside: SafetensorsWriter | None
) -> None:
    module, columns = module_of(weight), tensor.shape[1]
    layer = encode(tensor, "own" if weight == HEAD else plan.form)
    if layer.packed is not tensor.packed:
        weights.write(f"{module}.qweight", pack_qweight(layer.packed))
    weights.write(
        f"{module}.qzeros", pack_qzeros(layer.zero, layer.bits, plan.config["quantization_config"]["checkpoint_format"])
    )
    weights.write(f"{module}.scales", layer.scale.t().contiguous())
    natural = (torch.arange(columns) // tensor.group_size).to(torch.int32)
    weights.write(f"{module}.g_idx", natural if tensor.g_idx is None else tensor.g_idx)
    if beside is None or module not in plan.lora:
        return
    a, b = plan.lora[module]
    if plan.adapter is None:
        step = max(1, WORDS // columns)
        for start in range(0, tensor.groups, step):
            rows = pooling_matrix(columns, tensor.group_size, tensor.g_idx, start, start + step)
            beside.write(a, rows.to(beside.layout.entries[a].dtype), start)
        parts = {b: _residual(plan, weight, layer)}
    elif module in plan.adapter.layers:
        parts = dict(zip((a, b), plain_lora(plan.adapter.layers[module]), strict=True))
    else:
        return
    for name, part in parts.items():
        beside.write(name, narrowed(name, part, beside.layout.entries[name].dtype))


def _residual(plan: GptqPlan, name: str, layer: Encoded) -> Tensor:
    if layer.c is None:
        raise TypeError(f"{name}: form {plan.form} leaves no residual")
    if not layer.exact and not plan.rounds:
        raise ExactnessError(
            f"gptq: {name}",
            expected="a residual that float32 holds",
            got=LOSSES["residual"],
            todo="accept it with `allow_loss` residual",
        )
    return layer.c
