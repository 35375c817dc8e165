"""What a runtime is given in a batch."""

from collections.abc import Sequence

from torch import Tensor

from qalora.checkpoint import Checkpoint
from qalora.parity.running import BATCH, _in_a_batch
from qalora.parity.runtimes.torch import open_artifact


def test_each_sequence_of_a_batch_begins_as_the_window_does(base: Checkpoint) -> None:
    """SmolLM2 in GPTQModel's kernel: seven tokens from amid the text were off by 0.067 (RMS), after BOS by 0.005."""
    runtime = open_artifact(base, None)
    given: list[list[int]] = []
    batch = runtime.batch

    def watched(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        given.extend([list(sequence) for sequence in sequences])
        return batch(sequences)

    runtime.batch = watched
    window = list(range(7, 47))
    found = _in_a_batch(runtime, window)
    assert [sequence[0] for sequence in given] == [7] * len(BATCH)
    assert [sequence[1:] for sequence in given] == [window[start:stop] for start, stop in BATCH]
    assert found.tokens == sum(map(len, given))
