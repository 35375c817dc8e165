"""The linter behind `qalora inspect`: what a model, an adapter or an artefact is, and what is wrong with it.

A warning carries its evidence: the number that was counted, the label and the value that contradict each other. Nothing
is changed, and nothing foreign is run; what cannot be read at all is an InputError. `records` holds what comes out, as
dataclasses and as JSON; `model`, `values`, `gptq`, `companions` and `adapter` look for it.
"""

from qalora.inspection.inspect import inspect
from qalora.inspection.records import (
    WARNINGS,
    AdapterReport,
    Finding,
    FolderReport,
    ModelReport,
    Report,
    ScaleHistogram,
    TensorKind,
)

__all__ = [
    "WARNINGS",
    "AdapterReport",
    "Finding",
    "FolderReport",
    "ModelReport",
    "Report",
    "ScaleHistogram",
    "TensorKind",
    "inspect",
]
