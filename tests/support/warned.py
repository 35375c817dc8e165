"""What `inspect` warns of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qalora.inspection import WARNINGS, Finding, FolderReport, inspect

Q_PROJ = "model.layers.0.self_attn.q_proj"


def warned(path: Path, **options: Any) -> dict[str, Finding]:
    report = inspect(path, **options)
    assert not isinstance(report, FolderReport)
    assert all(finding.code in WARNINGS and finding.evidence for finding in report.warnings)
    return {finding.code: finding for finding in report.warnings}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
