"""The gates: a table of what an artefact must fulfil, each bound with its derivation.

A gate looks at `Evidence` about one run of one artefact and gives a value, a bound and a status. Metrics are computed
in `metrics` and `weights` and know no tolerance; every tolerance is here, and float32's own noise in `noise`. Bounds on
logits are derived from two measurements on the very model and text: float32's own noise (the reference summed in
another order), and the reference under the same rounding as the runtime's kernels (`roundings.Rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qalora.parity.evidence import Evidence, Generation
from qalora.parity.metrics import LogitMetrics
from qalora.parity.weights import TensorDifference

__all__ = ["GATES", "Gate", "GateResult", "Status", "judge", "refused", "unproven"]

Status = Literal["pass", "fail", "ambiguous", "not proven"]
STATUSES: tuple[Status, ...] = ("pass", "ambiguous", "not proven", "fail")
"""From the best to the worst."""

ROUNDING_FACTOR = 2.0
TOP1 = 0.98
NEARLY_ALL = 0.9
"""Of the minima that differ, or of all: so many are off by one zero point, and it is named."""

NAMED = 3
"""Tensors or keys that a detail names; it counts the rest."""


Measure = Callable[[Evidence], tuple[float, float, str] | None]
"""What a gate looks at: (value, bound, detail), or None where the evidence does not concern it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What a gate found: `value` must not be above `bound` (below it, for top-1); `detail` names the place."""

    gate: str
    status: Status
    value: float | None
    bound: float | None
    detail: str
    derivation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One row of the table.

    measure     gives (value, bound, detail), or None where the gate does not concern the evidence
    derivation  why the bound is what it is
    at_least    the value must reach the bound instead of staying below it
    """

    name: str
    measure: Measure
    derivation: str
    at_least: bool = False


def judge(evidence: Evidence) -> list[GateResult]:
    """Apply every gate that concerns the evidence, in the table's order."""
    results = []
    for gate in GATES:
        measured = gate.measure(evidence)
        if measured is not None:
            value, bound, detail = measured
            results.append(
                GateResult(
                    gate=gate.name,
                    status=_status(gate, evidence, value, bound),
                    value=value,
                    bound=bound,
                    detail=detail,
                    derivation=gate.derivation,
                )
            )
    return results


def worst(results: Iterable[GateResult]) -> Status:
    """The status that decides about several gates: "pass" only where all of them passed."""
    statuses = {result.status for result in results}
    return next((status for status in reversed(STATUSES) if status in statuses), "pass")


def unproven(gate: str, reason: str) -> GateResult:
    """A gate that could not be applied: never passed."""
    derivation = "what was not run is not proven"
    return GateResult(gate=gate, status="not proven", value=None, bound=None, detail=reason, derivation=derivation)


def refused(gate: str, reason: str) -> GateResult:
    """A gate that failed because the artefact could not be run at all."""
    return GateResult(gate=gate, status="fail", value=None, bound=None, detail=reason, derivation="a runtime takes it")


def _status(gate: Gate, evidence: Evidence, value: float, bound: float) -> Status:
    good = value >= bound if gate.at_least else value <= bound
    if gate.name == "greedy" and not good:
        return "ambiguous" if all(map(_near_tie, evidence.generations)) else "fail"
    if gate.name == "tokenizer" and not good:
        return "fail" if evidence.tokenizer is None or evidence.tokenizer.wrong else "ambiguous"
    if (gate.name == "adapter" and good and bound > 0.5) or (gate.name == "steps" and not good):
        return "ambiguous"
    if gate.name == "end" and not good and evidence.ends is not None and not evidence.ends.faulty:
        return "ambiguous"
    return "pass" if good else "fail"


def _near_tie(generation: Generation) -> bool:
    """Whether a continuation is the reference's, or leaves it where two logits are as good as equal."""
    return generation.divergence is None or (generation.gap is not None and generation.gap <= 2 * generation.max_logit)


def _count(
    pick: Callable[[TensorDifference], int],
    place: Callable[[TensorDifference], str] = lambda difference: "",
    cause: Callable[[TensorDifference], str] = lambda total: "",
) -> Measure:
    """Counts of tensors: `place` tells where in one, `cause` what all of them together look like."""

    def measure(evidence: Evidence) -> tuple[float, float, str] | None:
        weights = evidence.weights
        if weights is None:
            return None
        where = [
            f"{difference.name}: {pick(difference):,}{place(difference)}"
            for difference in weights.different
            if pick(difference)
        ]
        detail = "; ".join(part for part in (cause(weights.total), _list_names(where)) if part)
        return float(pick(weights.total)), 0.0, detail

    return measure


def _first_code(difference: TensorDifference) -> str:
    return (
        "" if difference.code_at is None else f", first at row {difference.code_at[0]}, column {difference.code_at[1]}"
    )


def _moved(difference: TensorDifference) -> str:
    return " (it is transposed)" if difference.transposed else ""


def _zeros(total: TensorDifference) -> str:
    """Zero points off by one, where nearly all of the differing minima are; and why, where nearly all minima are."""
    for count, size, read in (
        (total.zeros_above, "large", "gptq_v2 checkpoint read as gptq"),
        (total.zeros_below, "small", "gptq checkpoint read as gptq_v2"),
    ):
        if count and count >= NEARLY_ALL * total.min_beyond:
            why = f", as in a {read}" if count >= NEARLY_ALL * total.groups else ""
            return f"zero points are one too {size} in {count:,} of {total.groups:,} groups{why}"
    return ""


def _steps(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.weights is None or not evidence.weights.total.requantized:
        return None
    total = evidence.weights.total
    where = [
        f"{difference.name}: {difference.step_max:.3g}"
        for difference in evidence.weights.different
        if difference.step_beyond
    ]
    detail = f"at most {total.step_max:.3g} steps off, RMS {total.step_rms:.3g}"
    return float(total.step_beyond), 0.0, "; ".join(part for part in (detail, _list_names(where)) if part)


def _tokenizer(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.tokenizer is None:
        return None
    findings = (*evidence.tokenizer.wrong, *evidence.tokenizer.limits)
    return float(len(findings)), 0.0, _list_names(findings)


def _end(evidence: Evidence) -> tuple[float, float, str] | None:
    differences = evidence.ends
    if differences is None:
        return None
    return float(len(differences.missing) + len(differences.extra) + len(differences.own)), 0.0, str(differences)


def _list_names(where: Sequence[str]) -> str:
    more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
    return ", ".join(where[:NAMED]) + more


def _tensors(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.weights is None:
        return None
    weights = evidence.weights
    problems = [f"missing {name}" for name in weights.missing] + [f"extra {name}" for name in weights.extra]
    problems += weights.shapes
    return float(len(problems)), 0.0, _list_names(problems)


def _config(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.weights is None:
        return None
    return float(len(evidence.weights.config)), 0.0, _list_names(evidence.weights.config)


def _fold(evidence: Evidence) -> tuple[float, float, str] | None:
    fold = evidence.fold
    if fold is None:
        return None
    return float(fold.codes_differ + fold.min_beyond), 0.0, fold.first


def _beside(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.beside is None:
        return None
    return float(len(evidence.beside)), 0.0, _list_names(evidence.beside)


def _exact_logits(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.logits is None or evidence.noise is None or evidence.rounding.kind != "none":
        return None
    return evidence.logits.max, evidence.noise.bound, ""


def _kernel_rounding(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.modelled is None or evidence.noise is None or evidence.rounding.kind != "weights":
        return None
    return evidence.modelled.max, evidence.noise.bound, ""


def _activation_rounding(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.logits is None or not _rounds_activations(evidence):
        return None
    return evidence.logits.rms, _allowed_rms(evidence), ""


def _top1(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.logits is None or evidence.simulated is None or not _rounds_activations(evidence):
        return None
    tokens = evidence.logits.tokens
    expected = ROUNDING_FACTOR * (1 - evidence.simulated.top1) * tokens
    return evidence.logits.top1, min(TOP1, 1 - (expected + 3 * math.sqrt(expected)) / tokens), ""


def _cache(evidence: Evidence) -> tuple[float, float, str] | None:
    return _other_way(evidence, evidence.stepwise)


def _batch(evidence: Evidence) -> tuple[float, float, str] | None:
    return _other_way(evidence, evidence.batch)


def _other_way(evidence: Evidence, metrics: LogitMetrics | None) -> tuple[float, float, str] | None:
    """The RMS where kernels round, as an input may then be rounded the other way; else the largest difference."""
    if metrics is None or evidence.noise is None:
        return None
    if evidence.rounding.kind in ("none", "weights"):
        return metrics.max, 2 * evidence.noise.bound, ""
    return metrics.rms, _allowed_rms(evidence), "RMS"


def _rounds_activations(evidence: Evidence) -> bool:
    return evidence.rounding.kind not in ("none", "weights")


def _allowed_rms(evidence: Evidence) -> float:
    """The RMS error that the runtime may have against the reference."""
    noise = 0.0 if evidence.noise is None else evidence.noise.rms_bound
    if evidence.rounding.kind == "none" or evidence.simulated is None:
        return noise
    factor = 1.0 if evidence.rounding.kind == "weights" else ROUNDING_FACTOR
    return factor * evidence.simulated.rms + noise


def _adapter(evidence: Evidence) -> tuple[float, float, str] | None:
    if evidence.lost is None or evidence.effect_rms == 0:
        return None
    bound = evidence.fold_lost + _allowed_rms(evidence) / evidence.effect_rms
    detail = "the runtime's own rounding is half of the adapter's effect or more" if bound > 0.5 else ""
    return evidence.lost, bound, detail


def _greedy(evidence: Evidence) -> tuple[float, float, str] | None:
    generations = evidence.generations
    if not generations:
        return None
    other = [(n, generation) for n, generation in enumerate(generations, 1) if generation.divergence is not None]
    if not other:
        return 0.0, 0.0, f"{sum(len(generation.tokens) for generation in generations)} tokens"
    which, first = next((pair for pair in other if not _near_tie(pair[1])), other[0])
    at, gap = first.divergence or 0, math.inf if first.gap is None else first.gap
    detail = (
        f"token {at} is {first.tokens[at]} instead of {first.expected}; the reference's logits of the two are "
        f"{gap:.3g} apart"
    )
    return float(len(other)), 0.0, f"prompt {which}: {detail}" if len(generations) > 1 else detail


GATES: tuple[Gate, ...] = (
    Gate(
        name="fold",
        measure=_fold,
        derivation="the fold leaves every code, and rounds min + factor * B @ A once: half an ULP, and a float32 "
        "sum's own rounding",
    ),
    Gate(name="tensors", measure=_tensors, derivation="the same tensors in the same shapes"),
    Gate(name="config", measure=_config, derivation="what changes the logits (rope, eps, heads, sizes) is equal"),
    Gate(
        name="rows",
        measure=_count(lambda difference: difference.rows_moved + difference.transposed, _moved),
        derivation="rows are where they belong, whatever order a format keeps those of q and k in, and are rows",
    ),
    Gate(
        name="codes",
        measure=_count(lambda difference: difference.codes_differ, _first_code),
        derivation="codes are copied, never computed: 0 differ",
    ),
    Gate(
        name="scale",
        measure=_count(lambda difference: difference.scale_differ),
        derivation="scales are copied in a type that holds them, or the writer refuses: 0 ULP",
    ),
    Gate(
        name="minima",
        measure=_count(lambda difference: difference.min_beyond, cause=_zeros),
        derivation="float16 minima are held exactly, as they are or as an integer zero and a residual: 0 ULP; float32 "
        "ones behind a residual are rounded twice: 2^-23 (|min| + |scale| 2^bits)",
    ),
    Gate(
        name="floats",
        measure=_count(lambda difference: difference.values_beyond),
        derivation="float tensors keep their bits or are widened exactly; a narrower dtype rounds them once, by half "
        "an ULP; integers held as floats, or floats in integers, are off by float32's rounding, 2^-23 (|scale| codes + "
        "|min|)",
    ),
    Gate(
        name="steps",
        measure=_steps,
        derivation="a float model in integers: the nearest code is at most half a step away, and float16 scales and "
        "minima add 2^-11 (2^bits - 1 + |min/scale|); methods that weigh errors (GPTQ) or clip go further on purpose: "
        "ambiguous",
    ),
    Gate(
        name="tokenizer",
        measure=_tokenizer,
        derivation="the same ids for the same tokens, and the same tokens of a passage, of chats as the chat template "
        "writes them and of each added token in a text, at a text's ends, and the same chat templates; where a "
        "runtime's own tokenizer has another rule that no file can change (spaces in llama.cpp, plain text in "
        "onnxruntime-genai): ambiguous, but for chats",
    ),
    Gate(
        name="end",
        measure=_end,
        derivation="generation ends at the same tokens, by id; what a runtime adds by a rule of its own, which no file "
        "can switch off, is ambiguous",
    ),
    Gate(
        name="adapter beside",
        measure=_beside,
        derivation="an unfolded adapter is the same, layer by layer: B bit for bit, factor * A within 2^-23",
    ),
    Gate(
        name="logits",
        measure=_exact_logits,
        derivation="a float32 runtime differs by the order of summation: 4 times the largest difference that summing "
        "the linear layers in another order makes (attention and norms have their own orders), at least 8 * 2^-24 of "
        "the largest logit; more where the runtime adds one term after the other (MLX on a CPU), by as much as that "
        "changes products of random numbers",
    ),
    Gate(
        name="kernel rounding",
        measure=_kernel_rounding,
        derivation="scale * (codes - zero) is rounded to float16 in the kernel, which the reference repeats bit for "
        "bit; what is left is the order of summation: bound as for `logits`",
    ),
    Gate(
        name="activation rounding",
        measure=_activation_rounding,
        derivation="the kernel rounds its inputs; the reference with the same rounding shows its size on this text: 2 "
        "times its RMS, since where a value falls near a step the two round apart, and attention is rounded too",
    ),
    Gate(
        name="top-1",
        measure=_top1,
        derivation="0.98; or twice as many tokens change as the same rounding of inputs changes in the reference, and "
        "three standard deviations more, sqrt(count) each, as other tokens are near a tie in each rounding",
        at_least=True,
    ),
    Gate(
        name="cache",
        measure=_cache,
        derivation="one token at a time through the cache is the same sums in another order, and so is the whole text "
        "at once: each as far from the reference as `logits` allows, so from each other by at most twice that; or, "
        "where the kernel rounds its inputs, as for `activation rounding`",
    ),
    Gate(
        name="batch",
        measure=_batch,
        derivation="sequences of several lengths in one batch, padded where the runtime pads, are the same sums in "
        "another order: bound as for `cache`",
    ),
    Gate(
        name="adapter",
        measure=_adapter,
        derivation="|y - adapted| <= |y - reference| + |reference - adapted|, each over |adapted - base|: the RMS that "
        "the runtime is allowed, and what rounding the minima costs (0 if trained with it)",
    ),
    Gate(
        name="greedy",
        measure=_greedy,
        derivation="the same greedy tokens; a logit is off by at most the measured maximum, so a gap of at most twice "
        "that is a near tie: ambiguous",
    ),
)
"""The table. A gate of another kind, or another format's, joins it with one entry."""
