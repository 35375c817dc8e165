"""Convert a pickled adapter (adapter_model.bin) to adapter_model.safetensors, in a process of its own.

    python tools/convert_pickle.py adapter_folder/adapter_model.bin [-o OUT] [--force]

A pickle is a program that runs when it is opened. This tool opens it with torch.load(weights_only=True), which runs a
small part of that language only, in a second process that has limits on time, memory and the size of files, and that
inherits neither environment nor working directory for imports. Only a flat table of dense float tensors comes out.
The tensors are written as they are: name, dtype, shape, bytes.

Exit status: 0 done, 2 not a file that can be converted; then nothing is written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from qalora.errors import FormatError, InputError
from qalora.formats.output import new_file

FILE_LIMIT = 16 << 30
MEMORY = 8 << 30
"""Address space that Python and torch need beside the file."""
SECONDS = 600
FLOATS = ("float32", "float16", "bfloat16", "float64")


def main() -> int:
    """Parse, run the second process, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pickle", type=Path, help="adapter_model.bin, or the folder that holds it")
    parser.add_argument("-o", "--output", type=Path, help="adapter_model.safetensors beside it by default")
    parser.add_argument("--force", action="store_true", help="replace an earlier output")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.child:
            _convert(arguments.pickle, arguments.child)
        else:
            _supervise(arguments.pickle, arguments.output, force=arguments.force)
    except InputError as error:
        print(error if arguments.child else f"convert_pickle: {error}", file=sys.stderr)
        return 2
    return 0


def _supervise(source: Path, output: Path | None, *, force: bool) -> None:
    source = (source / "adapter_model.bin" if source.is_dir() else source).absolute()
    _check_size(source)
    target = (output or source.parent / "adapter_model.safetensors").absolute()
    with new_file(target, force=force) as work:
        command = [sys.executable, "-I", __file__, str(source), "--child", str(work)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=SECONDS,
                cwd="/",
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FormatError(f"{source}: it was not read in {SECONDS} s") from error
        if done.returncode == 2:
            raise FormatError(done.stderr.strip())
        if done.returncode or not work.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FormatError(f"{source}: reading it failed ({last[:200]}); it is damaged, or wants too much memory")
    print(f"wrote {target}")


def _check_size(source: Path) -> None:
    """Refuse what is missing, too large, or a zip whose members hold more bytes than the file."""
    if not source.is_file():
        raise InputError(str(source), expected="a pickle such as adapter_model.bin", got="nothing")
    size = source.stat().st_size
    if size > FILE_LIMIT:
        raise FormatError(str(source), expected=f"at most {FILE_LIMIT} bytes", got=str(size))
    if zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise FormatError(f"{source}: a damaged zip file: {error}") from error
        if sum(member.file_size for member in members) > size or any(member.compress_type for member in members):
            raise FormatError(str(source), expected="members stored as torch.save stores them", got="compressed ones")


def _limit(source: Path) -> None:
    """Limits on memory, time and files, where the operating system has them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    size = source.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 4 * size, MEMORY + 4 * size))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (1 << 20), 2 * size + (1 << 20)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _convert(source: Path, target: Path) -> None:
    """The second process: read, check, write."""
    import torch

    from qalora.formats.safetensors import SafetensorsWriter, plan_layout

    _limit(source)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        reason = str(error).strip().splitlines() or [""]
        raise FormatError(
            f"{source}: it is not a table of tensors ({type(error).__name__}: {reason[0][:150]})"
        ) from error
    if not isinstance(content, dict) or not content:
        raise FormatError(str(source), expected="a table of tensors by name", got=type(content).__name__)
    budget = source.stat().st_size
    for name, tensor in content.items():
        _check_tensor(source, name, tensor)
        budget -= tensor.numel() * tensor.element_size()
        if budget < 0:
            raise FormatError(str(source), expected="tensors no larger than the file", got="a larger one")
    names = sorted(content)
    layout = plan_layout([(name, content[name].dtype, tuple(content[name].shape)) for name in names], {"format": "pt"})
    with SafetensorsWriter(target, layout) as writer:
        for name in names:
            writer.write(name, content[name].detach())


def _check_tensor(source: Path, name: object, tensor: object) -> None:
    import torch

    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not dense:
        raise FormatError(f"{source}: {str(name)[:100]!r}", expected="a dense tensor", got=type(tensor).__name__)
    if str(tensor.dtype).removeprefix("torch.") not in FLOATS:
        raise FormatError(f"{source}: {name[:100]!r}", expected=f"one of {', '.join(FLOATS)}", got=str(tensor.dtype))


if __name__ == "__main__":
    sys.exit(main())
