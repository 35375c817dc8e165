"""What an adapter's file brings beside A and B, held against what its config says is trained, and against the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qalora.adapter.keys import EMBEDDINGS, Keys
from qalora.adapter.peft_config import PeftConfig
from qalora.adapter.records import Adapter
from qalora.adapter.saved import TOKENIZER, Rows, SavedTensors, carry
from qalora.checkpoint import LazyTensor, module_of
from qalora.errors import AdapterError
from qalora.formats.files import check_content, contained
from qalora.formats.safetensors import Entry, load_tensor
from qalora.tensor import check_finite

if TYPE_CHECKING:
    from qalora.checkpoint import Checkpoint

__all__ = ["check_names", "check_saved", "saved_tensors"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEMPLATES = "additional_chat_templates"


def check_names(config: PeftConfig, keys: Keys, where: str) -> None:
    """AdapterError where an expression for ranks or alphas decides otherwise of a module as it was wrapped."""
    for module, wrapped in keys.wrapped.items():
        if wrapped != module and (
            config.rank_of(module) != config.rank_of(wrapped) or config.alpha_of(module) != config.alpha_of(wrapped)
        ):
            raise AdapterError(
                f"{where}: rank_pattern and alpha_pattern of {wrapped}",
                expected=f"the values of {module}, which is the model's name for it",
                got="different values",
                todo="save the adapter from the model by itself, without a wrapper",
            )


def saved_tensors(
    folder: Path, weights: Path, config: PeftConfig, keys: Keys, entries: Mapping[str, Entry]
) -> SavedTensors | None:
    """The tensors of the base that a file brings, and the tokenizer beside it; None where there are none.

    AdapterError for one that the config does not say is trained, and for rows whose numbers it does not say.
    """
    if not keys.whole and not keys.rows:
        return None
    for name in keys.whole:
        if not _is_saved(name, config):
            raise AdapterError(
                f"{weights}: tensor {keys.whole[name]!r}",
                expected="lora_A, lora_B, or what modules_to_save or bias says is trained",
                got=f"modules_to_save {list(config.modules_to_save)} and bias {config.bias!r}",
                todo="only LoRA and QA-LoRA of linear layers, and tensors of the base that were trained whole, are "
                "supported",
            )
    whole = {name: _lazy(name, weights, entries[key]) for name, key in keys.whole.items()}
    rows = {}
    for name, key in keys.rows.items():
        indices = _indices(name, config, weights)
        rows[name] = Rows(indices=indices, values=_lazy(name, weights, entries[key]))
    copies = frozenset(name for name in whole if _matches(name, config.modules_to_save))
    return SavedTensors(whole=whole, rows=rows, copies=copies, files=_tokenizer(folder), config=config.saving)


def check_saved(config: PeftConfig, saved: SavedTensors, model: Checkpoint, where: str) -> None:
    """AdapterError for tensors that do not fit the model; and for modules that were trained whole and are not there."""
    carry(model, Adapter(layers={}, convention="paper", saved=saved))
    for module in config.modules_to_save:
        matches = [name for name in (*model.tensors, "lm_head.weight") if _matches(name, (module,))]
        missing = [name for name in matches if name not in saved.whole]
        if missing:
            raise AdapterError(
                f"{where}: modules_to_save {module!r}",
                expected=f"a tensor {missing[0]} in its file",
                got="none",
                todo="save the adapter again: what was trained is not there",
            )


def _is_saved(name: str, config: PeftConfig) -> bool:
    """Whether the config says that a tensor of the base is trained, or it is one that PEFT saves with a vocabulary."""
    module, _, part = name.rpartition(".")
    return module in EMBEDDINGS or (part == "bias" and config.bias != "none") or _matches(name, config.modules_to_save)


def _matches(name: str, ends: tuple[str, ...]) -> bool:
    """Whether a module that holds the tensor ends as PEFT looks for it, by the text alone."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(path.endswith(end) for path in paths for end in ends)


def _indices(name: str, config: PeftConfig, weights: Path) -> tuple[int, ...]:
    module = module_of(name)
    entries = [ids for end, ids in config.token_indices.items() if module == end or module.endswith(f".{end}")]
    if len(entries) != 1:
        raise AdapterError(
            f"{weights}: rows of {name}",
            expected="trainable_token_indices with their numbers",
            got="none for it" if not entries else f"{len(entries)} entries for it",
        )
    return entries[0]


def _lazy(name: str, path: Path, entry: Entry) -> LazyTensor:
    if entry.dtype not in DTYPES or 0 in entry.shape or not entry.shape:
        raise AdapterError(
            f"{path}: {name}", expected="float32, float16 or bfloat16 values", got=f"{entry.dtype} {list(entry.shape)}"
        )

    def read(start: int, stop: int) -> Tensor:
        values = load_tensor(path, entry, start, stop)
        check_finite(name, values)
        return values

    return LazyTensor(name=name, shape=entry.shape, dtype=entry.dtype, read=read)


def _tokenizer(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer in an adapter's folder; none where there is no vocabulary among them."""
    templates = [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    files = {name: contained(folder, name) for name in (*TOKENIZER, *templates) if (folder / name).exists()}
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & files.keys():
        return {}
    for path in files.values():
        check_content(path)
    return files
