"""qalora inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qalora.cli.closing import print_next
from qalora.cli.options import Command, checkpoint_format_option, convention_option, json_flag, print_json
from qalora.cli.progress import log_format_option, progress_bar

if TYPE_CHECKING:
    from qalora.inspection import AdapterReport, Finding, ModelReport, Report


@click.command("inspect", cls=Command, example="qalora inspect dist/gguf/model.gguf")
@click.argument("path")
@click.option("--base", metavar="MODEL", help="The base of an adapter. Shapes and groups are compared with it.")
@click.option("--quick", is_flag=True, help="Read headers, labels and zero points only, not every value.")
@convention_option
@checkpoint_format_option
@json_flag
@log_format_option
def command(
    path: str, base: str | None, quick: bool, convention: str | None, checkpoint_format: str | None, as_json: bool
) -> None:
    """Show what a model, adapter or artefact is, and what is wrong with it, with the evidence.

    It prints layout, family, bits, groups, zero points, convention, sizes and a histogram of the scales. It warns about
    labels that contradict the values, zero points off by one, NaN, layers of zeros, act-order, what a runtime misreads,
    and adapters that PEFT or the base take differently. Exit status 0 with warnings, 2 if the file cannot be read.
    """
    from qalora.inspection import inspect

    with _Bar() as bar:
        report = inspect(
            path,
            base=base,
            convention=convention,  # type: ignore[arg-type]
            quick=quick,
            checkpoint_format=checkpoint_format,
            progress=bar.begin,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
        print_next(_following(report, base))


def _following(report: Report, base: str | None) -> tuple[object, ...]:
    """What most people do with it next."""
    from qalora.inspection import AdapterReport, FolderReport

    if isinstance(report, FolderReport):
        return ("qalora", "verify", base or "BASE", report.path, "--adapter", "ADAPTER")
    if isinstance(report, AdapterReport):
        return ("qalora", "fold", base or report.base or "BASE", report.path, "-o", "folded")
    if any(kind.bits is not None for kind in report.tensors):
        return ("qalora", "train", report.path, "--data", "text.jsonl", "-o", "adapter")
    return ("qalora", "quantize", report.path, "-o", "base")


class _Bar:
    """A progress bar for each model that is read, one behind the other."""

    def __init__(self) -> None:
        self._open: Any = None

    def begin(self, total: int) -> Any:
        self.__exit__()
        self._open = progress_bar(4 * total, "reading")
        advance = self._open.__enter__()
        return lambda name, weights: advance(name, 4 * weights)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def _print(report: Report) -> None:
    from qalora.inspection import AdapterReport, FolderReport

    if isinstance(report, FolderReport):
        for n, artifact in enumerate(report.artifacts):
            if n:
                click.echo()
            _print(artifact)
        return
    lines = _adapter(report) if isinstance(report, AdapterReport) else _model(report)
    width = max(len(key) for key in lines)
    for key, value in lines.items():
        for n, line in enumerate(value if isinstance(value, list) else [value]):
            click.echo(f"{'' if n else key:<{width}}  {line}".rstrip())
    for finding in report.warnings:
        _warn(finding)


def _warn(finding: Finding) -> None:
    click.echo(f"\nwarning: {finding.message} [{finding.code}]")
    click.echo(f"    seen: {finding.evidence}")
    if finding.todo:
        click.echo(f"    to do: {finding.todo}")


def _model(report: ModelReport) -> dict[str, Any]:
    lines: dict[str, Any] = {
        "path": report.path,
        "layout": report.layout,
        "family": f"{report.family}, {report.layers} layers",
        "weights": f"{report.weights:,}",
        "size": f"{report.nbytes:,} bytes, {report.bits_per_weight:.2f} bits per weight",
        **({} if report.device_load is None else {"a device loads": str(report.device_load)}),
        "tensors": [str(kind) for kind in report.tensors],
        "output": "tied to the embedding" if report.tied else "a layer of its own",
        "ends at": "not known" if report.ends is None else str(report.ends),
        "files": list(report.files),
        "notes": list(report.notes),
    }
    held = report.histogram
    if held is not None:
        lines["scales"] = held.lines()
        if held.negative:
            lines["negative"] = f"{held.negative:,} scales"
        if held.zero_points is not None:
            lines["zero points"] = f"{held.zero_points[0]:.4g} to {held.zero_points[1]:.4g}"
    return lines


def _adapter(report: AdapterReport) -> dict[str, Any]:
    kinds = [
        f"{count} x rank {rank}, pool size {'unknown' if pool is None else pool}"
        for (rank, pool), count in report.layers.items()
    ]
    return {
        "path": report.path,
        "layout": f"adapter, {report.layout}",
        "convention": report.convention or "unknown",
        "use_qalora": "yes" if report.use_qalora else "no",
        "minima": report.minima or "not recorded",
        "base": report.base or "not recorded",
        "layers": kinds,
        "parameters": f"{report.parameters:,}",
        "size": f"{report.nbytes:,} bytes",
        "notes": list(report.notes),
    }
