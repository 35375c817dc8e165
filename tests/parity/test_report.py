"""The report says what happened, in one sentence, in a table, and in JSON that does not change by itself."""

import io
import json
import math
from dataclasses import replace

from rich.console import Console

from qalora.parity.evidence import Evidence, Generation
from qalora.parity.gates import judge, unproven
from qalora.parity.metrics import LogitMetrics
from qalora.parity.noise import Noise
from qalora.parity.report import AdapterSummary, ArtifactReport, ParityReport, RunReport, render
from qalora.parity.runtimes import RuntimeInfo
from qalora.parity.weights import TensorDifference, WeightMetrics

LOGITS = LogitMetrics(
    tokens=8,
    max=1.23456789e-5,
    rms=1e-6,
    nmse=1e-12,
    kl_mean=0.0,
    kl_p99=0.0,
    kl_max=0.0,
    top1=1.0,
    top5=1.0,
    perplexity=math.nan,
    reference_perplexity=9.0,
)
NOISE = Noise(max=1e-5, rms=1e-6, floor=1e-6)
GENERATION = Generation(tokens=(1, 2, 3), text="a b c", divergence=None, expected=None, gap=None, max_logit=1e-5)
BAD = TensorDifference(name="model.layers.0.mlp.up_proj.weight", codes=100, codes_differ=1)
WEIGHTS = WeightMetrics(
    tensors=9, missing=(), extra=(), shapes=(), config=(), total=TensorDifference(name="all", codes=100), different=()
)


def make(weights: WeightMetrics = WEIGHTS, missing: str = "") -> ParityReport:
    run = RunReport(
        kind="onnxruntime",
        runtime=RuntimeInfo(name="onnxruntime", version="1", backend="CPU", dtype="float32", threads=2),
        rounding="none",
        logits=LOGITS,
        lost=1e-5,
        lost_unrounded=3e-3,
        generations=(GENERATION,),
        gates=tuple(judge(Evidence(logits=LOGITS, noise=NOISE, generations=(GENERATION,)))),
    )
    if missing:
        run = RunReport(kind="onnxruntime", runtime=None, rounding="none", gates=(unproven("runtime", missing),))
    artifact = ArtifactReport(
        name="onnx",
        kind="onnx",
        holds="folded",
        weights=weights,
        gates=tuple(judge(Evidence(weights=weights))),
        runs=(run,),
    )
    return ParityReport(
        reference="base",
        level="generation",
        text="tokens given",
        tokens=8,
        windows=1,
        adapter=AdapterSummary(layers=7, convention="paper", minima="float16", trained_with="float16", effect_rms=1.0),
        noise=NOISE,
        gates=(),
        artifacts=(artifact,),
    )


def shown(report: ParityReport) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160)
    for part in render(report):
        console.print(part)
    return out.getvalue()


def test_a_good_report() -> None:
    report = make()
    assert report.passed() and report.failure() == ""
    text = shown(report)
    assert "0.001 %" in text and "0.3 %" in text and "3 same" in text and "onnxruntime 1" in text
    assert "FAIL" not in text


def test_a_failed_gate_is_named_with_its_place() -> None:
    report = make(replace(WEIGHTS, total=replace(BAD, name="all"), different=(BAD,)))
    assert not report.passed(allow_unproven=True)
    assert report.failure() == "onnx: codes 1, bound 0 (model.layers.0.mlp.up_proj.weight: 1)"
    assert "FAIL  onnx: codes 1" in shown(report)


def test_a_missing_runtime_is_not_proven() -> None:
    report = make(missing="this needs onnxruntime, which is not installed; pip install onnxruntime")
    assert not report.passed()
    assert report.passed(allow_unproven=True)
    assert report.failure().startswith("onnx in onnxruntime: runtime not proven: this needs onnxruntime")
    assert "NOT PROVEN  onnx in onnxruntime" in shown(report)


def test_failures_come_before_what_is_not_proven() -> None:
    report = make(replace(WEIGHTS, total=replace(BAD, name="all"), different=(BAD,)), missing="no runtime")
    assert report.failure().endswith("(and 1 more)") and "codes" in report.failure()


def test_json_is_versioned_stable_and_strict() -> None:
    content = make().to_json()
    text = json.dumps(content, allow_nan=False)  # no NaN gets in
    assert json.dumps(make().to_json(), allow_nan=False) == text
    assert content["schema"] == "qalora.parity/1"
    assert list(content) == [
        "schema", "passed", "reference", "level", "text", "adapter", "noise", "gates", "reference_runs", "artifacts",
        "comparison", "device",
    ]  # fmt: skip
    (artifact,) = content["artifacts"]
    assert list(artifact) == ["name", "kind", "holds", "weights", "adapter_lost_by_layer", "gates", "runs"]
    (run,) = artifact["runs"]
    assert run["logits"]["max"] == 1.23457e-05
    assert run["logits"]["perplexity"] is None
    assert run["generations"][0]["tokens"] == [1, 2, 3]
    assert {gate["gate"]: gate["status"] for gate in run["gates"]} == {"logits": "pass", "greedy": "pass"}
    assert all(gate["derivation"] for gate in artifact["gates"])


def test_the_json_lists_some_of_many_tensors_and_counts_all() -> None:
    many = tuple(replace(BAD, name=f"layer {n}") for n in range(50))
    content = make(replace(WEIGHTS, total=replace(BAD, name="all", codes_differ=50), different=many)).to_json()
    weights = content["artifacts"][0]["weights"]
    assert weights["codes_differ"] == 50 and weights["differing_tensors"] == 50 and len(weights["different"]) == 20
