"""Models of text and images, or of audio, around a decoder of a family here: what their files have around it.

A wrapper is data, and a line in `_ALL`. Its decoder is read, quantized, trained and exported as any other; every other
tensor is carried along as it is (`qalora.converters.wrapping`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["WRAPPERS", "Decoding", "WrapperKind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """The decoder in a wrapper.

    model_type  what text_config calls it
    family      the family that it is one of: `FAMILIES` has it
    defaults    what transformers' class of it takes for a key that text_config leaves out, where the family's class
                takes something else
    """

    model_type: str
    family: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperKind:
    """One kind of model around a decoder.

    model_type  transformers' config.model_type of the whole
    decoders    those that it may hold; the first is what a text_config without model_type means
    places      what names of the decoder's tensors begin with on disk, by the versions of transformers: that of the
                layers, the embedding and the last norm, here "model."; and that of an output layer, here "lm_head."
    inside      where transformers' class of the whole has the decoder
    tied        whether the output layer is the embedding where config.json does not say
    flat        config.json may have the decoder's keys outside, and no text_config
    mlx         a place that mlx-lm's class of the whole takes, and what names begin with that it drops then; none where
                it has no such class
    mlx_keys    keys of the decoder that it looks for outside
    gguf        the architecture that llama.cpp wants of a text model beside images, where that is not the family's
    """

    model_type: str
    decoders: tuple[Decoding, ...]
    places: tuple[tuple[str, str], ...]
    inside: str = "model.language_model"
    tied: bool = False
    flat: bool = False
    mlx: tuple[tuple[tuple[str, str], tuple[str, ...]], ...] = ()
    mlx_keys: tuple[str, ...] = ()
    gguf: str = ""


_INSIDE = ("language_model.model.", "language_model.lm_head.")
_BESIDE = ("model.language_model.", "lm_head.")
_PLAIN = ("model.", "lm_head.")
_TOWER = ("vision_tower.", "multi_modal_projector.")
_VISUAL = ("visual.", "vision_tower.")

_ALL = (
    WrapperKind(
        model_type="gemma3",
        decoders=(Decoding(model_type="gemma3_text", family="gemma3_text"),),
        places=(_INSIDE, _BESIDE),
        tied=True,
        mlx=((_INSIDE, _TOWER),),
        mlx_keys=("vocab_size",),
    ),
    WrapperKind(
        model_type="mistral3",
        decoders=(
            Decoding(model_type="mistral", family="mistral"),
            Decoding(model_type="ministral3", family="ministral3"),
        ),
        places=(_INSIDE, _BESIDE),
        tied=True,
        mlx=((_INSIDE, _TOWER), (_BESIDE, (*_TOWER, "model.vision_tower.", "model.multi_modal_projector."))),
    ),
    WrapperKind(
        model_type="smolvlm",
        decoders=(Decoding(model_type="llama", family="llama"),),
        places=(("model.text_model.", "lm_head."),),
        inside="model.text_model",
    ),
    WrapperKind(
        model_type="qwen2_5_vl",
        decoders=(
            Decoding(
                model_type="qwen2_5_vl_text",
                family="qwen2",
                defaults={
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 1e6,
                    "num_key_value_heads": 8,
                    "max_window_layers": 80,
                    "max_position_embeddings": 32768,
                },
            ),
        ),
        places=(_PLAIN, _BESIDE),
        flat=True,
        mlx=((_PLAIN, _VISUAL), (_BESIDE, (*_VISUAL, "model."))),
        gguf="qwen2vl",
    ),
    WrapperKind(
        model_type="qwen3_vl",
        decoders=(
            Decoding(
                model_type="qwen3_vl_text",
                family="qwen3",
                defaults={"rope_theta": 5e5, "vocab_size": 151936, "max_position_embeddings": 128000},
            ),
        ),
        places=(_BESIDE,),
        mlx=((_BESIDE, (*_VISUAL, "model.")),),
        gguf="qwen3vl",
    ),
)

WRAPPERS: dict[str, WrapperKind] = {kind.model_type: kind for kind in _ALL}
"""Each kind of wrapper by transformers' config.model_type."""
