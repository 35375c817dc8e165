"""A program that uses every public function, as a user with a strict type checker writes it. It is checked, not run."""

from __future__ import annotations

from pathlib import Path

import qalora


def tell(report: qalora.StepReport) -> None:
    """A step of a training."""
    print(report.step, report.steps, report.loss)


def count(name: str, nbytes: int) -> None:
    """A tensor that was written."""
    print(name, nbytes)


def fine_tune(model: str | Path, data: Path, out: Path) -> qalora.ParityReport:
    """From a float model to a proof."""
    base: qalora.Checkpoint = qalora.quantize(qalora.load(model), bits=4, group_size=32, progress=lambda: None)
    saved: qalora.Plan = qalora.save(base, out / "base", progress=count)
    print(saved.nbytes)
    adapter: qalora.Adapter = qalora.train(
        base, data, out / "adapter", rank="auto", max_steps=60, max_length=256, dtype="auto", progress=tell
    )
    folded = qalora.fold(base, adapter, minima="float16")
    plans = qalora.export(folded, ["gguf", "onnx"], out / "dist", name="tiny", allow_loss="minima", progress=count)
    print([plan.target for plan in plans])
    report = qalora.verify(base, [out / "dist"], adapter=adapter, level="logits", max_tokens=64)
    if not report.passed():
        raise qalora.ProofError(report.failure())
    return report


def ship(base: Path, adapter: Path, out: Path) -> bool:
    """A release, checked; and what it is."""
    made: qalora.Release = qalora.release(
        base,
        qalora.Export(targets=("gptq", "gguf"), minima="float16"),
        qalora.Package(out=out, license="mit", language=("en",)),
        adapter=adapter,
        verify=qalora.Verify(max_tokens=128),
    )
    found = qalora.check(made.folder, base=base, open_artifacts=False)
    print(qalora.inspect(made.folder, quick=True).to_json())
    return not found.findings


def pipeline(recipe: Path) -> list[str]:
    """What a recipe would do."""
    try:
        rows: list[qalora.Row] = qalora.run(recipe, dry_run=True, watch=qalora.Watch(note=print))
    except qalora.InputError as error:
        return [error.what, error.expected, error.got, error.todo, error.field or ""]
    return [row.state for row in rows]


def options(out: Path) -> list[qalora.QaloraError]:
    """Records by themselves."""
    try:
        qalora.Quantize(bits="auto", budget=3.5, calibration="text.txt")
        qalora.TrainOptions(data="text.txt", out=out, learning_rate=3e-3)
    except qalora.QaloraError as error:
        return [error]
    return []
