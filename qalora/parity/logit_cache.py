"""Logits of the reference, computed once for each forward that is asked for, and kept in temporary files.

A window's logits are as large as tokens x vocabulary x 4 bytes; several forwards over a long text would not fit in
memory, and recomputing them for every artefact would take as long as the artefacts themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qalora.parity.metrics import LogitMetrics, concatenate, squared_distance, summarize, token_metrics
from qalora.parity.noise import NOISE_FLOOR, Noise
from qalora.parity.reference import Forward, Reference

__all__ = ["LogitCache"]

BATCH_LOGITS = 1 << 26
"""Logits that are computed in one batch at most: 256 MiB."""


class LogitCache:
    """The reference's logits over windows of tokens, by forward and window.

    folder is the caller's, and temporary; tick is called whenever a window has been computed.
    """

    def __init__(
        self,
        reference: Reference,
        windows: Sequence[Sequence[int]],
        folder: Path,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.reference = reference
        self.windows = windows
        self._folder = folder
        self._tick = tick
        self._files: dict[tuple[Forward, int], tuple[Path, tuple[int, ...]]] = {}

    def logits(self, forward: Forward, window: int) -> Tensor:
        """float32 [tokens of the window, vocabulary]; computed at the first call, read from the file at every other."""
        key = (forward, window)
        if key in self._files:
            path, shape = self._files[key]
            return torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(shape)
        together = self.together(window)
        batch = self.reference.batch([self.windows[n] for n in together], forward)
        for n, logits in zip(together, batch, strict=True):
            path = self._folder / f"{len(self._files)}.logits"
            path.write_bytes(logits.contiguous().view(torch.uint8).numpy().data)
            self._files[forward, n] = path, tuple(logits.shape)
            self._tick()
        return batch[together.index(window)]

    def together(self, window: int) -> range:
        """The windows that are computed in one batch with this one."""
        longest = max(len(tokens) for tokens in self.windows)
        size = max(1, BATCH_LOGITS // (longest * self.reference.vocabulary))
        first = window // size * size
        return range(first, min(first + size, len(self.windows)))

    def distance(self, a: Forward, b: Forward) -> float:
        """Sum of squared differences of two forwards over all windows."""
        if a == b:
            return 0.0
        return sum(squared_distance(self.logits(a, n), self.logits(b, n)) for n in range(len(self.windows)))

    def compare(self, a: Forward, b: Forward) -> LogitMetrics:
        """The metrics of forward `a` against forward `b`."""
        return summarize(
            concatenate(
                [
                    token_metrics(self.logits(a, n), self.logits(b, n), window[1:])
                    for n, window in enumerate(self.windows)
                ]
            )
        )

    def noise(self, forward: Forward) -> Noise:
        """Float32's own noise over the very same tokens: the forward against itself summed in another order."""
        metrics = self.compare(replace(forward, permuted=True), forward)
        largest = max(float(self.logits(forward, n).abs().max()) for n in range(len(self.windows)))
        return Noise(max=metrics.max, rms=metrics.rms, floor=NOISE_FLOOR * largest)

    @property
    def logit_count(self) -> int:
        """Tokens x vocabulary over all windows."""
        width = next(iter(self._files.values()))[1][1]
        return width * sum(len(window) for window in self.windows)
