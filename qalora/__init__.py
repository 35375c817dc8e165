"""QA-LoRA adapters folded exactly into integer weights, exported to GPTQ, ONNX and GGUF, and proven the same in each.

    import qalora

    model = qalora.quantize(qalora.load("HuggingFaceTB/SmolLM2-135M"), bits=4, group_size=32)
    adapter = qalora.train(model, "text.txt", "adapter", steps=60)
    folded = qalora.fold(model, adapter)
    qalora.export(folded, "gguf", "dist")
    report = qalora.verify(model, ["dist/gguf"], adapter=adapter)

Importing this package imports neither torch nor transformers: each function does, when it is called. It lets
transformers know our own folders, as soon as transformers is imported: see `qalora.integrations.transformers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qalora._version import __version__
from qalora.errors import InputError, QaloraError
from qalora.integrations.hook import install as _install_hook

if TYPE_CHECKING:
    from qalora.adapter import Adapter, Convention
    from qalora.checkpoint import Checkpoint
    from qalora.converters.plan import Plan
    from qalora.parity import ParityReport
    from qalora.training import TrainOptions

_install_hook()

__all__ = ["QaloraError", "TrainOptions", "__version__", "export", "fold", "load", "quantize", "train", "verify"]

_RECORDS = {"TrainOptions": "qalora.training"}
"""Records that are imported when they are first asked for, and the module that holds each."""


def __getattr__(name: str) -> Any:
    if name not in _RECORDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_RECORDS[name]), name)


def load(path: str | Path, *, checkpoint_format: Literal["gptq", "gptq_v2"] | None = None) -> Checkpoint:
    """Open a model, lazily: our own folder, a GPTQ, MLX, HQQ or float folder, a GGUF file, or a Hub id.

    checkpoint_format  what a GPTQ folder's zeros are stored as, where its label is wrong; refused for any other model
    """
    from qalora.converters import load as load_model

    return load_model(path, checkpoint_format=checkpoint_format)


def quantize(
    model: str | Path | Checkpoint,
    *,
    calibration: str | Path | None = None,
    budget: float | None = None,
    requantize: bool = False,
    **options: Any,
) -> Checkpoint:
    """Quantize a float model, lazily; see `qalora.quantization.QuantizeOptions` for bits, group_size, zeros, method.

    calibration  a text to compute the layers' inputs on, which gptq and fit_minima need
    budget       bits per weight at most, a width chosen for each layer; see `qalora.calibration`
    requantize   whether a model that holds integers already is rounded again

    Options are checked before the model is opened.
    """
    from qalora.quantization import QuantizeOptions

    if budget is not None and "bits" in options:
        raise InputError("bits and budget", expected="one of them", got="both")
    if budget is not None and calibration is None:
        raise InputError("a budget needs the layers' inputs", todo="give a text: calibration=FILE")
    chosen = QuantizeOptions(**options)
    chosen.check_use(text=calibration is not None, automatic=budget is not None)
    if calibration is None:
        from qalora.quantization.model import quantize as quantize_model

        return quantize_model(_opened(model), requantize=requantize, **options)
    from qalora.calibration import Calibration, quantize_on_text

    text = Calibration(data=str(calibration))
    return quantize_on_text(_opened(model), text, chosen, budget=budget, requantize=requantize)


def train(model: str | Path | Checkpoint, data: str | Path, out: str | Path, **options: Any) -> Adapter:
    """Train a QA-LoRA adapter on text, write it to the folder `out` and give it; see `qalora.TrainOptions`."""
    from qalora.training import TrainOptions, check_before
    from qalora.training import train as train_model

    chosen = TrainOptions(data=str(data), out=Path(out), **options)
    check_before(chosen)
    return train_model(_opened(model), chosen)


def fold(
    model: str | Path | Checkpoint,
    adapter: str | Path | Adapter,
    *,
    minima: Literal["float16", "float32"] | None = None,
    convention: Convention | None = None,
) -> Checkpoint:
    """Fold an adapter into the model's minima, lazily; the codes stay.

    minima      what the new minima are rounded to: what the adapter was trained with, or float16, by default
    convention  what the scaling means, where an adapter's folder does not say
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
    minima: Literal["float16", "float32"] | None = None,
    convention: Convention | None = None,
    force: bool = False,
    **options: Any,
) -> list[Plan]:
    """Write a model to `out/<target>/` for each target; see `qalora.converters.plan.ExportOptions`.

    adapter     what is folded into the model first; GPTQ may get it beside the base, see `qalora.converters.exports`
    minima, convention   as in `fold`
    force       whether an earlier output is replaced

    Options are checked before the model is opened.
    """
    from qalora.converters.exports import check_places, check_targets
    from qalora.converters.exports import export as export_model
    from qalora.converters.plan import ExportOptions
    from qalora.folding import check_minima

    names = [targets] if isinstance(targets, str) else list(targets)
    chosen = ExportOptions(**options)
    check_targets(names, chosen)
    check_minima(minima)
    if adapter is None and (minima or convention):
        raise InputError("options of a fold", expected="an adapter to fold", got="minima or convention without one")
    check_places(Path(out), names, force=force)
    base = _opened(model)
    read = None if adapter is None else _read(adapter, base, convention)
    return export_model(base, names, Path(out), chosen, adapter=read, minima=minima, force=force)


def verify(
    reference: str | Path | Checkpoint,
    artifacts: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | Adapter | None = None,
    convention: Convention | None = None,
    **options: Any,
) -> ParityReport:
    """Run artefacts in their own runtimes and compare; see `qalora.parity.verify` for the options.

    adapter     what the artefacts hold beside the reference, which is the base
    convention  as in `fold`
    """
    from qalora.parity import verify as verify_artifacts

    paths = [artifacts] if isinstance(artifacts, str | Path) else artifacts
    return verify_artifacts(
        reference, [Path(path) for path in paths], adapter=adapter, convention=convention, **options
    )


def _opened(model: str | Path | Checkpoint) -> Checkpoint:
    return load(model) if isinstance(model, str | Path) else model


def _read(adapter: str | Path | Adapter, model: Checkpoint, convention: Convention | None) -> Adapter:
    from qalora.adapter import given_adapter

    return given_adapter(adapter, model, convention=convention)
