"""Our own folder in transformers: `import qalora`, then AutoModelForCausalLM.from_pretrained(folder).

    import qalora
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("folded", dtype="float32")
    model.save_pretrained("copy")                    # the same codes, scales and minima; qalora.load opens it

The layers stay packed in memory (`layers`), and dequantize at every call: this is for evaluation and for LoRA tools,
not for speed. `model.dequantize()` turns them into floats.

Quantizing on the way in is refused (`qalora quantize` does that). Without `import qalora`, transformers does not know
the folder: it warns of an unknown quantization type and fills the layers with random numbers.

PEFT takes the layers for nn.Linear: it puts an ordinary LoRA beside them, in loading and in training. Its QA-LoRA
(`use_qalora`) knows GPTQ layers only, and is ignored here without a word; train with `qalora train`, or ship an adapter
as a plain LoRA (`qalora adapter convert --to plain`), which PEFT then applies exactly. PEFT's
merge is refused: it would be lost in a copy of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qalora.converters.families.wrappers import WRAPPERS
from qalora.converters.native import StoredModule, check_version, stored_modules
from qalora.errors import FormatError, InputError
from qalora.formats.safetensors import read_header
from qalora.integrations.layers import QuantizedEmbedding, QuantizedLinear, TiedHead

__all__ = ["QaloraConfig", "QaloraQuantizer", "register"]

METHOD = "qalora"


def register() -> None:
    """Make transformers know our folders; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QaloraConfig)
        register_quantizer(METHOD)(QaloraQuantizer)


class QaloraConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of our folder, as `qalora.converters.native` describes it, kept as it is."""

    def __init__(
        self,
        version: int | None = None,
        bits: int = 4,
        group_size: int = 32,
        zero: int | None = None,
        modules: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version, self.bits, self.group_size, self.zero = version, bits, group_size, zero
        self.modules = dict(modules or {})


class QaloraQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the modules whose codes the checkpoint holds, before transformers fills them by name."""

    requires_calibration = True  # transformers' word for: cannot quantize while it loads

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        stored = {}
        with torch.device("cpu"):  # transformers builds the model on the meta device
            for file in checkpoint_files or ():
                stored.update({name: (Path(file), entry) for name, entry in read_header(Path(file)).entries.items()})
        where = Path(checkpoint_files[0]).parent if checkpoint_files else METHOD
        layout = self.quantization_config.to_dict()
        check_version(layout, where)
        modules = stored_modules(where, stored, layout)
        if not modules:
            raise FormatError(f"{where}", expected="tensors named <module>.codes", got="none")
        for name, module in modules.items():
            _replace(model, _path(model, name), module, dtype or torch.float32, where)
        return model

    def is_serializable(self) -> bool:
        """Whether save_pretrained writes it back: yes, as our own folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters beside it can be trained: yes, the input's gradient goes through."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear | TiedHead):
                model.set_submodule(path, _float_linear(module, kind))
        embedding = model.get_input_embeddings()
        if isinstance(embedding, QuantizedEmbedding):
            factor = () if embedding.factor is None else (embedding.factor,)
            sizes = embedding.num_embeddings, embedding.embedding_dim
            embedding_layer = embedding.float_class(*sizes, embedding.padding_idx, *factor)
            embedding_layer.weight = nn.Parameter(embedding.plain_weight().to(kind), requires_grad=False)
            model.set_input_embeddings(embedding_layer)
        for parameter in model.parameters():  # norms and biases too; buffers, such as the rotation's, stay
            parameter.data = parameter.data.to(kind)
        return model


def _float_linear(module: QuantizedLinear | TiedHead, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(module.plain_weight().to(dtype), requires_grad=False)
    linear.bias = module.bias
    return linear


def _path(model: Any, name: str) -> str:
    """Where a module is in transformers' model; in one of text and images its name in the files may be another."""
    kind = WRAPPERS.get(model.config.model_type)
    if kind is None:
        return name
    for begin, head in kind.places:
        if name.startswith(tuple(begin + part for part in ("layers.", "embed_tokens"))):
            return f"{kind.inside}.{name.removeprefix(begin)}"
        if f"{name}." == head:
            return "lm_head"
    return name


def _replace(model: Any, path: str, module: StoredModule, dtype: torch.dtype, where: object) -> None:
    try:
        old = model.get_submodule(path)
    except AttributeError as error:
        architecture = type(model).__name__
        raise FormatError(f"{where}: {path}", expected=f"a module of {architecture}", got="none") from error
    shape = tuple(old.weight.shape) if isinstance(getattr(old, "weight", None), torch.Tensor) else None
    if shape != module.shape:
        raise FormatError(f"{where}: {path}", expected=f"shape {shape}, as config.json says", got=str(module.shape))
    parts = {name: (entry.dtype, entry.shape) for name, (_, entry) in module.parts.items()}
    if isinstance(old, nn.Linear):
        model.set_submodule(path, QuantizedLinear(parts, module.bits, module.zero, old.bias))
    elif type(old) is nn.Embedding or isinstance(getattr(old, "scalar_embed_scale", None), float):
        factor = getattr(old, "scalar_embed_scale", None)
        replacement = QuantizedEmbedding(parts, module.bits, module.zero, old.padding_idx, dtype, factor)
        replacement.float_class = type(old)
        _replace_embedding(model, path, replacement)
    else:
        raise InputError(
            f"{where}: {path}: a quantized {type(old).__name__} cannot be held packed",
            todo="export it to another format, or keep the embedding in floats",
        )


def _replace_embedding(model: Any, path: str, embedding: QuantizedEmbedding) -> None:
    """Put it in, and the output layer beside it where the two are tied."""
    model.set_submodule(path, embedding)
    tied: Mapping[str, str] = dict(model.all_tied_weights_keys)
    for target, source in tied.items():
        if source == f"{path}.weight":
            model.set_submodule(target.removesuffix(".weight"), TiedHead(embedding))
            del model.all_tied_weights_keys[target]


register()  # where this module is imported first, the registry cannot call it yet
