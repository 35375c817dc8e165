"""Model-level decisions: families and tensor names, graphs, plans; one module or folder a target.

`load` recognises a model by what it finds, never by what it is told; `qalora.converters.exports` writes.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters.plan import Target
from qalora.errors import FormatError, InputError
from qalora.formats.files import InputFile
from qalora.formats.gptq import VERSIONS

__all__ = ["TARGETS", "load", "target"]

TARGETS: dict[str, str] = {
    "gptq": "qalora.converters.gptq",
    "gguf": "qalora.converters.gguf",
    "onnx": "qalora.converters.onnx",
    "mlx": "qalora.converters.mlx",
    "hqq": "qalora.converters.hqq",
    "qalora": "qalora.converters.native",
}
"""Each format that `export` writes, and the module that does it: a `Target`. Its folder has the format's name."""


def target(name: str) -> Target:
    """The module that writes a format; InputError names those there are."""
    if name not in TARGETS:
        raise InputError(field="targets", expected=f"one of {', '.join(TARGETS)}", got=repr(name))
    module: Target = importlib.import_module(TARGETS[name])
    return module


def load(model: str | Path, *, checkpoint_format: str | None = None) -> Checkpoint:
    """Open a model: our own folder, a GPTQ, MLX, HQQ or float folder, a GGUF file, an ONNX decoder, a Hub id.

    Reads headers only. A folder with model.onnx is an ONNX decoder where it has no safetensors.

    checkpoint_format overrides what a GPTQ folder says of its zeros: "gptq" (stored minus one) or "gptq_v2".
    Raises InputError for what is not there or not recognised, and for a checkpoint_format of what is no GPTQ folder,
    FormatError for what is damaged.
    """
    if checkpoint_format not in (None, *VERSIONS):
        raise InputError("checkpoint_format", expected=" or ".join(VERSIONS), got=repr(checkpoint_format))
    found = _load(model, checkpoint_format)
    if checkpoint_format is not None and found.layout != "gptq":
        raise InputError(
            f"`checkpoint_format` is for GPTQ folders, and {found.path} is {found.layout}", todo="leave it out"
        )
    return found if checkpoint_format is not None else replace(found, stored=found)  # its own label says something else


def _load(model: str | Path, checkpoint_format: str | None) -> Checkpoint:
    path = Path(model)
    if path.is_file():
        return _load_file(path)
    if not path.is_dir():
        from qalora.converters.huggingface import download

        path = download(str(model))
    if (path / "model.onnx").is_file() and not any(path.glob("*.safetensors*")):
        return _load_onnx(path)
    from qalora.converters import huggingface, native
    from qalora.converters.gptq.reader import read as read_gptq

    method = huggingface.quant_method(path)
    if method is None:
        return huggingface.read(path)
    if method == "qalora":
        return native.read(path)
    if method == "gptq":
        return read_gptq(path, checkpoint_format=checkpoint_format)
    if method == "mlx":
        from qalora.converters.mlx.reader import read as read_mlx

        return read_mlx(path)
    if method == "hqq":
        from qalora.converters.hqq.reader import read as read_hqq

        return read_hqq(path)
    raise FormatError(
        f"{path}: quant_method",
        expected="qalora, gptq, mlx, hqq, or a float model",
        got=repr(method),
        todo="see the README",
    )


def _load_onnx(path: Path) -> Checkpoint:
    from qalora.converters.onnx.reader import read

    return read(path)


def _load_file(path: Path) -> Checkpoint:
    if path.suffix == ".onnx":
        return _load_onnx(path)
    with InputFile(path) as file:
        magic = file.read(0, min(4, file.size))
    if magic == b"GGUF":
        from qalora.converters.gguf.reader import read as read_gguf

        return read_gguf(path)
    if magic[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise FormatError(f"{path}: a pickle, which runs code when it is opened", todo="convert it to safetensors")
    raise FormatError(
        str(path), expected="a GGUF or ONNX file or a model folder", got=f"a file that begins with {magic!r}"
    )
