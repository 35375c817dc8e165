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

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qalora._version import __version__
from qalora.errors import InputError, QaloraError
from qalora.integrations.hook import install as _install_hook

if TYPE_CHECKING:
    from qalora.adapter import Adapter
    from qalora.checkpoint import Checkpoint
    from qalora.converters.plan import Plan
    from qalora.parity import ParityReport
    from qalora.training import TrainOptions

_install_hook()

__all__ = ["QaloraError", "TrainOptions", "__version__", "export", "fold", "load", "quantize", "train", "verify"]


def __getattr__(name: str) -> Any:
    if name == "TrainOptions":  # torch is imported when somebody asks for it
        from qalora.training import TrainOptions

        return TrainOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | Path, **options: Any) -> Checkpoint:
    """Open a model, lazily: our own folder, a GPTQ, MLX, HQQ or float folder, a GGUF file, or a Hub id.

    options  `checkpoint_format`, for GPTQ folders with a wrong label
    """
    from qalora.converters import load as load_model

    return load_model(path, **options)


def quantize(
    model: str | Path | Checkpoint,
    *,
    calibration: str | Path | None = None,
    budget: float | None = None,
    **options: Any,
) -> Checkpoint:
    """Quantize a float model, lazily; see `qalora.quantization.QuantizeOptions` for bits, group_size, zeros, method.

    calibration  a text to compute the layers' inputs on, which gptq and fit_minima need
    budget       bits per weight at most, a width chosen for each layer; see `qalora.calibration`
    requantize   among the options: of a model that holds integers already
    """
    from qalora.quantization.model import quantize as quantize_model

    opened = _opened(model)
    if calibration is None:
        if budget is not None:
            raise InputError("a budget needs the layers' inputs", todo="give a text: calibration=FILE")
        return quantize_model(opened, **options)
    from qalora.calibration import Calibration, quantize_on_text
    from qalora.quantization import QuantizeOptions

    again = options.pop("requantize", False)
    text = Calibration(data=str(calibration))
    return quantize_on_text(opened, text, QuantizeOptions(**options), budget=budget, requantize=again)


def train(model: str | Path | Checkpoint, data: str | Path, out: str | Path, **options: Any) -> Adapter:
    """Train a QA-LoRA adapter on text, write it to the folder `out` and give it; see `qalora.TrainOptions`."""
    from qalora.training import TrainOptions
    from qalora.training import train as train_model

    return train_model(_opened(model), TrainOptions(data=str(data), out=Path(out), **options))


def fold(model: str | Path | Checkpoint, adapter: str | Path | Adapter, **options: Any) -> Checkpoint:
    """Fold an adapter into the model's minima, lazily; the codes stay. See `qalora.folding.fold` for minima."""
    from qalora.folding import fold as fold_model

    base = _opened(model)
    return fold_model(base, _read(adapter, base), **options)


def export(
    model: str | Path | Checkpoint,
    targets: str | Sequence[str],
    out: str | Path,
    *,
    adapter: str | Path | Adapter | None = None,
    minima: Literal["float16", "float32"] | None = None,
    force: bool = False,
    **options: Any,
) -> list[Plan]:
    """Write a model to `out/<target>/` for each target; see `qalora.converters.plan.ExportOptions` for options.

    adapter  folded into what is written, or put beside it where the target can
    minima   what the fold rounds to: what the adapter was trained with, or float16, by default
    force    replaces what is there
    """
    from qalora.converters.exports import export as export_model
    from qalora.converters.plan import ExportOptions

    if minima is not None and adapter is None:
        raise InputError("minima are rounded by a fold", expected="an adapter to fold", got="none")
    base = _opened(model)
    read = None if adapter is None else _read(adapter, base)
    names = [targets] if isinstance(targets, str) else targets
    return export_model(base, names, Path(out), ExportOptions(**options), adapter=read, minima=minima, force=force)


def verify(
    reference: str | Path | Checkpoint,
    artifacts: Sequence[str | Path],
    *,
    adapter: str | Path | Adapter | None = None,
    **options: Any,
) -> ParityReport:
    """Run artefacts in their own runtimes and compare; see `qalora.parity.verify` for the options."""
    from qalora.parity import verify as verify_artifacts

    base = _opened(reference)
    read = None if adapter is None else _read(adapter, base)
    return verify_artifacts(base, [Path(path) for path in artifacts], adapter=read, **options)


def _opened(model: str | Path | Checkpoint) -> Checkpoint:
    return load(model) if isinstance(model, str | Path) else model


def _read(adapter: str | Path | Adapter, model: Checkpoint) -> Adapter:
    from qalora.adapter import Adapter, read_adapter

    return adapter if isinstance(adapter, Adapter) else read_adapter(Path(adapter), model)
