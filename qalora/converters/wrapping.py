"""Models of text and images: the decoder taken out of what is around it, and put back.

Reading gives the decoder's config and tensors as if it were a model of its own, and a `Wrapper` with everything else.
A target of the whole model writes the decoder's tensors under the wrapper's names again, its config as text_config, and
the other tensors byte for byte; a target of text alone leaves them out, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora.checkpoint import Checkpoint, LazyTensor, Wrapper
from qalora.converters.families import FAMILIES, Family
from qalora.converters.families.wrappers import WRAPPERS, Decoding, WrapperKind
from qalora.errors import FormatError, shown
from qalora.formats.files import check_content, contained
from qalora.formats.safetensors import Entry, Part, load_tensor

__all__ = [
    "CARRIED",
    "Opened",
    "around_differences",
    "around_notes",
    "carried_parts",
    "in_transformers",
    "kind_of",
    "names_at",
    "names_on_disk",
    "opened",
    "text_alone",
    "text_settings",
    "whole_config",
]

Stored = Mapping[str, tuple[Path, Entry]]

FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Companion files of a model of text and images, beside those of its decoder."""

CARRIED = "carried along"
"""What the carrier of a tensor ends with that is no part of the decoder."""

_PARTS = ("layers.", "embed_tokens.", "norm.")
_HEAD, _MODEL = "lm_head.", "model."
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TIE = "tie_word_embeddings"
_SHARED_KEYS = (*_TOKEN_KEYS, _TIE, "dtype", "torch_dtype", "vocab_size")
"""Keys outside that hold for the decoder too, where text_config leaves them out."""
_SIZE_KEYS = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
"""Sizes that text_config leaves out where they are those of its class."""
_SECTIONS = "mrope"
_AROUND = ("vision_config", "audio_config", "architectures", "model_type", "quantization_config", "quantization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A folder's decoder: its config, its stored tensors by their names here, and the wrapper; notes."""

    config: dict[str, Any]
    stored: dict[str, tuple[Path, Entry]]
    wrapper: Wrapper | None = None
    notes: tuple[str, ...] = ()

    def keyed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by module as the files call it, with the names here."""
        names = () if self.wrapper is None else self.wrapper.names
        found = {}
        for key, value in settings.items():
            at = next(((disk, here) for disk, here in names if f"{key}.".startswith(disk)), ("", ""))
            found[(at[1] + f"{key}.".removeprefix(at[0])).removesuffix(".") if at[0] else key] = value
        return found


def kind_of(wrapper: Wrapper) -> WrapperKind:
    """The record of a wrapper."""
    return WRAPPERS[wrapper.model_type]


def _kind(config: Mapping[str, Any]) -> WrapperKind | None:
    """The record of a whole model, by its config; None of a decoder alone, and of what is not known."""
    kind = WRAPPERS.get(str(config.get("model_type")))
    inside = isinstance(config.get("text_config"), Mapping)
    return kind if kind is not None and (inside or kind.flat) else None


def opened(folder: Path, config: Mapping[str, Any], stored: Stored, end: str = "") -> Opened:
    """Take the decoder out of a folder's config and stored tensors; they stay as they are where it is one.

    end  what names of tensors of integers end with in the folder's format: there may be none around the decoder

    Raises FormatError for a decoder that is of no family here, for its tensors under two beginnings or under none that
    its kind of model has, and for integers around it.
    """
    kind = _kind(config)
    if kind is None:
        return Opened(config=dict(config), stored=dict(stored))
    text, notes = text_settings(config, kind, folder)
    names = _names(folder, kind, stored)
    own: dict[str, tuple[Path, Entry]] = {}
    carried: dict[str, LazyTensor] = {}
    for name, where in stored.items():
        disk, here = next(((disk, here) for disk, here in names if name.startswith(disk)), ("", ""))
        if disk:
            own[here + name.removeprefix(disk)] = where
            continue
        if name.startswith((_HEAD, *(_MODEL + part for part in _PARTS))):
            expected = f"the decoder's tensors under {names[0][0].removesuffix(_PARTS[0])}"
            raise FormatError(f"{folder}: tensor {name}", expected=expected, got="one beside them")
        if end and name.endswith(end):
            todo = "start from a quantization that leaves what is around the decoder as it was"
            raise FormatError(f"{folder}: tensor {name}", expected="floats around the decoder", got="codes", todo=todo)
        carried[name] = _as_it_is(name, *where)
    files = {name: contained(folder, name) for name in FILES if (folder / name).exists()}
    for path in files.values():
        check_content(path)
    wrapper = Wrapper(
        model_type=kind.model_type, config=dict(config), text=text, names=names, carried=carried, files=files
    )
    said = f"{folder.name}: the decoder of a {kind.model_type}, around which {_counted(carried)} carried along"
    return Opened(config=dict(text), stored=own, wrapper=wrapper, notes=(said, *notes))


def _counted(carried: Mapping[str, LazyTensor]) -> str:
    """How many, and what they belong to."""
    stems = dict.fromkeys(name.removeprefix(_MODEL).partition(".")[0] for name in carried)
    listed = ", ".join(f"{stem:.40}" if stem.isidentifier() else f"{stem!r:.40}" for stem in [*stems][:3])
    more = f" and {len(stems) - 3} more" if len(stems) > 3 else ""
    return f"{len(carried)} tensors ({listed}{more}) are"


def _as_it_is(name: str, path: Path, entry: Entry) -> LazyTensor:
    """A tensor that nothing computes with, so that its values are not looked at."""

    def read_rows(start: int, stop: int) -> Tensor:
        return load_tensor(path, entry, start, stop)

    return LazyTensor(
        name=name, shape=entry.shape, dtype=entry.dtype, nbytes=entry.nbytes, by_rows=True, read=read_rows
    )


def _names(folder: Path, kind: WrapperKind, stored: Stored) -> tuple[tuple[str, str], ...]:
    """(beginning on disk, beginning here) of the decoder's tensors; FormatError where they have none, or two."""
    places = kind.places
    there = [place for place in places if any(name.startswith(place[0] + _PARTS[0]) for name in stored)]
    if len(there) != 1:
        known = " or ".join(f"{place[0]}{_PARTS[0]}" for place in places)
        got = " and ".join(f"{place[0]}{_PARTS[0]}" for place in there) or "none"
        raise FormatError(f"{folder}: names of the decoder's tensors", expected=f"all with {known}", got=got)
    begin, head = there[0]
    heads = [one for one in dict.fromkeys((head, _HEAD, *(other for _, other in places))) if f"{one}weight" in stored]
    if len(heads) > 1:
        raise FormatError(f"{folder}: tensor {heads[1]}weight: a second tensor with the name {_HEAD}weight")
    stems = [one for one in dict.fromkeys((head, _HEAD)) if any(name.startswith(one) for name in stored)]
    head = (heads or stems or [head])[0]
    return names_at((begin, head))


def names_at(place: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """(beginning on disk, beginning here) of the decoder's tensors at a place, as `WrapperKind.places` has it."""
    return (*((place[0] + part, _MODEL + part) for part in _PARTS), (place[1], _HEAD))


def text_settings(config: Mapping[str, Any], kind: WrapperKind, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The decoder's config in that of the whole model, as transformers reads it, and notes of what is said twice."""
    text: Any = config.get("text_config")
    if not isinstance(text, Mapping):
        text = {key: value for key, value in config.items() if key not in _AROUND and not _of_images(key)}
    decoding = _decoding(text, kind, folder)
    family = FAMILIES[decoding.family]
    text = _without_sections({**text, "model_type": family.model_type})
    outer_keys = {key: config[key] for key in _SHARED_KEYS if key in config}
    outer = {key: outer_keys[key] for key in _TOKEN_KEYS if outer_keys.get(key) is not None}  # transformers' generate
    tied = {_TIE: config.get(_TIE, kind.tied)}  # the outer class's, and its default
    twice = [key for key in text if key != "model_type" and key in config and config[key] != text[key]]
    if not isinstance(config.get("text_config"), Mapping):
        twice = []
    text = {
        **_sizes(family, decoding, text),
        **outer_keys,
        **text,
        **outer,
        **tied,
        "architectures": [family.architecture],
    }
    if not twice:
        return text, ()
    listed = ", ".join(f"{key} {text[key]!r:.60}" for key in twice)
    return text, (f"{folder.name}: text_config of config.json and what is outside differ; what counts: {listed}",)


def _of_images(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index")) and key not in _TOKEN_KEYS


def _decoding(text: Mapping[str, Any], kind: WrapperKind, folder: Path) -> Decoding:
    inner = text.get("model_type", kind.decoders[0].model_type)
    found = next((one for one in kind.decoders if one.model_type == inner), None)
    if found is None:
        known = " or ".join(one.model_type for one in kind.decoders)
        raise FormatError(
            f"{folder}: text_config.model_type", expected=f"{known} in a {kind.model_type}", got=shown(inner)
        )
    return found


def _sizes(family: Family, decoding: Decoding, text: Mapping[str, Any]) -> dict[str, Any]:
    """What text_config leaves out, and transformers' class of it takes."""
    sizes = {key: value for key, value in family.defaults.items() if key in _SIZE_KEYS}
    inside = text.get("rope_parameters") or text.get("rope_scaling")
    own = dict(decoding.defaults)
    if isinstance(inside, Mapping) and "rope_theta" in inside:
        own.pop("rope_theta", None)
    return {**sizes, **own}


def _without_sections(text: dict[str, Any]) -> dict[str, Any]:
    """Without what rotary positions of images have: of text all three positions are the same, as in a plain rope."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if isinstance(rope, Mapping):
            plain = {part: value for part, value in rope.items() if not str(part).startswith(_SECTIONS)}
            mixed = [part for part in ("type", "rope_type") if plain.get(part) == _SECTIONS]
            text[key] = {**plain, **dict.fromkeys(mixed, "default")}
    return text


def _sections(whole: Mapping[str, Any]) -> dict[str, Any]:
    """What `_without_sections` leaves out."""
    inside = whole.get("text_config")
    text = inside if isinstance(inside, Mapping) else whole
    ropes = [text[key] for key in ("rope_scaling", "rope_parameters") if isinstance(text.get(key), Mapping)]
    return {part: value for rope in ropes for part, value in rope.items() if str(part).startswith(_SECTIONS)}


def whole_config(model: Checkpoint, config: Mapping[str, Any], *, full: bool = False) -> dict[str, Any]:
    """config.json of the whole model, with the decoder's config in it; of a decoder alone, that config.

    What stands in it as it was read stays as it was published. What a fold, an adapter or a target's writer has changed
    goes where it stood: into text_config, or outside, or both.

    full  whether all of the decoder's config is written, as a runtime needs that has defaults of its own
    """
    wrapper = model.wrapper
    if wrapper is None:
        return dict(config)
    whole, was = dict(wrapper.config), wrapper.text
    own = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    changed = {key: value for key, value in own.items() if full or key not in was or was[key] != value}
    gone = [key for key in was if key not in config]
    if isinstance(changed.get("rope_parameters"), Mapping):
        changed["rope_parameters"] = {**changed["rope_parameters"], **_sections(whole)}
    inside = whole.get("text_config")
    if isinstance(inside, Mapping):
        left = {key: value for key, value in inside.items() if key not in gone}
        both = {key for key in changed if key in _SHARED_KEYS and key in whole}
        outside = {_TIE, "dtype", *both}
        within = {key: value for key, value in changed.items() if full or key not in outside or key in left}
        whole["text_config"] = {**left, **within}
        changed = {key: value for key, value in changed.items() if key in outside}
    else:
        whole = {key: value for key, value in whole.items() if key not in gone}
    return {**whole, **changed}


def in_transformers(wrapper: Wrapper | None, module: str) -> str:
    """Where transformers' class has a module of the decoder: in that of the whole model, its layers are further in."""
    if wrapper is None or not module.startswith(_MODEL):
        return module
    return f"{kind_of(wrapper).inside}.{module.removeprefix(_MODEL)}"


def names_on_disk(model: Checkpoint, parts: Mapping[str, Sequence[Part]]) -> dict[str, str]:
    """What the parts of the decoder's tensors are called in the files of the whole, where that is another name."""
    wrapper = model.wrapper
    if wrapper is None:
        return {}
    names = (part[0] for name in model.tensors for part in parts[name])
    return {name: disk for name in names if (disk := wrapper.on_disk(name)) != name}


def carried_parts(model: Checkpoint) -> dict[str, list[Part]]:
    """What the tensors that are carried along become in a file: themselves."""
    carried = {} if model.wrapper is None else model.wrapper.carried
    return {name: [(name, lazy.dtype, lazy.shape)] for name, lazy in carried.items() if lazy.dtype is not None}


def text_alone(model: Checkpoint, target: str, why: str) -> Checkpoint:
    """The decoder as a model of its own, with a note of what a target leaves out; the model itself where it is one."""
    if model.wrapper is None:
        return model
    kind, carried = kind_of(model.wrapper), model.wrapper.carried
    note = f"{target}: text alone: of this {kind.model_type}, {_counted(carried)} left out{why}"
    return replace(model, wrapper=None, notes=(*model.notes, note))


_APART = (*_SHARED_KEYS, "text_config", "architectures", "transformers_version", "quantization_config", "quantization")


def around_differences(mine: Checkpoint, theirs: Checkpoint) -> tuple[str, ...]:
    """What the configs of two whole models say otherwise of what is around the decoder, such as of the vision."""
    if mine.wrapper is None or theirs.wrapper is None:
        return ()
    a, b = mine.wrapper.config, theirs.wrapper.config
    flat = () if isinstance(b.get("text_config"), Mapping) else tuple(theirs.wrapper.text)
    found = [pair for key in b if key not in _APART and key not in flat for pair in _pairs(key, a.get(key), b[key])]
    return tuple(f"{key}: {one!r:.60} instead of {other!r:.60}" for key, one, other in found if one != other)


def _pairs(key: str, mine: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """(key, mine, theirs) of a number, and of each one in an object of numbers."""
    if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
        return [(key, mine, theirs)]
    return [(f"{key}.{part}", mine.get(part), theirs[part]) for part in theirs if part not in _APART]


def around_notes(mine: Checkpoint, theirs: Checkpoint) -> tuple[str, ...]:
    """What only one of an artefact and its reference has around the decoder."""
    one, other = mine.wrapper, theirs.wrapper
    if one is None and other is not None:
        return (f"the decoder alone: {len(other.carried)} tensors of the {other.model_type} are left out",)
    if one is not None and other is None:
        return (f"a {one.model_type}: {len(one.carried)} tensors around its decoder are not compared",)
    return ()
