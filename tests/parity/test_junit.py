"""JUnit XML: parsed by a parser, counted as the report counts."""

from dataclasses import replace
from xml.etree.ElementTree import fromstring

from qalora.parity.gates import unproven
from qalora.parity.junit import to_junit
from qalora.parity.report import ParityReport, RunReport
from qalora.parity.verify import verify


def counts(report: ParityReport) -> tuple[int, int, int]:
    root = fromstring(to_junit(report))
    cases = root.findall("./testsuite/testcase")
    assert len(cases) == int(root.attrib["tests"]) == sum(int(suite.attrib["tests"]) for suite in root)
    failures, errors = root.findall(".//failure"), root.findall(".//error")
    assert (len(failures), len(errors)) == (int(root.attrib["failures"]), int(root.attrib["errors"]))
    assert all(case.attrib["message"] for case in (*failures, *errors))
    return len(cases), len(failures), len(errors)


def test_every_gate_is_a_case(base, adapter, made) -> None:
    good = verify(base, [made("onnx", "folded")], adapter=adapter, level="weights")
    assert counts(good) == (len(list(good.results())), 0, 0)
    bad = verify(base, [made("onnx", "base")], adapter=adapter, level="weights")
    _, failures, _ = counts(bad)
    assert failures == sum(result.status == "fail" for _, result in bad.results()) > 0
    run = RunReport(kind="x", runtime=None, rounding="none", gates=(unproven("runtime", "not \x00 there"),))
    artifact = replace(good.artifacts[0], runs=(run,))
    assert counts(replace(good, artifacts=(artifact,)))[2] == 1
