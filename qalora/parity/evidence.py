"""What is known of an artefact and of its runs: what the gates look at. Nothing is judged here."""

from __future__ import annotations

from dataclasses import dataclass

from qalora.parity.ends import EndDifferences
from qalora.parity.foldcheck import FoldCheck
from qalora.parity.metrics import LogitMetrics
from qalora.parity.noise import Noise
from qalora.parity.roundings import EXACT, Rounding
from qalora.parity.weights import WeightMetrics

__all__ = ["Evidence", "Generation", "TokenizerFindings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Greedy tokens of a runtime, checked by one forward of the reference over prompt and continuation.

    tokens      what the runtime generated
    text        the same, decoded, where there is a tokenizer
    divergence  the first position whose token is not the reference's, None if there is none
    expected    the reference's token there
    gap         how much larger the reference's logit of its own token is there
    max_logit   the artefact's largest logit difference, as measured
    """

    tokens: tuple[int, ...]
    text: str | None
    divergence: int | None
    expected: int | None
    gap: float | None
    max_logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFindings:
    """What a tokenizer does otherwise, in sentences.

    wrong   what is the artefact's fault
    limits  what the runtime cannot do, whatever a file says: spaces where llama.cpp puts them, the rules that
            onnxruntime-genai does not have
    """

    wrong: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one artefact (weights) or one run of it (the rest); None where it was not asked for.

    fold           the fold's check; weights: the artefact's; beside: layers of an unfolded adapter that differ
    tokenizer      what its tokenizer does otherwise; None where one of the two has none
    ends           what it, or its runtime, ends a generation at otherwise
    rounding       what the runtime's kernels round, as the reference models it
    logits         y against the reference
    modelled       y against the reference under `rounding`
    simulated      the reference under `rounding` against the reference
    stepwise       a token at a time through the runtime's cache, against its own single pass
    batch          sequences of several lengths in one batch, against each of them alone
    noise          float32's own
    lost           as `metrics` defines it
    fold_lost      |reference - adapted| / |adapted - base|: what rounding the minima costs; 0 where trained with it
    effect_rms     RMS of adapted - base over tokens x vocabulary
    """

    fold: FoldCheck | None = None
    weights: WeightMetrics | None = None
    beside: tuple[str, ...] | None = None
    tokenizer: TokenizerFindings | None = None
    ends: EndDifferences | None = None
    rounding: Rounding = EXACT
    logits: LogitMetrics | None = None
    modelled: LogitMetrics | None = None
    simulated: LogitMetrics | None = None
    stepwise: LogitMetrics | None = None
    batch: LogitMetrics | None = None
    noise: Noise | None = None
    lost: float | None = None
    fold_lost: float = 0.0
    effect_rms: float = 0.0
    generations: tuple[Generation, ...] = ()
