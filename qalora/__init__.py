"""QA-LoRA adapters folded exactly into integer weights, exported to GPTQ, ONNX and GGUF, and proven the same in each.

    import qalora

    model = qalora.quantize(qalora.load("HuggingFaceTB/SmolLM2-135M"), bits=4, group_size=32)
    adapter = qalora.train(model, "text.txt", "adapter", max_steps=60)
    folded = qalora.fold(model, adapter)
    qalora.export(folded, "gguf", "dist")
    report = qalora.verify(model, ["dist/gguf"], adapter=adapter)

Importing this package imports neither torch nor transformers: each function does, when it is called. It lets
transformers know our own folders, as soon as transformers is imported: see `qalora.integrations.transformers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qalora._version import __version__
from qalora.errors import InputError, ProofError, QaloraError
from qalora.integrations.hook import install as _install_hook
from qalora.options import split as _split
from qalora.options.engine import Sharing
from qalora.options.export import Export
from qalora.options.quantize import Quantize
from qalora.options.release import Package
from qalora.options.train import TrainOptions
from qalora.options.verify import Verify
from qalora.options.words import SHARD_SIZE, CheckpointFormat, Convention, Level, Minima, Zeros

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint
    from qalora.converters.plan import Plan
    from qalora.inspection import Report
    from qalora.parity import ParityReport
    from qalora.pipeline import Row, Watch
    from qalora.releasing.check import Checked
    from qalora.releasing.package import Release
    from qalora.training.pace import StepReport

_install_hook()

__all__ = [
    "Adapter",
    "Checkpoint",
    "Export",
    "InputError",
    "Package",
    "ParityReport",
    "Plan",
    "ProofError",
    "QaloraError",
    "Quantize",
    "Release",
    "Row",
    "StepReport",
    "TrainOptions",
    "Verify",
    "Watch",
    "__version__",
    "check",
    "export",
    "fold",
    "inspect",
    "load",
    "quantize",
    "release",
    "run",
    "save",
    "train",
    "verify",
]

_RECORDS = {
    "Adapter": "qalora.adapter",
    "Checkpoint": "qalora.checkpoint",
    "ParityReport": "qalora.parity",
    "Plan": "qalora.converters.plan",
    "Release": "qalora.releasing.package",
    "Row": "qalora.pipeline",
    "StepReport": "qalora.training.loop",
    "Watch": "qalora.pipeline",
}
"""Records that are imported when they are first asked for, and the module that holds each."""

_Record = TypeVar("_Record")


def __getattr__(name: str) -> Any:
    if name not in _RECORDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_RECORDS[name]), name)


def load(path: str | Path, *, checkpoint_format: CheckpointFormat | None = None) -> Checkpoint:
    """Open a model, lazily: a folder of floats or of packed integers, a GGUF or ONNX file, or a Hub id.

    checkpoint_format  how a GPTQ folder stores its zero points, if its label is wrong; refused for any other model
    """
    from qalora.converters import load as load_model

    return load_model(path, checkpoint_format=checkpoint_format)


def save(
    model: Checkpoint,
    out: str | Path,
    *,
    max_shard_size: int = SHARD_SIZE,
    force: bool = False,
    jobs: int | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Plan:
    """Write a model as a qalora folder, which `load` opens again. Returns the plan of what was written.

    max_shard_size  bytes of tensors per file, at most
    force           replace an earlier output
    jobs, engine    processes that share the work, and where: see `qalora.options.engine`
    progress        called with each tensor's name and bytes
    """
    sharing = Sharing(jobs=jobs, engine=engine)

    from qalora.converters.exports import save as write
    from qalora.engines import engine_of

    with engine_of(sharing) as workers:
        return write(model, Path(out), max_shard_size=max_shard_size, force=force, progress=progress, engine=workers)


def quantize(
    model: str | Path | Checkpoint,
    *,
    bits: int | Literal["auto"] | None = None,
    group_size: int | None = 32,
    zeros: Zeros = "real",
    method: Literal["rtn", "clip", "hqq", "gptq"] = "rtn",
    fit_minima: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    passes: int = 2,
    calibration: str | Path | None = None,
    calibration_tokens: int = 8192,
    calibration_length: int = 256,
    budget: float | None = None,
    widths: Sequence[int] = (),
    requantize: bool = False,
    device: str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Quantize a float model, lazily.

    bits         bits per weight, 4 by default; "auto" chooses a width for each layer, within `budget`
    group_size   columns that share a scale and a minimum; None: the whole row
    zeros        zero points: "real" numbers, "integer", or the middle code everywhere ("symmetric")
    method       "rtn": round to nearest; "clip": search the range; "hqq": search scale and minimum; "gptq": GPTQ
    fit_minima   fit the minima to the layers' inputs afterwards
    act_order, damping, passes   for gptq, see `qalora.options.quantize`
    calibration  text for computing the layers' inputs, which gptq and fit_minima need
    calibration_tokens, calibration_length   tokens of the text, and tokens per sequence
    budget       mean bits per weight at most, scales and minima included
    widths       the widths that "auto" chooses from
    requantize   quantize a model that holds integers already
    device       where it is computed, a layer at a time: "cpu", "cuda", "mps", or "auto"
    progress     called after each decoder layer, if inputs are computed

    Options are checked before the model is opened.
    """
    bits = bits if bits is not None else 4 if budget is None else "auto"
    calibration = None if calibration is None else str(calibration)
    options = _record(Quantize, locals())

    from qalora.calibration import check_quantize, quantize_model

    check_quantize(options)
    return quantize_model(_opened(model), options, tick=progress)


def train(
    model: str | Path | Checkpoint,
    data: str | Path,
    out: str | Path,
    *,
    rank: int | Literal["auto"] = 16,
    max_steps: int | None = None,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    max_length: int = 128,
    learning_rate: float = 3e-3,
    target_modules: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    resume: bool = False,
    force: bool = False,
    alpha: float | None = None,
    budget: int | None = None,
    start: Literal["gradient", "uniform"] = "gradient",
    convention: Convention = "paper",
    pool_size: int | None = None,
    minima: Minima = "float16",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    max_gradient_norm: float = 1.0,
    held_out: float = 0.05,
    strength: float | Literal["auto"] = 1.0,
    evaluate_every: int = 0,
    save_every: int = 100,
    weights: Literal["kept", "packed"] = "kept",
    gradient_checkpointing: bool = False,
    shard: bool = False,
    progress: Callable[[StepReport], None] = lambda report: None,
) -> Adapter:
    """Train a QA-LoRA adapter on text, write it to the folder `out` and return it.

    `TrainOptions` says what each option means. Options are checked before the model is opened.

    progress  called after each step
    """
    data, out = str(data), Path(out)
    options = _record(TrainOptions, locals())

    from qalora.training import check_before
    from qalora.training import train as train_model

    check_before(options)
    return train_model(_opened(model), options, progress)


def fold(
    model: str | Path | Checkpoint,
    adapter: str | Path | Adapter,
    *,
    minima: Minima | None = None,
    convention: Convention | None = None,
) -> Checkpoint:
    """Fold an adapter into the model's minima, lazily; no code changes.

    minima      data type that the new minima are rounded to; as in the adapter's training, or float16, by default
    convention  how the adapter is scaled, if its files do not say
    """
    from qalora.folding import check_minima
    from qalora.folding import fold as fold_model

    check_minima(minima)
    base = _opened(model)
    return fold_model(base, _read(adapter, base, convention), minima=minima)


def export(
    model: str | Path | Checkpoint,
    targets: str | Sequence[str],
    out: str | Path,
    *,
    adapter: str | Path | Adapter | None = None,
    minima: Minima | None = None,
    convention: Convention | None = None,
    name: str | None = None,
    allow_loss: str | Iterable[str] = (),
    gptq_form: Literal["auto", "nearest", "eight-bit", "round"] = "auto",
    gguf_form: Literal["auto", "wide"] = "auto",
    accuracy_level: int = 0,
    onnx_graphs: Literal["both", "fast", "portable"] = "both",
    onnx_embedding: Literal["auto", "float32", "quantized"] = "auto",
    openvino_precision: Literal["float32", "fast"] = "float32",
    compressed_scales: Literal["float16", "float32"] = "float16",
    max_shard_size: int = SHARD_SIZE,
    split_max_size: int | None = None,
    lora_slots: str | Iterable[str] = (),
    force: bool = False,
    jobs: int | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Plan]:
    """Write a model to `out/<target>/` for each target.

    adapter     folded into the model first; GPTQ and compressed-tensors can keep it beside the base, see
                `qalora.converters.exports`
    minima, convention   as in `fold`
    name        model name in file names and metadata
    allow_loss  losses that are accepted, by name: see `qalora.options.words.LOSSES`
    gptq_form, gguf_form, accuracy_level, onnx_graphs, onnx_embedding, openvino_precision, compressed_scales,
    max_shard_size, split_max_size   see `Export`
    lora_slots  ONNX: modules that take a LoRA at run time
    force       replace an earlier output
    jobs, engine   processes that share the work, and where: see `qalora.options.engine`
    progress    called with each tensor's name and bytes

    Options are checked before the model is opened.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    record = _record(Export, locals())
    sharing = Sharing(jobs=jobs, engine=engine)

    from qalora.converters.exports import check_fold, check_places, check_targets, writing
    from qalora.converters.exports import export as export_model
    from qalora.engines import engine_of

    options = writing(record, lora_slots=lora_slots)
    check_targets(targets, options)
    check_fold(adapter, minima, convention)
    check_places(Path(out), targets, force=force)
    base = _opened(model)
    read = None if adapter is None else _read(adapter, base, convention)
    with engine_of(sharing) as workers:
        return export_model(
            base,
            targets,
            Path(out),
            options,
            adapter=read,
            minima=minima,
            force=force,
            progress=progress,
            engine=workers,
        )


def verify(
    reference: str | Path | Checkpoint,
    artifacts: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | Adapter | None = None,
    convention: Convention | None = None,
    minima: Minima | None = None,
    level: Level = "generation",
    text: str | None = None,
    tokens: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    max_tokens: int = 256,
    generate: int = 24,
    threads: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    dynamic_int8: bool = False,
    relative_to: Path | None = None,
    jobs: int | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> ParityReport:
    """Run artefacts in their own runtimes and compare; see `qalora.parity.verify` for the options.

    adapter     the adapter in the artefacts; the reference is then the base
    convention  as in `fold`
    text        the text to compute on, not the name of a file
    jobs, engine   processes that share the comparison of the weights, and where: see `qalora.options.engine`
    """
    sharing = Sharing(jobs=jobs, engine=engine)

    from qalora.engines import engine_of
    from qalora.parity import verify as verify_artifacts

    paths = [artifacts] if isinstance(artifacts, str | Path) else artifacts
    with engine_of(sharing) as workers:
        return verify_artifacts(
            reference,
            [Path(path) for path in paths],
            adapter=adapter,
            convention=convention,
            minima=minima,
            level=level,
            text=text,
            tokens=tokens,
            prompts=prompts,
            max_tokens=max_tokens,
            generate=generate,
            threads=threads,
            memory=memory,
            device=device,
            dynamic_int8=dynamic_int8,
            relative_to=relative_to,
            engine=workers,
            progress=progress,
        )


def release(
    model: str | Path | Checkpoint,
    export: Export,
    package: Package,
    *,
    adapter: str | Path | Adapter | None = None,
    convention: Convention | None = None,
    verify: Verify | None = None,
    force: bool = False,
    password: str | None = None,
    watch: Watch | None = None,
) -> Release:
    """Fold an adapter, export, verify every artefact in its own runtime, and package the result.

    export    the formats and how they are written; package: the folder, the card, the signature
    adapter, convention   as in `fold`
    verify    what the artefacts are compared on
    force     replace an earlier release
    password  of an encrypted private key
    watch     callbacks for progress

    Options are checked before the model is opened. If a gate fails, or an artefact is not proven and `verify` does not
    allow it, the report stays beside the folder's place, as DIST.report.json, and ProofError is raised.
    """
    from qalora.pipeline.making import check_before_release, make_release

    check_before_release(export, verify or Verify(), package, adapter, convention, force=force, password=password)
    return make_release(
        _opened(model),
        Path(adapter) if isinstance(adapter, str) else adapter,
        export,
        verify or Verify(),
        package,
        convention=convention,
        force=force,
        password=password,
        watch=watch,
    )


def check(
    folder: str | Path,
    *,
    base: str | Path | Checkpoint | None = None,
    adapter: str | Path | None = None,
    public_key: str | Path | None = None,
    text: str | None = None,
    template: str | None = None,
    open_artifacts: bool = True,
    allow_unproven: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Checked:
    """Check a release: whether its files are whole, agree and open; with the base, also every byte and every figure.

    adapter         the adapter of the release; by default the release's own copy
    public_key      checks the signature
    text, template  the text of the report and the template of the card, if they are not qalora's own
    open_artifacts  open each artefact in its runtime
    allow_unproven  a runtime that is not installed is no finding
    progress        called with the name of each check

    A fault in the release is not raised; it is one of the findings in the result.
    """
    from qalora.releasing.check import check_release

    return check_release(
        Path(folder),
        base=None if base is None else _opened(base),
        adapter=None if adapter is None else Path(adapter),
        public_key=None if public_key is None else Path(public_key),
        text=text,
        template=template,
        open_artifacts=open_artifacts,
        allow_unproven=allow_unproven,
        progress=progress,
    )


def inspect(
    path: str | Path,
    *,
    base: str | Path | None = None,
    convention: Convention | None = None,
    quick: bool = False,
    checkpoint_format: CheckpointFormat | None = None,
) -> Report:
    """Report what a model, an adapter or an artefact is, and what is wrong with it.

    base   the model that an adapter belongs to; shapes, pools and groups are compared with it
    quick  read headers, labels and zero points only
    convention, checkpoint_format   as in `fold` and `load`
    """
    from qalora.inspection import inspect as inspect_path

    return inspect_path(path, base=base, convention=convention, quick=quick, checkpoint_format=checkpoint_format)


def run(recipe: str | Path, *, force: bool = False, dry_run: bool = False, watch: Watch | None = None) -> list[Row]:
    """Run a recipe; finished steps are reused, see docs/recipe.md. Returns each step with its state before the run.

    force    replace an earlier release; finished steps are still reused
    dry_run  do nothing and download nothing
    watch    callbacks for progress
    """
    from qalora.pipeline import run as run_recipe

    return run_recipe(recipe, force=force, dry_run=dry_run, watch=watch)


def _record(record: type[_Record], arguments: Mapping[str, Any]) -> _Record:
    """The record of those of a function's arguments that are its options."""
    own, _ = _split(record, arguments)
    return record(**own)


def _opened(model: str | Path | Checkpoint) -> Checkpoint:
    return load(model) if isinstance(model, str | Path) else model


def _read(adapter: str | Path | Adapter, model: Checkpoint, convention: Convention | None) -> Adapter:
    from qalora.adapter import given_adapter

    return given_adapter(adapter, model, convention=convention)
