"""Each gate passes what its derivation allows and nothing beyond it."""

import math
from dataclasses import replace

import pytest

from qalora.parity.evidence import Evidence, Generation
from qalora.parity.foldcheck import FoldCheck
from qalora.parity.gates import GATES, judge, unproven
from qalora.parity.metrics import LogitMetrics
from qalora.parity.noise import Noise
from qalora.parity.roundings import Rounding
from qalora.parity.weights import TensorDifference, WeightMetrics

SAME = LogitMetrics(
    tokens=100,
    max=0.0,
    rms=0.0,
    nmse=0.0,
    kl_mean=0.0,
    kl_p99=0.0,
    kl_max=0.0,
    top1=1.0,
    top5=1.0,
    perplexity=9.0,
    reference_perplexity=9.0,
)
NOISE = Noise(max=1e-4, rms=1e-5, floor=1e-6)
WEIGHTS = WeightMetrics(
    tensors=1, missing=(), extra=(), shapes=(), config=(), total=TensorDifference(name="all"), different=()
)
Q8 = Evidence(rounding=Rounding(kind="q8"), logits=SAME, simulated=replace(SAME, rms=0.1, top1=0.995), noise=NOISE)


def status(evidence: Evidence, gate: str) -> str:
    return next(result.status for result in judge(evidence) if result.gate == gate)


def test_every_gate_has_a_name_of_its_own_and_a_derivation() -> None:
    assert len({gate.name for gate in GATES}) == len(GATES)
    assert all(len(gate.derivation) > 20 for gate in GATES)


def test_no_evidence_no_gate() -> None:
    assert judge(Evidence()) == []


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        ("rows", "rows_moved"),
        ("codes", "codes_differ"),
        ("scale", "scale_differ"),
        ("minima", "min_beyond"),
        ("rows", "transposed"),
        ("floats", "values_beyond"),
    ],
)
def test_one_weight_fails_its_gate_alone(gate: str, field: str) -> None:
    bad = TensorDifference(name="model.norm.weight", **{field: 1})
    found = judge(Evidence(weights=replace(WEIGHTS, total=bad, different=(bad,))))
    assert {result.gate for result in found if result.status == "fail"} == {gate}
    assert "model.norm.weight: 1" in next(result.detail for result in found if result.status == "fail")


@pytest.mark.parametrize(("gate", "field"), [("tensors", "missing"), ("tensors", "extra"), ("config", "config")])
def test_names_that_differ_are_named(gate: str, field: str) -> None:
    found = judge(Evidence(weights=replace(WEIGHTS, **{field: ("a", "b", "c", "d")})))
    (bad,) = [result for result in found if result.status == "fail"]
    assert bad.gate == gate and bad.value == 4 and bad.detail.endswith("c and 1 more")


def test_exact_logits_may_differ_by_float32s_noise() -> None:
    right = Evidence(logits=replace(SAME, max=NOISE.bound), noise=NOISE)
    assert status(right, "logits") == "pass"
    assert status(replace(right, logits=replace(SAME, max=1.01 * NOISE.bound)), "logits") == "fail"
    assert status(replace(right, logits=replace(SAME, max=math.inf)), "logits") == "fail"
    assert Noise(max=0.0, rms=0.0, floor=1e-6).bound == 1e-6


def test_kernel_rounding_is_held_to_the_same_noise() -> None:
    right = Evidence(
        rounding=Rounding(kind="weights"), logits=replace(SAME, max=0.05), modelled=SAME, simulated=SAME, noise=NOISE
    )
    assert status(right, "kernel rounding") == "pass"
    assert status(replace(right, modelled=replace(SAME, max=0.05)), "kernel rounding") == "fail"


@pytest.mark.parametrize(("rms", "expected"), [(0.2, "pass"), (0.21, "fail"), (math.nan, "fail")])
def test_rounded_activations_may_do_what_the_simulation_does_twice(rms: float, expected: str) -> None:
    assert status(replace(Q8, logits=replace(SAME, rms=rms)), "activation rounding") == expected


@pytest.mark.parametrize(
    ("top1", "simulated", "expected"),
    [(0.98, 1.0, "pass"), (0.97, 1.0, "fail"), (0.9, 0.98, "pass"), (0.89, 0.98, "fail")],
)
def test_top1(top1: float, simulated: float, expected: str) -> None:
    evidence = replace(Q8, logits=replace(SAME, top1=top1), simulated=replace(SAME, top1=simulated))
    assert status(evidence, "top-1") == expected


def test_of_the_adapter_only_what_the_runtime_may_lose_is_lost() -> None:
    exact = Evidence(logits=SAME, noise=NOISE, lost=4e-5, effect_rms=1.0)  # 4 * 1e-5 / 1
    assert status(exact, "adapter") == "pass"
    assert status(replace(exact, lost=4.1e-5), "adapter") == "fail"
    assert status(replace(exact, lost=3e-3, fold_lost=3e-3), "adapter") == "pass"
    assert status(replace(Q8, lost=0.2, effect_rms=1.0), "adapter") == "pass"
    assert status(replace(Q8, lost=0.21, effect_rms=1.0), "adapter") == "fail"
    assert status(replace(Q8, lost=0.9, effect_rms=0.2), "adapter") == "ambiguous"  # the rounding is as large as it


def test_greedy_tokens_may_part_at_a_near_tie() -> None:
    same = Generation(tokens=(1, 2), text=None, divergence=None, expected=None, gap=None, max_logit=0.1)
    assert status(Evidence(generations=(same,)), "greedy") == "pass"
    parted = replace(same, divergence=1, expected=7, gap=0.2)
    assert status(Evidence(generations=(same, parted)), "greedy") == "ambiguous"
    wrong = replace(parted, gap=0.21)
    (found,) = judge(Evidence(generations=(parted, wrong, same)))
    assert (found.status, found.value) == ("fail", 2)
    assert found.detail.startswith("prompt 2: token 1 is 2 instead of 7")


@pytest.mark.parametrize("field", ["stepwise", "batch"])
def test_another_order_of_the_same_sums_is_float32_noise(field: str) -> None:
    gate = {"stepwise": "cache", "batch": "batch"}[field]
    bound = 8e-4  # 4 times NOISE.max from the reference, each
    assert status(Evidence(noise=NOISE, **{field: replace(SAME, max=bound)}), gate) == "pass"
    assert status(Evidence(noise=NOISE, **{field: replace(SAME, max=bound * 1.01)}), gate) == "fail"
    assert status(replace(Q8, **{field: replace(SAME, rms=0.2, max=9.0)}), gate) == "pass"
    assert status(replace(Q8, **{field: replace(SAME, rms=0.21)}), gate) == "fail"


def test_the_fold_and_an_adapter_beside() -> None:
    right = FoldCheck(layers=1, groups=4, codes_differ=0, min_beyond=0, first="")
    assert status(Evidence(fold=right), "fold") == "pass"
    assert status(Evidence(fold=replace(right, min_beyond=1, first="layer")), "fold") == "fail"
    assert status(Evidence(beside=()), "adapter beside") == "pass"
    assert status(Evidence(beside=("layer",)), "adapter beside") == "fail"


def test_what_was_not_run_is_not_proven() -> None:
    assert unproven("runtime", "llama.cpp needs xllamacpp").status == "not proven"


def test_a_quantization_beyond_half_a_step_is_ambiguous_and_no_failure() -> None:
    near = TensorDifference(name="model.norm.weight", values=8, values_differ=8, requantized=8, step_max=0.5)
    far = replace(near, step_max=0.9, step_beyond=3)
    for found, expected in ((near, "pass"), (far, "ambiguous")):
        evidence = Evidence(weights=replace(WEIGHTS, total=found, different=(found,)))
        assert status(evidence, "steps") == expected
        assert {result.gate for result in judge(evidence) if result.status == "fail"} == set()
    assert "steps" not in {result.gate for result in judge(Evidence(weights=WEIGHTS))}


@pytest.mark.parametrize(
    ("field", "count", "words"),
    [
        ("zeros_above", 100, "one too large in 100 of 100 groups, as in a gptq_v2 checkpoint read as gptq"),
        ("zeros_below", 95, "one too small in 95 of 100 groups, as in a gptq checkpoint read as gptq_v2"),
        ("zeros_below", 6, "one too small in 6 of 100 groups; "),
    ],
)
def test_zero_points_off_by_one_are_named_and_their_cause_where_it_is_plain(field: str, count: int, words: str) -> None:
    bad = TensorDifference(name="w", groups=100, min_differ=count, min_beyond=count, **{field: count})
    found = judge(Evidence(weights=replace(WEIGHTS, total=bad, different=(bad,))))
    (result,) = [result for result in found if result.status == "fail"]
    assert result.gate == "minima" and words in result.detail and f"w: {count}" in result.detail
    other = replace(bad, min_beyond=3 * count)
    found = judge(Evidence(weights=replace(WEIGHTS, total=other, different=(other,))))
    assert all("zero points" not in result.detail for result in found)
