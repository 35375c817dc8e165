"""Models of text and images in mlx-lm: its classes of the whole drop what is not text, where they know its names.

Source: mlx-lm 0.32, mlx_lm/models/gemma3.py, mistral3.py, qwen2_vl.py and qwen3_vl.py, Model.sanitize. Its modules are
those of its class of the decoder, under language_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qalora.checkpoint import Checkpoint, Wrapper
from qalora.converters.wrapping import kind_of, names_at, whole_config

__all__ = ["carries", "module_path", "modules_here", "whole_mlx_config", "wrapped_for_mlx"]

INSIDE = "language_model."


def _at_a_place(wrapper: Wrapper) -> Wrapper | None:
    """The wrapper with names that mlx-lm takes, its own if they are among those; None where it has no such."""
    places = {names_at(place): drops for place, drops in kind_of(wrapper).mlx}
    own = [wrapper.names] if wrapper.names in places else []
    for names in (*own, *places):
        if all(name.startswith(places[names]) for name in wrapper.carried):
            return replace(wrapper, names=names)
    return None


def carries(wrapper: Wrapper) -> bool:
    """Whether mlx-lm opens the whole; MLX has no float64."""
    wide = any(lazy.dtype is torch.float64 for lazy in wrapper.carried.values())
    return not wide and _at_a_place(wrapper) is not None


def wrapped_for_mlx(model: Checkpoint) -> Checkpoint:
    """The model with names of tensors on disk that mlx-lm takes."""
    return model if model.wrapper is None else replace(model, wrapper=_at_a_place(model.wrapper))


def module_path(model: Checkpoint, module: str) -> str:
    """Where mlx-lm has a module."""
    return module if model.wrapper is None else INSIDE + module


def modules_here(settings: Mapping[str, Any], wrapper: Wrapper | None) -> dict[str, Any]:
    """`quantization` of a folder, with the names of modules here."""
    return dict(settings) if wrapper is None else {key.removeprefix(INSIDE): value for key, value in settings.items()}


def whole_mlx_config(model: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the whole model, with every number of its decoder where mlx-lm looks for it."""
    if model.wrapper is None:
        return dict(config)
    outside = {key: config[key] for key in kind_of(model.wrapper).mlx_keys if key in config}
    return {**whole_config(model, config, full=True), **outside}
