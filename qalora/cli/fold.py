"""qalora fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qalora.cli.closing import print_dry, print_made, print_next
from qalora.cli.options import (
    Command,
    checkpoint_format_option,
    convention_option,
    dry_run_option,
    force_option,
    json_flag,
    minima_option,
    open_model,
    options_of,
    output_option,
    print_json,
    print_plans,
    record_from,
    table_console,
)
from qalora.cli.progress import log_format_option, watch
from qalora.errors import ProofError
from qalora.options.export import Folded

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint
    from qalora.folding import FoldProof, Minima


@click.command("fold", cls=Command, example="qalora fold base adapter -o folded")
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@output_option("The folder to write.")
@minima_option
@convention_option
@options_of(Folded)
@checkpoint_format_option
@force_option
@dry_run_option
@json_flag
@log_format_option
def command(
    model: str,
    adapter: Path,
    out: Path,
    minima: Minima | None,
    convention: Any,
    checkpoint_format: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fold ADAPTER into the minima of MODEL and write a qalora folder. No integer code changes.

    The folder is then read back and each layer is checked: no code has changed, and each minimum is the nearest value
    to min + factor * B @ A. Whole tensors in ADAPTER, such as embeddings, replace those of MODEL.
    """
    size = record_from(Folded, settings).max_shard_size

    from qalora.adapter import carry, open_adapter, read_adapter
    from qalora.converters import native
    from qalora.folding import fold
    from qalora.formats.output import check_apart, check_output
    from qalora.pipeline.making import save

    check_apart(out, model, adapter)
    check_output(out, force=force, names=["config.json"])
    open_adapter(adapter)  # what is wrong with it is to be known before a model is fetched
    base = open_model(model, checkpoint_format)
    check_apart(out, base.path)
    read = read_adapter(adapter, base, convention=convention)
    rounded: Minima = minima or read.minima or "float16"
    folded = fold(base, read, minima=rounded)
    plan = save(folded, out, max_shard_size=size, force=force, dry_run=dry_run, watch=watch())
    proofs = {} if dry_run else _prove(base, read, native.read(out), rounded)
    saved = () if read.saved is None else read.saved.names
    if as_json:
        print_json({"plan": plan.to_json(), "minima": rounded, "layers": _rows(read, proofs), "saved": list(saved)})
    elif dry_run:
        print_plans([plan], details=True)
    else:
        _print(read, proofs, rounded)
    wrong = [module for module, proof in proofs.items() if not proof.exact]
    wrong += [] if dry_run else _differing(carry(base, read), native.read(out), saved)
    if wrong:
        raise ProofError(f"{out} is not the folded model: {len(wrong)} tensors differ, the first is {wrong[0]}")
    if not as_json:
        _close(out, dry_run=dry_run)


def _close(out: Path, *, dry_run: bool) -> None:
    if dry_run:
        print_dry()
        return
    print_made(out)
    print_next(("qalora", "export", out, "--to", "gguf", "-o", "dist"))


def _differing(expected: Checkpoint, folded: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those of the tensors that the adapter brings whole which are not what was written."""
    import torch

    def same(name: str) -> bool:
        mine, theirs = folded.tensors.get(name), expected.tensors[name]
        return mine is not None and all(
            torch.equal(tile, mine.rows(row, row + tile.shape[0]))  # type: ignore[arg-type]
            for row, tile in theirs.float_tiles()
        )

    return [name for name in names if name in expected.tensors and not same(name)]


def _prove(base: Checkpoint, adapter: Adapter, folded: Checkpoint, minima: Minima) -> dict[str, FoldProof]:
    from qalora.folding import prove_fold

    return {
        module: prove_fold(
            base.tensors[f"{module}.weight"].load_quantized(),
            layer,
            folded.tensors[f"{module}.weight"].load_quantized(),
            minima,
        )
        for module, layer in adapter.layers.items()
    }


def _rows(adapter: Adapter, proofs: Mapping[str, FoldProof]) -> dict[str, Any]:
    return {
        module: {
            "rank": layer.rank,
            "pool_size": layer.pool_size,
            "factor": layer.factor,
            **({**asdict(proofs[module]), "exact": proofs[module].exact} if module in proofs else {}),
        }
        for module, layer in adapter.layers.items()
    }


def _print(adapter: Adapter, proofs: Mapping[str, FoldProof], minima: Minima) -> None:
    """A row for each kind of layer, such as q_proj; --json has each layer."""
    from rich.table import Table

    console = table_console()
    table = Table(title=f"Read back against min + factor * B @ A, minima in {minima}", title_justify="left")
    for column in ("layers", "rank", "pool", "codes changed", "minima", "max ULP", "beyond 0.5"):
        table.add_column(column, justify="right" if column != "layers" else "left")
    kinds: dict[tuple[str, int, int], list[FoldProof]] = {}
    for module, layer in adapter.layers.items():
        kinds.setdefault((module.rpartition(".")[2], layer.rank, layer.pool_size), []).append(proofs[module])
    for (kind, rank, pool_size), group in kinds.items():
        table.add_row(
            f"{len(group)} x {kind}",
            str(rank),
            str(pool_size),
            str(sum(proof.codes_differ for proof in group)),
            f"{sum(proof.groups for proof in group):,}",
            f"{max(proof.max_ulp for proof in group):.4f}",
            str(sum(proof.beyond for proof in group)),
        )
    console.print(table)
    if adapter.saved is not None:
        console.print(f"  replaced by the adapter's: {', '.join(adapter.saved.names)}", markup=False)
    if adapter.minima not in (None, minima):
        console.print(f"  note: the adapter was trained with {adapter.minima} minima")
