"""What is compared: base, adapter, folded model; and what an artefact that holds one of them should compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qalora.adapter import Adapter, carry
from qalora.checkpoint import Checkpoint, with_cached_weights, with_last_weight
from qalora.errors import InputError
from qalora.parity.artifacts import Artifact, reference_artifact
from qalora.parity.ends import EndsCheck
from qalora.parity.reference import Forward
from qalora.parity.tokenizers import TokenizerCheck

__all__ = ["BESIDE", "FOLDED", "Contents", "ReferenceModels", "holds"]

Contents = Literal["folded", "base and adapter"]
FOLDED: Contents = "folded"
BESIDE: Contents = "base and adapter"


def holds(adapter: Adapter | None, artifact: Artifact, checkpoint: Checkpoint) -> Contents:
    """FOLDED or BESIDE, by what the artefact's reader says lies beside the weights and is no part of them.

    InputError for a GGUF LoRA beside a model, where no adapter is expected.
    """
    if artifact.lora is not None:
        if adapter is None:
            raise InputError(
                f"{artifact.lora} is an adapter beside the model", todo="give it as `adapter`, or remove it"
            )
        return BESIDE
    return BESIDE if adapter is not None and checkpoint.beside is not None else FOLDED


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModels:
    """base: the reference, with what the adapter brings whole; own: its own file or folder, None where no runtime but
    ours opens one; tokenizer, ends: its own; minima: the dtype of those of `folded`, which is base and adapter,
    and None where no artefact is to hold that.
    """

    base: Checkpoint
    own: Artifact | None
    folded: Checkpoint | None
    adapter: Adapter | None
    minima: Literal["float16", "float32"]
    tokenizer: TokenizerCheck
    ends: EndsCheck

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        adapter: Adapter | None,
        minima: Literal["float16", "float32"] | None,
        contents: Sequence[Contents],
        *,
        memory: int,
    ) -> ReferenceModels:
        """The reference, with the adapter folded if one of the artefacts holds the folded model.

        memory  bytes that there are: weights that fit into a quarter of it are read once; of others, where there is an
                adapter, the last one is kept, and so it is of the folded ones: all is asked of it in one go
        """
        carried = carry(base, adapter)
        base, own = with_cached_weights(carried, memory // 4), reference_artifact(carried)
        if base is carried and adapter is not None:
            base = with_last_weight(carried)
        dtype = minima or (adapter.minima if adapter is not None else None) or "float16"
        folded = base if adapter is None else None
        if adapter is not None and FOLDED in contents:
            from qalora.folding import fold

            folded = with_last_weight(fold(base, adapter, minima=dtype))
        return cls(
            base=base,
            own=own,
            folded=folded,
            adapter=adapter,
            minima=dtype,
            tokenizer=TokenizerCheck(base),
            ends=EndsCheck(base),
        )

    @property
    def trained_minima(self) -> Literal["float16", "float32"]:
        """The dtype of the minima that the adapter was trained with; float32 where it does not say."""
        return "float32" if self.adapter is None else self.adapter.minima or "float32"

    @property
    def alone(self) -> ReferenceModels:
        """The reference without the adapter."""
        return replace(self, adapter=None, folded=self.base)

    def expected(self, contents: Contents) -> Forward:
        """What an artefact should compute."""
        if self.adapter is None:
            return Forward(weights="base")
        return Forward(weights=self.minima if contents == FOLDED else "side")

    @property
    def usual(self) -> Forward:
        """What the most telling artefact should compute: the folded model, where one is to hold it."""
        return self.expected(BESIDE if self.folded is None else FOLDED)

    @property
    def adapted(self) -> Forward:
        """What the adapter was trained with."""
        if self.adapter is None:
            return Forward(weights="base")
        return Forward(weights=self.adapter.minima or "side")
