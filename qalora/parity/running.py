"""Run an artefact in its runtimes: the same tokens whole, one at a time, and in a batch; then measure and judge.

A runtime that is not installed, or whose artefact needs more memory than there is, leaves it "not proven"; one that
refuses it fails it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.devices import CPU
from qalora.errors import FormatError, MissingLibraryError
from qalora.parity.artifacts import Artifact, memory_needed, runtimes_of, takes
from qalora.parity.baseline import Baseline
from qalora.parity.ends import EndDifferences
from qalora.parity.evidence import Evidence, Generation, TokenizerFindings
from qalora.parity.gates import judge, refused, unproven
from qalora.parity.layerwise import LAYER_TOKENS, LayerError, compare_layers, first_fault
from qalora.parity.memory import resident_memory
from qalora.parity.metrics import LogitMetrics, TokenMetrics, concatenate, lost, squared_distance, summarize
from qalora.parity.metrics import token_metrics as compare_tokens
from qalora.parity.models import FOLDED, Contents, ReferenceModels
from qalora.parity.noise import Noise
from qalora.parity.reference import Forward
from qalora.parity.report import ByToken, RunReport, Speed
from qalora.parity.roundings import EXACT, Rounding, running_sum
from qalora.parity.runtimes import RUNTIMES, Runtime, RuntimeInfo, open_runtime
from qalora.parity.weights import WeightMetrics

__all__ = ["Runner", "rounding_of"]

STEPS = 32
"""Tokens of the first window that each runtime computes one at a time as well."""

BATCH = ((1, 32), (3, 23), (5, 12))
"""Parts of the first window that make a batch of several lengths, each after the window's first token: a word in the
place of BOS gets activations, and with them rounding, of a size that no token has in use."""

SAMPLED = 300
"""Logits of the first window that the report keeps for a plot."""

NO_CUDA = "Cuda interface not available"
"""What onnxruntime-genai says of a folder that is made for CUDA, where there is none."""

OF_LOGITS = ("logits", "kernel rounding", "activation rounding", "top-1", "adapter")
"""Gates whose failure asks for the layer at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Runs artefacts in their runtimes, one at a time.

    generate  tokens to continue each prompt by, 0 for none; memory: bytes that there are; device: the reference's
    tick      called after each window
    floats    the reference, where `models` and `baseline` are an artefact's own: see `for_integers`
    """

    baseline: Baseline
    models: ReferenceModels
    generate: int
    threads: int | None
    memory: int
    device: torch.device = CPU
    tick: Callable[[], None] = lambda: None
    floats: Baseline | None = None

    def for_integers(self, checkpoint: Checkpoint, folder: Path) -> Runner:
        """Of an artefact that holds a float model in integers, a runner whose baseline computes with its own weights.

        A runtime is right if it computes what those give, with the rounding that its kernels have for integers; how far
        that is from the float model is the quantization's doing, and has no bound that could be derived. `folder` is
        made, and used for the baseline's files. Any other artefact's runner is this one.
        """
        models = self.models
        if models.adapter is not None or models.base.quantized or not checkpoint.quantized:
            return self
        own = replace(models, base=checkpoint, folded=checkpoint)
        folder.mkdir()
        baseline = Baseline.of(own, self.baseline.inputs, folder, memory=self.memory, device=self.device)
        return replace(self, models=own, baseline=baseline, floats=self.baseline)

    def of_reference(self) -> tuple[RunReport, ...]:
        """The reference in its own runtime, against what we read of it; nothing where it has none but ours.

        What is judged here is our reading: where it is wrong, every artefact may be wrong in the same way, and agree.
        """
        own = self.models.own
        if own is None:
            return ()
        runner = replace(self, models=self.models.alone, baseline=self.baseline.alone(), generate=0)
        return (runner._run(runtimes_of(own)[0], own, FOLDED, WeightMetrics.nothing()),)

    def runs(self, artifact: Artifact, contents: Contents, weights: WeightMetrics) -> tuple[RunReport, ...]:
        """Every run of one artefact: in the runtimes that prove it, then in those that only generate, if installed."""
        done = [self._run(kind, artifact, contents, weights) for kind in runtimes_of(artifact)]
        logits = done[0].own or done[0].logits
        if self.generate and logits is not None and artifact.path.parent.name != "portable":
            for kind in (one for one in artifact.layout.generators if takes(one, artifact)):
                run = self._generator(kind, artifact, contents, logits.max)
                done += [] if run is None else [run]
        return tuple(done)

    def dynamic_int8(self) -> RunReport:
        """PyTorch's dynamic INT8 of the model that the artefacts hold, to compare with: measured and not judged.

        Raises InputError where torch no longer has it.
        """
        from qalora.parity.runtimes.torch_int8 import open_artifact

        expected = self.models.usual
        model = self.models.base if self.models.folded is None else self.models.folded
        with closing(open_artifact(model, self.threads)) as runtime:
            passes = self._whole(runtime, expected, expected)
            _, steps = _through_the_cache(runtime, self.baseline.logit_cache.windows[0][:STEPS], passes.first)
        adapted = self.models.adapter is not None
        return RunReport(
            kind="dynamic INT8",
            runtime=runtime.info,
            rounding="none",
            logits=summarize(passes.plain),
            lost=lost(passes.from_adapted, self.baseline.effect) if adapted else None,
            lost_unrounded=lost(passes.from_side, self.baseline.side_effect) if adapted else None,
            speed=Speed(prefill=passes.fastest, steps=steps, reference=self.baseline.speed, memory=None),
        )

    def _run(self, kind: str, artifact: Artifact, contents: Contents, weights: WeightMetrics) -> RunReport:
        needed = memory_needed(artifact)
        if needed > self.memory:
            reason = f"it needs about {needed / 1e9:.1f} GB of memory, and there are {self.memory / 1e9:.1f}"
            return RunReport(kind=kind, runtime=None, rounding="none", gates=(unproven("memory", reason),))
        before = resident_memory()
        try:
            runtime = open_runtime(kind, artifact.path, threads=self.threads, lora=artifact.lora)
        except MissingLibraryError as error:
            return RunReport(kind=kind, runtime=None, rounding="none", gates=(unproven("runtime", str(error)),))
        except FormatError as error:
            return RunReport(kind=kind, runtime=None, rounding="none", gates=(refused("runtime", str(error)),))
        with closing(runtime):
            rounding = rounding_of(artifact, runtime.info)
            try:
                report = self._measure(kind, runtime, rounding, self.models.expected(contents), weights)
            except FormatError as error:  # a runtime that opens a graph, and then does not run it
                return RunReport(kind=kind, runtime=None, rounding="none", gates=(refused("runtime", str(error)),))
            after = resident_memory()
        if not RUNTIMES[kind].judged:
            report = replace(report, gates=(), fault=None)
        speed = report.speed
        if speed is None or before is None or after is None:
            return report
        return replace(report, speed=replace(speed, memory=max(0, after - before)))

    def _noise(self, runtime: Runtime) -> Noise:
        """Float32's own in this runtime."""
        if not getattr(runtime, "running_sums", False):
            return self.baseline.noise
        base = self.models.base
        return self.baseline.noise.scaled(running_sum(max(base.tensors[name].shape[1] for name in base.linears)))

    def _measure(
        self, kind: str, runtime: Runtime, rounding: Rounding, expected: Forward, weights: WeightMetrics
    ) -> RunReport:
        logit_cache, adapted = self.baseline.logit_cache, self.models.adapter is not None
        rounded = replace(expected, rounding=rounding)
        passes = self._whole(runtime, expected, rounded)
        window = logit_cache.windows[0]
        stepwise, steps = _through_the_cache(runtime, window[:STEPS], passes.first)
        logits = summarize(passes.plain)
        evidence = Evidence(
            ends=self._ends(runtime),
            tokenizer=self._tokenizer(runtime),
            rounding=rounding,
            logits=logits,
            modelled=None if passes.modelled is None else summarize(passes.modelled),
            simulated=None if rounding == EXACT else logit_cache.compare(rounded, expected),
            stepwise=stepwise,
            batch=_in_a_batch(runtime, window),
            noise=self._noise(runtime),
            lost=lost(passes.from_adapted, self.baseline.effect) if adapted else None,
            fold_lost=lost(logit_cache.distance(expected, self.models.adapted), self.baseline.effect)
            if adapted
            else 0.0,
            effect_rms=math.sqrt(self.baseline.effect / logit_cache.logit_count),
            generations=self._generations(runtime, expected, logits.max),
        )
        report = _run_report(kind, runtime.info, evidence)
        tokens = window[:LAYER_TOKENS]
        layers = compare_layers(runtime.layers(tokens), logit_cache.reference, expected, rounding, tokens)
        if passes.afar is not None:
            report = replace(report, logits=summarize(passes.afar), own=logits)
        return replace(
            report,
            speed=Speed(prefill=passes.fastest, steps=steps, reference=self.baseline.speed, memory=None),
            lost_unrounded=lost(passes.from_side, self.baseline.side_effect) if adapted else None,
            by_token=ByToken(
                kl=tuple(passes.plain.kl.tolist()), max=tuple(passes.plain.max.tolist()), sample=passes.sample
            ),
            layers=layers,
            fault=_fault(report, layers, weights),
        )

    def _whole(self, runtime: Runtime, expected: Forward, rounded: Forward) -> _Passes:
        """Every window in one pass each, compared with the forwards that it is judged by."""
        logit_cache, models = self.baseline.logit_cache, self.models
        plain, modelled, afar, first = [], [], [], torch.empty(0)
        sample: tuple[tuple[float, float], ...] = ()
        from_adapted = from_side = fastest = 0.0
        for n, window in enumerate(logit_cache.windows):
            began = time.perf_counter()
            y = runtime.logits(window)
            fastest = max(fastest, len(window) / (time.perf_counter() - began))
            if n == 0:
                first, sample = y[:STEPS].clone(), _sample(logit_cache.logits(expected, n), y)
            plain.append(compare_tokens(y, logit_cache.logits(expected, n), window[1:]))
            if rounded != expected:
                modelled.append(compare_tokens(y, logit_cache.logits(rounded, n), window[1:]))
            if self.floats is not None:
                afar.append(compare_tokens(y, self.floats.logit_cache.logits(expected, n), window[1:]))
            if models.adapter is not None:
                from_adapted += squared_distance(y, logit_cache.logits(models.adapted, n))
                from_side += squared_distance(y, logit_cache.logits(Forward(weights="side"), n))
            self.tick()
        return _Passes(
            plain=concatenate(plain),
            modelled=concatenate(modelled) if modelled else None,
            afar=concatenate(afar) if afar else None,
            first=first,
            sample=sample,
            from_adapted=from_adapted,
            from_side=from_side,
            fastest=fastest,
        )

    def _generator(self, kind: str, artifact: Artifact, contents: Contents, max_logit: float) -> RunReport | None:
        """A run that only generates; None where its library is not installed, which leaves nothing unproven."""
        try:
            runtime = open_runtime(kind, artifact.path, threads=self.threads)
        except MissingLibraryError:
            return None
        except FormatError as error:  # it is installed, and does not take the folder: for want of CUDA, or for good
            judged = unproven if NO_CUDA in str(error) else refused
            return RunReport(kind=kind, runtime=None, rounding="none", gates=(judged("runtime", str(error)),))
        with closing(runtime):
            generations = self._generations(runtime, self.models.expected(contents), max_logit)
            evidence = Evidence(generations=generations, ends=self._ends(runtime), tokenizer=self._tokenizer(runtime))
            return _run_report(kind, runtime.info, evidence)

    def _tokenizer(self, runtime: Runtime) -> TokenizerFindings | None:
        """What the runtime's own tokenizer does otherwise; None where it has none, or the reference has none."""
        return self.models.tokenizer.compare_runtime(runtime.words)

    def _ends(self, runtime: Runtime) -> EndDifferences | None:
        """What a runtime ends at otherwise; None where it does not say."""
        ends = runtime.ends()
        return None if ends is None else self.models.ends.compare_runtime(ends)

    def _generations(self, runtime: Runtime, expected: Forward, max_logit: float) -> tuple[Generation, ...]:
        if not self.generate:
            return ()
        return tuple(self._generation(runtime, prompt, expected, max_logit) for prompt in self.baseline.inputs.prompts)

    def _generation(self, runtime: Runtime, prompt: Sequence[int], expected: Forward, max_logit: float) -> Generation:
        """Generate, then let one forward of the reference say where it would have gone another way."""
        inputs = self.baseline.inputs
        tokens = tuple(runtime.generate(prompt, self.generate))
        logits = self.baseline.logit_cache.reference.logits([*prompt, *tokens], expected)
        choices = logits[len(prompt) - 1 : -1] if tokens else logits[:0]
        greedy = choices.argmax(dim=1).tolist()
        divergence = next((n for n, (a, b) in enumerate(zip(tokens, greedy, strict=True)) if a != b), None)
        gap = None
        if divergence is not None:
            row = choices[divergence]
            gap = float(row[greedy[divergence]] - row[tokens[divergence]])
        return Generation(
            tokens=tokens,
            text=None if inputs.decode is None else inputs.decode(list(tokens)),
            divergence=divergence,
            expected=None if divergence is None else greedy[divergence],
            gap=gap,
            max_logit=max_logit,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """What single passes over all windows gave.

    plain, modelled  against the expected forward, and against it with the kernels' rounding; None where they have none
    afar             against the float model that the artefact was quantized from; None where there is none
    first            logits of the first STEPS tokens; sample: for a plot
    from_adapted, from_side   squared distances; fastest: tokens a second
    """

    plain: TokenMetrics
    modelled: TokenMetrics | None
    afar: TokenMetrics | None
    first: Tensor
    sample: tuple[tuple[float, float], ...]
    from_adapted: float
    from_side: float
    fastest: float


def _sample(reference: Tensor, y: Tensor) -> tuple[tuple[float, float], ...]:
    """(reference, artefact) of SAMPLED logits, evenly spread over tokens and vocabulary."""
    at = torch.linspace(0, reference.numel() - 1, min(SAMPLED, reference.numel()), dtype=torch.float64).long()
    return tuple(zip(reference.flatten()[at].tolist(), y.flatten()[at].tolist(), strict=True))


def _through_the_cache(runtime: Runtime, tokens: Sequence[int], whole: Tensor) -> tuple[LogitMetrics, float]:
    """The runtime a token at a time against its own single pass; and its tokens a second."""
    began = time.perf_counter()
    y = runtime.steps(tokens)
    seconds = time.perf_counter() - began
    return summarize(compare_tokens(y, whole, tokens[1:])), len(tokens) / seconds


def _in_a_batch(runtime: Runtime, window: Sequence[int]) -> LogitMetrics:
    """Parts of a window in one batch against the runtime's own pass over each of them."""
    parts = [[window[0], *window[start:stop]] for start, stop in BATCH]
    together = runtime.batch(parts)
    metrics = [compare_tokens(y, runtime.logits(part), part[1:]) for y, part in zip(together, parts, strict=True)]
    return summarize(concatenate(metrics))


def _run_report(kind: str, info: RuntimeInfo, evidence: Evidence) -> RunReport:
    return RunReport(
        kind=kind,
        runtime=info,
        rounding=evidence.rounding.kind,
        logits=evidence.logits,
        modelled=evidence.modelled,
        simulated=evidence.simulated,
        stepwise=evidence.stepwise,
        batch=evidence.batch,
        lost=evidence.lost,
        generations=evidence.generations,
        gates=tuple(judge(evidence)),
    )


def _fault(report: RunReport, layers: Sequence[LayerError], weights: WeightMetrics) -> str | None:
    if not any(result.status == "fail" and result.gate in OF_LOGITS for result in report.gates):
        return None
    return first_fault(layers, weights)


def rounding_of(artifact: Artifact, info: RuntimeInfo) -> Rounding:
    """What the runtime's kernels round, from what it says of itself, or by the artefact's layout."""
    if info.dtype in ("float16", "bfloat16"):
        return Rounding(kind="float16" if info.dtype == "float16" else "bfloat16")
    return artifact.layout.rounding(artifact.path)
