"""Parity: artefacts read back and run in their own runtimes, compared with the model they were made from, and judged.

metrics    on logits, all always computed
weights    codes, scale and min in ULP, floats, config
reference  what base and adapter compute, by code that is not the fold's
gates      the table of bounds, each with its derivation
runtimes   what runs an artefact
report     records, JSON, a table for a terminal
"""

from qalora.parity.report import ParityReport
from qalora.parity.verify import verify

__all__ = ["ParityReport", "verify"]
