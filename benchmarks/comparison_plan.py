"""Which cells `compare_training.py` makes, and in what order: decided by those that are there.

float
base-BASE                               BASE is bits (gptq), or rtn-bits
qalora-BASE-RATE-SEED, qlora-..., peqa-...
requantized-BASE-SEED, exported-BASE-SEED   of the best rate of QLoRA, of QA-LoRA
VARIANT-BASE-SEED                       QA-LoRA at its best rate with one thing changed, see VARIANTS
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

RATES = tuple(f"0.{'0' * zeros}{digit}" for zeros in (4, 3, 2, 1, 0) for digit in (1, 2, 3, 5))
"""Every rate there is, from 0.00001 to 0.5."""

START = {"qalora": "0.003", "qlora": "0.005", "peqa": "0.0003"}
"""Where the search of each method's rate begins."""

NEIGHBOURS = 1
"""A rate is the best when so many on either side are worse."""

FIRST = ("qalora", "qlora")
"""What is run at every width, before the others, with what is made of it. The others are run where variants are."""

SEEDS = (0, 1, 2)
BITS = (3, 2, 4)
"""In the order of work."""

VARIANTS = {
    "uniform": "LoRA's start in place of the gradient's",
    "auto": "`--rank auto` with the same number of parameters",
    "plus": "LoRA+: B's rate 4 times A's (`--alpha` 4 times the rank, a quarter of the rate)",
    "mean": "mean pooling at sum pooling's rate (`--alpha` of rank/group)",
    "fitted": "on minima fitted to the calibration's inputs (`quantize --fit-minima`)",
    "decay": "weight decay of 0.9",
}
"""What is changed in QA-LoRA, and trained again at the best rate: with seed 0, and with the others where that is better
on the validation windows.
"""

VARIED = 3
"""The width at which variants are trained, and what is not among FIRST."""

MADE_OF = {"requantized": "qlora", "exported": "qalora"}
"""Cells that are made of a trained one's adapter, of its best rate."""

DERIVED = {**MADE_OF, **dict.fromkeys(VARIANTS, "qalora")}
"""Those, and the variants, which are trained at the best rate."""

NAME = re.compile(
    r"float|base-(?P<base>(?:rtn-)?[2-8])"
    r"|(?P<kind>qalora|qlora|peqa)-(?P<on>(?:rtn-)?[2-8])-(?P<rate>0\.\d+)-(?P<seed>\d+)"
    rf"|(?P<derived>{'|'.join(DERIVED)})-(?P<of>(?:rtn-)?[2-8])-(?P<its_seed>\d+)"
)

Done = Mapping[str, Mapping[str, Any]]
"""The cells that are there, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A name, taken apart; base, rate and seed are empty where the kind has none."""

    name: str
    kind: str
    base: str = ""
    rate: str = ""
    seed: int = 0

    @property
    def bits(self) -> int:
        """The base's width; 0 for the float model."""
        return int(self.base.rpartition("-")[2] or 0)


def parse(name: str) -> Cell | None:
    """A cell's name taken apart; None for what is none."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    found = match.groupdict()
    if found["kind"]:
        return Cell(name=name, kind=found["kind"], base=found["on"], rate=found["rate"], seed=int(found["seed"]))
    if found["derived"]:
        return Cell(name=name, kind=found["derived"], base=found["of"], seed=int(found["its_seed"]))
    return Cell(name=name, kind="base" if found["base"] else "float", base=found["base"] or "")


def base_name(bits: int, method: str) -> str:
    """The name of a base; `gptq` is left out."""
    return f"{bits}" if method == "gptq" else f"{method}-{bits}"


def trained_name(kind: str, base: str, rate: str, seed: int) -> str:
    """The name of a training."""
    return f"{kind}-{base}-{rate}-{seed}"


def worth(cell: Mapping[str, Any]) -> float:
    """A training's perplexity on the validation windows, which rates are chosen by; infinite where it failed."""
    return math.inf if cell["perplexity"] is None else float(cell["validation"])


def search(done: Done, kind: str, base: str) -> tuple[list[str], str | None]:
    """(rates that seed 0 is still to be run at, the best rate once there are none): downhill from the start, until the
    neighbours are worse.
    """
    tried = tried_rates(done, kind, base)
    if START[kind] not in tried:
        return [START[kind]], None
    best = min(tried, key=lambda rate: worth(tried[rate]))
    at = RATES.index(best)
    missing = [rate for rate in RATES[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1] if rate not in tried]
    return missing, None if missing else best


def tried_rates(done: Done, kind: str, base: str) -> dict[str, Mapping[str, Any]]:
    """The cells of seed 0 by rate, rising."""
    names = {rate: trained_name(kind, base, rate, 0) for rate in RATES}
    return {rate: done[name] for rate, name in names.items() if name in done}


def source(done: Done, cell: Cell) -> str | None:
    """The trained cell that a derived one is made of, if it is there."""
    best = search(done, DERIVED[cell.kind], cell.base)[1]
    name = trained_name(DERIVED[cell.kind], cell.base, best or "", cell.seed)
    return name if best is not None and name in done and done[name]["perplexity"] is not None else None


def stale(done: Done, name: str) -> bool:
    """Whether a cell was made of another training than is the best by now."""
    cell = parse(name)
    return cell is not None and cell.kind in DERIVED and done[name].get("source") != source(done, cell)


def ready(done: Done, cell: Cell) -> bool:
    """Whether what a cell is made of is there."""
    if cell.kind in ("float", "base"):
        return True
    return f"base-{cell.base}" in done and (cell.kind not in DERIVED or source(done, cell) is not None)


def wanted(done: Done, method: str = "gptq") -> list[str]:
    """The cells that are missing, as far as they are known by now, in the order of work."""
    bases = [base_name(bits, method) for bits in BITS]
    varied = [base for base in bases if base.endswith(str(VARIED))]
    names = ["float", *(f"base-{base}" for base in bases)]
    names += trained_names(done, FIRST, bases) + derived_names(done, MADE_OF, bases)
    names += variant_names(done, varied)
    names += trained_names(done, [kind for kind in START if kind not in FIRST], varied)
    return [name for name in names if name not in done or stale(done, name)]


def trained_names(done: Done, kinds: Iterable[str], bases: list[str]) -> list[str]:
    """What the searches of rates are still to run, and then the other seeds of the best ones."""
    pairs = [(kind, base) for base in bases for kind in kinds]
    names = [trained_name(kind, base, rate, 0) for kind, base in pairs for rate in search(done, kind, base)[0]]
    for kind, base in pairs:
        best = search(done, kind, base)[1]
        if best is not None and worth(done[trained_name(kind, base, best, 0)]) < math.inf:
            names += [trained_name(kind, base, best, seed) for seed in SEEDS[1:]]
    return names


def variant_names(done: Done, bases: list[str]) -> list[str]:
    """Seed 0 of every variant; the other seeds of those that do better with it than what they vary."""
    names = derived_names(done, VARIANTS, bases, SEEDS[:1])
    for first in [name for name in names if name in done and not stale(done, name)]:
        cell, of = parse(first), done[done[first]["source"]]
        if cell is not None and worth(done[first]) < worth(of):
            names += derived_names(done, [cell.kind], [cell.base], SEEDS[1:])
    return names


def derived_names(done: Done, kinds: Iterable[str], bases: list[str], seeds: tuple[int, ...] = SEEDS) -> list[str]:
    """The cells of these kinds that have what they are made of."""
    cells = [parse(f"{kind}-{base}-{seed}") for kind in kinds for base in bases for seed in seeds]
    return [cell.name for cell in cells if cell is not None and source(done, cell) is not None]
