"""OpenVINO by its own calls, with none of our runtime's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qalora.parity.runtimes.settings import keep_settings

__all__ = ["InOpenvino"]


class InOpenvino:
    """An OpenVINO graph on one thread; `longer` lets a call go on from the cache of the one before."""

    def __init__(self, folder: Path) -> None:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        with keep_settings():
            compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
        self.request = compiled.create_infer_request()

    def logits(self, tokens: torch.Tensor, mask: torch.Tensor, *, longer: bool = False) -> np.ndarray:
        if not longer:
            self.request.reset_state()
        new = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), "beam_idx": np.arange(2, dtype=np.int32)}
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - tokens.shape[1] :]
        return self.request.infer({**new, "position_ids": positions.numpy()})["logits"].copy()
