"""qalora inspect."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.options import convention_option, json_flag, print_json

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint, LazyTensor


@click.command("inspect", epilog="Example: qalora inspect dist/gguf/model.gguf")
@click.argument("path")
@convention_option
@json_flag
def command(path: str, convention: str | None, as_json: bool) -> None:
    """Say what a model, adapter or artefact is: layout, family, bits, groups, zero points, convention, size."""
    found = _describe(path, convention)
    if as_json:
        print_json(found)
        return
    width = max(len(key) for key in found)
    for key, value in found.items():
        lines = value if isinstance(value, list) else [value]
        for n, line in enumerate(lines):
            click.echo(f"{'' if n else key:<{width}}  {line}")


def _describe(path: str, convention: str | None) -> dict[str, Any]:
    if (Path(path) / "adapter_config.json").exists() and not (Path(path) / "config.json").exists():
        from qalora.adapter import read_adapter

        return _adapter(path, read_adapter(Path(path), convention=convention))  # type: ignore[arg-type]
    if (Path(path) / "model.onnx").exists() or path.endswith(".onnx"):
        from qalora.converters.onnx.reader import read as read_onnx

        return _model(path, read_onnx(Path(path)))
    from qalora.converters import load

    return _model(path, load(path))


def _model(path: str, model: Checkpoint) -> dict[str, Any]:
    kinds = Counter(_kind(lazy) for lazy in model.tensors.values())
    weights = sum(_count(lazy) for lazy in model.tensors.values())
    return {
        "path": path,
        "layout": model.layout,
        "family": str(model.config.get("model_type")),
        "layers": model.config.get("num_hidden_layers"),
        "weights": f"{weights:,}",
        "tensors": [f"{count} x {kind}" for kind, count in kinds.most_common()],
        "output": "tied to the embedding" if model.tied else "a layer of its own",
        "files": sorted(model.files),
        "notes": list(model.notes),
    }


def _kind(lazy: LazyTensor) -> str:
    spec = lazy.spec
    if spec is None:
        return str(lazy.dtype).removeprefix("torch.")
    order = ", act-order" if spec.act_order else ""
    return f"{spec.bits} bits in groups of {spec.group_size}, {spec.zeros} zero points{order}"


def _count(lazy: LazyTensor) -> int:
    count = 1
    for size in lazy.shape:
        count *= size
    return count


def _adapter(path: str, adapter: Adapter) -> dict[str, Any]:
    kinds = Counter((layer.rank, layer.pool_size) for layer in adapter.layers.values())
    return {
        "path": path,
        "layout": "adapter",
        "convention": adapter.convention,
        "minima": adapter.minima or "not recorded",
        "layers": [f"{count} x rank {rank}, pool size {pool}" for (rank, pool), count in kinds.most_common()],
        "parameters": f"{sum(layer.a.numel() + layer.b.numel() for layer in adapter.layers.values()):,}",
    }
