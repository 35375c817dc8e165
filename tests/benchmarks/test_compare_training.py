"""benchmarks/compare_training.py: what is run next, tables of given cells, and every kind of cell on a tiny model."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qalora.converters import load
from qalora.demo import demo_text
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BETTER = ("plus", "fitted")
"""Variants that do better than what they vary, in the cells below."""
PAGE = "Before\n\n<!-- table:begin -->\nold\n<!-- table:end -->\n\nafter\n"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of benchmarks/ by name, as a script there imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def answer(name: str, worth: Callable[[str, str], float | None]) -> dict[str, Any]:
    """A cell as if it had been run; worth: of a training's kind and rate."""
    kind, *rest = name.split("-")
    if kind not in ("qalora", "qlora", "peqa"):
        validation = 12.0 if kind in BETTER else 14.0
        return {"perplexity": 20.0, "rounded": 30.0, "codes_differ": 0, "validation": validation}
    seed = int(rest[-1])
    value = worth(kind, rest[-2])
    extra = {"parameters": 2_400_000, "seconds": 90.0 + seed, "codes_differ": 0, "strength": 0.85, "validation": value}
    return {
        "perplexity": None if value is None else value + seed,
        "full": value,
        "peak_bytes": 2e9,
        "processor_seconds": 80.0,
    } | extra


def everything(plan: Any, worth: Callable[[str, str], float | None]) -> dict[str, Any]:
    """All cells, made in the order of the plan; each is ready when its turn has come."""
    done: dict[str, Any] = {}
    while names := plan.wanted(done):
        able = [name for name in names if plan.ready(done, plan.parse(name))]
        assert able[0] == names[0]
        made, cell = answer(able[0], worth), plan.parse(able[0])
        done[able[0]] = {**made, "source": plan.source(done, cell)} if cell.kind in plan.DERIVED else made
    return done


def middle(kind: str, rate: str) -> float:
    best = {"qalora": 0.003, "qlora": 0.003, "peqa": 0.0003}[kind]
    return 13 + abs(math.log(float(rate) / best))


def test_the_order_of_work(tool: Callable[[str], Any]) -> None:
    plan = tool("comparison_plan")
    names = list(everything(plan, middle))
    assert names[:4] == ["float", "base-3", "base-2", "base-4"]
    # from the start downhill: the best, which is the start of one and a neighbour of the other's, and its neighbours
    assert names[4:7] == [f"qalora-3-{rate}-0" for rate in ("0.003", "0.002", "0.005")]
    assert names[7:10] == [f"qlora-3-{rate}-0" for rate in ("0.005", "0.003", "0.002")]
    assert names[22:26] == [f"{kind}-3-0.003-{seed}" for kind in plan.FIRST for seed in (1, 2)]
    assert names[34:37] == [f"requantized-3-{seed}" for seed in plan.SEEDS]
    assert names[52:58] == [f"{kind}-3-0" for kind in plan.VARIANTS]
    assert names[58:62] == [f"{kind}-3-{seed}" for kind in BETTER for seed in (1, 2)], (
        "what loses at once is not run again"
    )
    assert names[62:65] == [f"peqa-3-{rate}-0" for rate in ("0.0003", "0.0002", "0.0005")]
    # bases; rates of two methods, and 2 more seeds, at 3 widths; 2 derived with 3 seeds; variants; the third method
    assert len(names) == 4 + 3 * 2 * (3 + 2) + 18 + 10 + (3 + 2)
    assert all(plan.parse(name).name == name for name in names)


def test_a_search_goes_downhill_until_the_neighbours_are_worse(tool: Callable[[str], Any]) -> None:
    plan = tool("comparison_plan")

    def worth(kind: str, rate: str) -> float | None:
        if kind == "qalora":
            return 1 / float(rate)  # the larger the better, to the end of the rates
        if kind == "qlora":
            return None if float(rate) > 0.002 else 13 - float(rate)
        return 13 + float(rate)  # the smaller the better

    done = everything(plan, worth)
    tried = {kind: [rate for rate in plan.RATES if f"{kind}-3-{rate}-0" in done] for kind in plan.START}
    start = plan.RATES.index("0.003")
    assert tried["qalora"] == list(plan.RATES[start - 1 :])
    assert tried["qlora"] == ["0.001", "0.002", "0.003", "0.005"]
    assert tried["peqa"] == list(plan.RATES[: plan.RATES.index("0.0003") + 1])
    assert plan.search(done, "qalora", "3") == ([], plan.RATES[-1])
    assert plan.search(done, "qlora", "3") == ([], "0.002")
    assert "qlora-3-0.002-2" in done
    assert "qlora-3-0.003-2" not in done


def test_what_is_made_of_a_rate_that_is_no_longer_the_best_is_made_again(tool: Callable[[str], Any]) -> None:
    plan, page = tool("comparison_plan"), tool("comparison_page")
    done = everything(plan, middle)
    done["qlora-3-0.03-0"] = {**answer("qlora-3-0.03-0", middle), "validation": 1.0}
    done |= {f"qlora-3-{rate}-0": answer(f"qlora-3-{rate}-0", middle) for rate in ("0.02", "0.05")}
    for seed in (1, 2):
        done[f"qlora-3-0.03-{seed}"] = answer(f"qlora-3-0.03-{seed}", middle)
    assert plan.wanted(done) == [f"requantized-3-{seed}" for seed in plan.SEEDS]
    assert "| QLoRA merged, rounded again |  | 30.00 (30.00..30.00) |  | 30.00" in page.written(done)


def test_what_failed_at_every_rate_is_left(tool: Callable[[str], Any]) -> None:
    plan, page = tool("comparison_plan"), tool("comparison_page")
    done = everything(plan, lambda kind, rate: None if kind == "qlora" else middle(kind, rate))
    assert not any(name.startswith("requantized") for name in done)
    assert "diverged" in page.written(done)


def test_names_that_are_none(tool: Callable[[str], Any]) -> None:
    plan = tool("comparison_plan")
    for name in ("", "protocol", "held_out", "base", "qalora-3-1e-3-0", "qalora-3-0.001", "requantized-3-0.1-0"):
        assert plan.parse(name) is None, name
    cell = plan.parse("qlora-rtn-3-0.001-2")
    assert (cell.kind, cell.base, cell.bits, cell.rate, cell.seed) == ("qlora", "rtn-3", 3, "0.001", 2)


def test_the_tables_of_given_cells(tool: Callable[[str], Any], tmp_path: Path) -> None:
    plan, page = tool("comparison_plan"), tool("comparison_page")
    done = everything(plan, middle)
    del done["base-2"]
    text = page.written(done)
    assert "| base, before training |  | 20.00 | 20.00 |  |" in text
    three = " | ".join(["14.00 (13.00..15.00)"] * 3)
    assert f"| **QA-LoRA folded** | 2.40 M | {three} |" in text
    assert f"| QLoRA, float adapter kept | 2.40 M | {three} |" in text
    assert "| QLoRA merged, rounded again |  | 30.00 (30.00..30.00) |" in text
    assert "| QA-LoRA | 3 | 0.003 | 0.85, 0.85, 0.85 | 3 | 90 | 80 | 2.0 | 0 |" in text
    rates = "0.0002 | 0.0003 | 0.0005 | 0.002 | 0.003 | 0.005"
    assert f"| validation, seed 0 at rate | bits | {rates} |" in text
    assert "| QLoRA | 2 |  |  |  | 13.41 | 13.00 | 13.51 |" in text
    assert f"| {plan.VARIANTS['plus']} | 12.00 | 20.00 | 20.00 (20.00..20.00) |" in text
    assert f"| {plan.VARIANTS['mean']} | 14.00 | 20.00 |  |" in text
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    page.write_page(tmp_path / "page.md", done)
    assert (tmp_path / "page.md").read_text("utf-8") == PAGE.replace("old", text)
    drawn = ElementTree.fromstring((tmp_path / "page.svg").read_text("utf-8"))
    marks = [part for part in drawn if part.tag.endswith("circle")]
    assert len(marks) == 5 + 5 * 3 - 1 - 2, "the legend; methods by widths without a base; PEQA at one width"


def test_nothing_run_is_an_empty_table(tool: Callable[[str], Any]) -> None:
    page = tool("comparison_page")
    assert "| **QA-LoRA folded** |  |  |  |  |" in page.written({})
    ElementTree.fromstring(page.plot({}))


@pytest.fixture
def work(tool: Callable[[str], Any], tmp_path: Path) -> Path:
    """A folder of cells of a tiny model on a short text."""
    cells = tool("comparison_work")
    model = tiny_llama(tmp_path / "tiny", tokenizer=byte_tokenizer())
    (tmp_path / "text.txt").write_text(demo_text()[:4000], encoding="utf-8")
    settings = {
        "steps": 6,
        "batch": 2,
        "length": 32,
        "held_out": 256,
        "validation": 128,
        "calibration": 128,
        "window": 32,
        "rank": 3,
    }
    chosen = cells.Protocol(model=str(model), text=str(tmp_path / "text.txt"), peer_rank=2, **settings)
    cells.prepare(tmp_path / "work", chosen)
    return tmp_path / "work"


@pytest.mark.slow  # peft and all that it imports
@pytest.mark.filterwarnings("ignore")  # of peft
def test_every_kind_of_cell(tool: Callable[[str], Any], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, compare, cells = tool("comparison_plan"), tool("compare_training"), tool("comparison_work")
    monkeypatch.setattr(plan, "START", {"qalora": "0.03", "qlora": "0.01", "peqa": "0.003"})
    monkeypatch.setattr(plan, "NEIGHBOURS", 0)
    names = [
        "float",
        "base-3",
        "qalora-3-0.03-0",
        "qlora-3-0.01-0",
        "peqa-3-0.003-0",
        "requantized-3-0",
        "exported-3-0",
        *(f"{kind}-3-0" for kind in plan.VARIANTS),
    ]
    assert set(names) <= {*plan.wanted({}), *names}
    found = {name: compare.run_cell(work, name) for name in names}
    assert compare.read_cells(work) == json.loads(json.dumps(found))
    base = found["base-3"]["perplexity"]
    for kind in ("qalora-3-0.03-0", "qlora-3-0.01-0", "peqa-3-0.003-0"):
        assert len(found[kind]["losses"]) == 6
        assert found[kind]["perplexity"] < base, kind
    assert found["qalora-3-0.03-0"]["codes_differ"] == found["exported-3-0"]["codes_differ"] == 0
    opened = cells.Work(work)
    linears = [opened.float_model().tensors[name].shape for name in opened.float_model().linears]
    sizes = {"qalora-3-0.03-0": [(3 * (columns // 32), 3 * out) for out, columns in linears]}
    sizes["qlora-3-0.01-0"] = [(2 * columns, 2 * out) for out, columns in linears]
    sizes["peqa-3-0.003-0"] = [(out * columns // 32,) for out, columns in linears]
    for name, parts in sizes.items():
        assert found[name]["parameters"] == sum(map(sum, parts))
    ours = found["qalora-3-0.03-0"]
    exported = found["exported-3-0"]
    assert ours["perplexity"] == pytest.approx(exported["unfolded"], rel=5e-3)
    assert ours["perplexity"] != exported["unfolded"]
    assert exported["folded"] == pytest.approx(ours["perplexity"], rel=1e-5)
    assert exported["perplexity"] == pytest.approx(exported["folded"], rel=2e-2)
    again = found["requantized-3-0"]
    assert again["merged"] == pytest.approx(found["qlora-3-0.01-0"]["perplexity"], rel=1e-4)
    assert again["source"] == "qlora-3-0.01-0"
    variants = [found[f"{kind}-3-0"] for kind in plan.VARIANTS]
    assert all(cell["perplexity"] < base and cell["codes_differ"] == 0 for cell in variants)
    assert len({cell["full"] for cell in [ours, *variants]}) == 1 + len(variants), "each does change something"
    shutil.rmtree(work / "bases")
    shutil.rmtree(work / "adapters")
    assert compare.run_cell(work, "exported-3-0") == exported, (
        "base and adapter are made again where only cells are left"
    )


def test_the_windows_are_of_what_follows_the_training(tool: Callable[[str], Any], work: Path) -> None:
    cells = tool("comparison_work")
    opened = cells.Work(work)
    text, tokenizer = demo_text()[:4000], byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    trained = ids[: 6 * 2 * 32]
    blocks = opened.blocks(opened.float_model())
    assert blocks.tokens.flatten().tolist() == trained
    assert opened.calibration(opened.float_model()).shape == (4, 32)
    after = [tuple(ids[at : at + 32]) for at in range((6 * 2 + 1) * 32 + 16, len(ids) - 31, 32)]
    held, validation = ([after.index(tuple(row)) for row in rows.tolist()] for rows in (opened.held, opened.validation))
    assert (len(held), len(validation)) == (8, 4)
    assert not set(held) & set(validation)
    gaps = [b - a for a, b in itertools.pairwise(sorted(held + validation))]
    assert max(gaps) - min(gaps) <= 1, "spread over all of it"
    assert [sorted(held + validation).index(n) for n in validation] == [1, 4, 7, 10]


def test_the_strength_is_the_one_that_validation_prefers(tool: Callable[[str], Any], work: Path) -> None:
    """A module that gives every next token the same probability but for what its strength adds."""
    cells = tool("comparison_work")
    opened = cells.Work(work)

    def model(best: float, seen: list[float]) -> Callable[[float], Any]:
        def at(strength: float) -> Any:
            seen.append(strength)

            def module(input_ids: torch.Tensor, use_cache: bool) -> Any:
                right = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), 300).float()
                return SimpleNamespace(logits=right * (5 - abs(strength - best)))

            return module

        return at

    for best, tried in ((1.0, [1.0, 0.85]), (0.85, [1.0, 0.85, 0.7]), (0.1, [1.0, 0.85, 0.7, 0.55])):
        seen: list[float] = []
        found = opened.at_its_strength(model(best, seen))
        assert found["strength"] == max(best, 0.55)
        assert seen[: len(tried)] == tried
        assert found["validation"] == min(found["strengths"].values())
        assert found["perplexity"] <= found["full"]
    assert opened.at_its_strength(model(math.nan, []))["perplexity"] is None


def test_cells_of_another_protocol_are_refused(tool: Callable[[str], Any], work: Path) -> None:
    cells = tool("comparison_work")
    given = cells.Work(work).protocol
    cells.prepare(work, given)
    with pytest.raises(ValueError, match="expected cells of the same protocol"):
        cells.prepare(work, cells.replace(given, steps=7))


def test_a_cell_of_another_text_is_refused(tool: Callable[[str], Any], work: Path) -> None:
    cells, compare = tool("comparison_work"), tool("compare_training")
    given = cells.Work(work).protocol
    compare.run_cell(work, "float")
    cells.prepare(work, given)
    for name, other in (("text_sha256", "0" * 64), ("protocol", {})):
        cell = json.loads((work / "float.json").read_text("utf-8"))
        cells.write_whole(work / "float.json", {**cell, name: other})
        with pytest.raises(ValueError, match=r"float.json: expected a cell of the same protocol and text"):
            cells.prepare(work, given)
        cells.write_whole(work / "float.json", cell)


def test_trained_scales_have_the_gradient_of_the_formula(tool: Callable[[str], Any], tmp_path: Path) -> None:
    peers = tool("training_peers")
    model = quantize(load(tiny_llama(tmp_path / "tiny")), bits=3, group_size=32)
    tensor = model.tensors[model.linears[0]].load_quantized()
    layer = peers.ScaledLinear(tensor, None)
    assert torch.allclose(layer.weight(), tensor.dequantize(), atol=1e-6)
    x = torch.randn(5, tensor.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = tensor.scale.clone().requires_grad_()
    weight = (scale[..., None] * layer.centred()).view(tensor.shape)
    wanted = torch.autograd.grad((x @ weight.t()).square().sum(), (x, scale))
    got = torch.autograd.grad(layer(x).square().sum(), (x, layer.scale))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    tool: Callable[[str], Any], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, cells = tool("compare_training"), tool("comparison_work")
    protocol = json.dumps(cells.asdict(cells.Work(work).protocol))
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    options = ["--work", str(work), "--protocol", protocol, "--jobs", "2", "--write", str(tmp_path / "page.md")]
    compare.main([*options, "--cells", "float,peqa-4-0.003-0"])
    first = capsys.readouterr().out
    assert all(f"{name}: " in first for name in ("float", "base-4", "peqa-4-0.003-0"))
    compare.main([*options, "--cells", "float,peqa-4-0.003-0,base-4"])
    assert "base-4: " not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="what they are made of is missing: exported-4-0"):
        compare.main([*options, "--cells", "exported-4-0"])
