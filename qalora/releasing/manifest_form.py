"""The form of manifest.json, for `qalora.releasing.shape`; what it means stands in `qalora.releasing.manifest`."""

from __future__ import annotations

import re

__all__ = ["MANIFEST_FORM"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FILE = {"bytes": int, "sha256": _DIGEST}
_LOSS = {"name": str, "size": str}
_TENSOR = {
    "name": str,
    "carrier": str,
    "file": str,
    "offset": int,
    "bytes": int,
    "loss": (_LOSS, None),
    "sha256": _DIGEST,
}
_ARTIFACT = {
    "target": str,
    "folder": str,
    "bytes": int,
    "bits_per_weight": float,
    "longest": (int, None),
    "notes": [str],
    "files": {str: _FILE},
    "tensors": [_TENSOR],
}
_BASE = {
    "name": str,
    "source": (str, None),
    "license": (str, None),
    "layout": str,
    "parameters": int,
    "digest": _DIGEST,
    "config": _DIGEST,
    "files": {str: _DIGEST},
    "tensors": {str: dict},
}
_ADAPTER = {
    "digest": _DIGEST,
    "convention": str,
    "minima": (str, None),
    "layers": {str: {"rank": int, "pool_size": int, "factor": float, "a": _DIGEST, "b": _DIGEST}},
    "saved": {str: _DIGEST},
}
_OPTIONS = {
    "targets": [str],
    "convention": (str, None),
    "minima": (str, None),
    "allow_loss": [str],
    "lora_slots": [str],
    "name": (str, None),
    "gptq_form": str,
    "gguf_form": str,
    "accuracy_level": int,
    "onnx_embedding": str,
    "max_shard_size": int,
    "split_max_size": (int, None),
    "level": str,
    "max_tokens": int,
    "generate": int,
    "threads": (int, None),
    "dynamic_int8": bool,
    "prompts": [str],
    "text": (_DIGEST, None),
    "with_adapter": bool,
    "card": dict,
    "template": (_DIGEST, None),
}
MANIFEST_FORM = {
    "schema": str,
    "name": str,
    "created": (str, None),
    "versions": {str: str},
    "base": _BASE,
    "adapter": (_ADAPTER, None),
    "options": _OPTIONS,
    "artifacts": [_ARTIFACT],
    "gates": [{"at": str, "gate": str, "status": str}],
    "passed": bool,
    "licences": [str],
}
