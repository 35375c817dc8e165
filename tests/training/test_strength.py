"""How much of what was learned is kept: what is tried, what is chosen, and that it is what is written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import qalora
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters.exports import export
from qalora.errors import InputError
from qalora.training import StepReport, TrainOptions, train
from qalora.training.loop import _Run
from qalora.training.plan import data_of, targets_of
from qalora.training.strength import STRENGTHS, best_of, try_strengths


def options(text: Path, out: Path, **changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {"max_steps": 6, "rank": 2, "batch_size": 2, "max_length": 32, "held_out": 0.1}
    return TrainOptions(data=str(text), out=out, **{**settings, **changes})


@pytest.mark.parametrize(
    ("losses", "tried", "best"),
    [
        ({1.0: 2.0, 0.85: 2.0}, 2, 1.0),
        ({1.0: 2.0, 0.85: 2.5}, 2, 1.0),
        ({1.0: 2.0, 0.85: 1.8, 0.7: 1.9}, 3, 0.85),
        ({1.0: 2.0, 0.85: 1.8, 0.7: 1.7, 0.55: 1.6}, 4, 0.55),
        ({1.0: 2.0, 0.85: math.nan}, 2, 1.0),
    ],
)
def test_the_next_is_tried_while_it_is_better(losses: dict[float, float], tried: int, best: float) -> None:
    found = try_strengths(losses[1.0], losses.__getitem__)
    assert [strength for strength, _ in found] == list(STRENGTHS[:tried])
    assert best_of(found) == (best, losses[best])


@pytest.mark.parametrize("strength", ["auto", 0.5])
def test_it_is_a_factor_of_what_was_learned(base: Checkpoint, tmp_path: Path, strength: Any) -> None:
    """The same A, B times the strength, and the held-out loss of the model that is folded of what was written."""
    text = tmp_path / "text.txt"  # of digits: each a token that hangs on nothing that the tokenizer was trained on
    text.write_text("".join(str(n * n % 5) for n in range(6000)), encoding="utf-8")
    changes = {"learning_rate": 0.1, "max_steps": 1}  # so far that each lower strength is better by 0.2, 0.55 by 0.7
    whole = train(base, options(text, tmp_path / "whole", **changes))
    seen: list[StepReport] = []
    chosen = options(text, tmp_path / "part", strength=strength, **changes)
    part = train(base, chosen, seen.append)
    log = json.loads((tmp_path / "part" / "training.json").read_text("utf-8"))
    kept = log["strength"]
    assert kept == seen[-1].strength < 1
    assert all(report.strength == 1 for report in seen[:-1])
    losses = {entry["strength"]: entry["held_out_loss"] for entry in log["strengths"]}
    assert losses[kept] == min(losses.values()) == log["held_out"][-1]["loss"] == float(f"{seen[-1].held_out:.6g}")
    for path, layer in whole.layers.items():
        assert torch.equal(part.layers[path].a, layer.a)
        assert torch.equal(part.layers[path].b, layer.b * kept)
    folded = qalora.fold(base, tmp_path / "part")
    run = _Run(folded, chosen, targets_of(folded, chosen), *data_of(folded, chosen))
    assert run.evaluate() == seen[-1].held_out, "an adapter of zeros on the folded model"


def test_it_resumes_to_the_same_bits(base: Checkpoint, text: Path, tmp_path: Path, leave: Any) -> None:
    """Also from a checkpoint of the last step, which holds all of what was learned."""
    changes: dict[str, Any] = {"save_every": 2, "strength": 0.7}
    train(base, options(text, tmp_path / "whole", **changes))
    for name, last in (("early", 3), ("end", 6)):
        leave(base, options(text, tmp_path / name, **changes), last)
        train(base, options(text, tmp_path / name, resume=True, **changes))
        for file in ("adapter_model.safetensors", "training.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("strength", [0, 1.01, -1, math.nan, "most"])
def test_refusals(text: Path, tmp_path: Path, strength: Any) -> None:
    with pytest.raises(InputError, match="strength: expected a number > 0 and <= 1, or auto, got"):
        options(text, tmp_path / "adapter", strength=strength)


def test_the_command_says_it(base: Checkpoint, text: Path, tmp_path: Path) -> None:
    export(base, ["qalora"], tmp_path / "base")
    arguments = ["train", str(tmp_path / "base" / "qalora"), "--data", str(text), "--max-steps", "2", "--rank", "2"]
    arguments += ["-o", str(tmp_path / "adapter")]
    done = CliRunner().invoke(main, [*arguments, "--strength", "0.5"])
    assert done.exit_code == 0, done.output
    assert " at strength 0.5 after 2 steps\n" in done.stdout
    done = CliRunner().invoke(main, [*arguments, "--force", "--json", "--strength", "auto"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["strength"] in STRENGTHS
    done = CliRunner().invoke(main, [*arguments, "--force", "--strength", "much"])
    assert done.exit_code == 2
    assert "--strength: expected a number > 0 and <= 1, or auto, got 'much'" in done.stderr
