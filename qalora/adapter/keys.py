"""Names of an adapter's tensors: what they belong to, whatever the model was wrapped in when the file was written.

    base_model.model.<module>.lora_A.weight                            A, and lora_B: B
    base_model.model.<module>.weight, .bias                            a tensor of the base that was trained whole
    base_model.model.<module>.token_adapter.trainable_tokens_delta     rows of an embedding that were trained

What wrappers put into a name is taken out where it can mean one thing only: PEFT's own prefix, also twice; those of
DistributedDataParallel, FSDP and torch.compile; the place of the decoder in a model of text and images; and none where
the decoder was trained by itself. Source: PEFT 0.21.2, utils/save_and_load.py and utils/other.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qalora.errors import AdapterError

__all__ = ["EMBEDDINGS", "Keys", "plain_name", "sort_keys"]

NAME_LENGTH = 256
PEFT = "base_model.model."

BEFORE = (PEFT, "module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What stands before a name: PEFT, DistributedDataParallel, torch.compile, FSDP."""

INSIDE = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
"""What stands inside one: torch.compile, FSDP, and its checkpoints, of a part of the model."""

DECODERS = (
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("layers.", "model.layers."),
    ("embed_tokens.", "model.embed_tokens."),
)
"""Where the decoder is in a model of text and images, by the versions of transformers; and where it is the model."""

LORA = re.compile(r"(?P<module>[\w.\-]+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
ROWS = re.compile(r"(?P<module>[\w.\-]+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
WHOLE = re.compile(r"(?P<module>[\w.\-]+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.(?P<part>weight|bias)")

UNUSED = re.compile(r"(?P<module>[\w.\-]+?)\.(?:original_module|modules_to_save(?:\.[^.]+)?)\.(?P<part>weight|bias)")
"""What PEFT saves with `save_embedding_layers` beside an embedding that was trained: the base's own, which its forward
does not use, and the trained one under a second name, which its loader passes over."""

EMBEDDINGS = ("model.embed_tokens", "lm_head")

OTHER = {
    "lora_embedding_": "a LoRA of an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "a bias in lora_B",
    "original_module": "the base's own module beside the one that was trained",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "ia3_": "IA3",
    "vera_": "VeRA",
    "prompt_": "a prompt",
}
"""Parts of names, and what they tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The names in a file, sorted.

    pairs    {module: {"A" or "B": name}}
    whole    {tensor of the base: name}
    rows     {tensor of the base: name}, of which some rows are there
    wrapped  {module: what the file calls it}, as PEFT matched its expressions with
    """

    pairs: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    wrapped: Mapping[str, str] = field(default_factory=dict)


def plain_name(name: str) -> str:
    """A tensor's name in a model by itself, as transformers has it."""
    before = ""
    while name != before:
        before = name
        for prefix in BEFORE:
            name = name.removeprefix(prefix)
    name = INSIDE.sub("", name)
    for prefix, ours in DECODERS:
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def sort_keys(names: Collection[str], where: str) -> Keys:
    """Sort the names of a file; AdapterError for one that is none of these, or means the same as another."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    rows: dict[str, str] = {}
    wrapped: dict[str, str] = {}
    trained = set(map(plain_name, names))
    for name in names:
        plain = plain_name(name)
        lora, of_rows, of_whole = (form.fullmatch(plain) for form in (LORA, ROWS, WHOLE))
        if len(name) > NAME_LENGTH:
            raise _refused(name, where)
        if lora is not None:
            place, key = pairs.setdefault(lora["module"], {}), lora["part"]
            wrapped[lora["module"]] = name.removeprefix(PEFT).rpartition(".lora_")[0]
        elif of_rows is not None:
            place, key = rows, f"{of_rows['module']}.weight"
        elif UNUSED.fullmatch(plain) is not None and UNUSED.sub(r"\g<module>.\g<part>", plain) in trained:
            continue
        elif of_whole is not None and not any(part in name for part in ("lora_", *OTHER)):
            place, key = whole, f"{of_whole['module']}.{of_whole['part']}"
        else:
            raise _refused(name, where)
        if key in place:
            raise _refused(name, where, f"it beside {place[key]!r}")
        place[key] = name
    if not pairs:
        raise AdapterError(where, expected="lora_A and lora_B tensors", got="none")
    return Keys(pairs=dict(sorted(pairs.items())), whole=whole, rows=rows, wrapped=wrapped)


def _refused(name: str, where: str, got: str = "") -> AdapterError:
    kind = next((reason for part, reason in OTHER.items() if part in name), "")
    return AdapterError(
        f"{where}: tensor {name[:NAME_LENGTH]!r}",
        expected=f"{PEFT}<module>.lora_A.weight or lora_B.weight, once for each module",
        got=got or kind,
        todo="only LoRA and QA-LoRA of linear layers, and tensors of the base that were trained whole, are supported",
    )
