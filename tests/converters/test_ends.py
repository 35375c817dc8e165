"""Where generation ends: the record against what each library makes of the same files, and the way there and back."""

import ctypes
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.ends import GENERATION, end_notes, ends_of, tokenizer_end
from qalora.converters.families import family_of
from qalora.converters.tokenizer import load_tokenizer
from qalora.errors import InputError
from qalora.formats.gguf import Metadata, Value, ValueType, metadata_bytes
from qalora.formats.gguf_ends import FILLING, NAMES, eog_of, with_ends
from qalora.testing import CHAT_LAYOUTS, chat_layout, chat_model, random_model

pytestmark = pytest.mark.filterwarnings("ignore")
FORMATS = ("qalora", "gptq", "gguf", "onnx", "openvino", "transformersjs", "mlx", "hqq")


def as_set(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def said(folder: Path, config: Any = ..., generation: Any = ..., own: Any = ...) -> Path:
    """The folder with other end tokens: of config.json, of generation_config.json (None for no such file), and the
    tokenizer's own; a value of `...` changes nothing there, and in a dict "absent" means no such key.
    """
    if config is not ...:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        content.pop("eos_token_id", None)
        content |= {} if config == "absent" else {"eos_token_id": config}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    if generation is None:
        (folder / GENERATION).unlink(missing_ok=True)
    elif generation is not ...:
        (folder / GENERATION).write_text(json.dumps(generation), encoding="utf-8")
    if own is not ...:
        content = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**content, "eos_token": own}), encoding="utf-8")
    return folder


def changed(source: Path, place: Path, **changes: Any) -> Checkpoint:
    shutil.copytree(source, place)
    return load(said(place, **changes))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3's layout: nine special tokens behind the words."""
    return chat_model(tmp_path_factory.mktemp("chat") / "model", "llama3")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece's layout of Mistral, whose special tokens llama.cpp knows one of."""
    return chat_model(tmp_path_factory.mktemp("plain") / "model", "mistral")


# --- what is read -----------------------------------------------------------------------------------------------------

SAID: list[tuple[Any, Any]] = [
    *((config, None) for config in ("absent", None, 3, [3, 4], [], [3, 3], 0)),
    *((3, {"eos_token_id": value}) for value in (None, 5, [5, 6], [], 0, [0])),
    (3, {}),
    ([3, 4], {"temperature": 0.5}),
    ("absent", {"eos_token_id": [7, 8], "_from_model_config": True}),
]
"""eos_token_id of config.json, and generation_config.json."""


@pytest.mark.parametrize(("config", "generation"), SAID)
def test_a_folder_ends_where_transformers_does(config: Any, generation: Any, chat: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = changed(chat, tmp_path / "model", config=config, generation=generation)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id
    assert set(ends_of(model).ids) == as_set(wanted)


@pytest.mark.parametrize(("config", "generation"), SAID)
@pytest.mark.parametrize("own", ["<|eot_id|>", "<|end_of_text|>"])
def test_an_mlx_folder_ends_where_mlx_lm_does(
    config: Any, generation: Any, own: str, chat: Path, tmp_path: Path
) -> None:
    """Where files of others disagree; a folder of ours, without its mark."""
    from mlx_lm.utils import load_config, load_tokenizer

    export(random_model(load(chat)), "mlx", tmp_path)
    model = load(said(tmp_path / "mlx", config, generation if generation is not None else None, own))
    wanted = load_tokenizer(tmp_path / "mlx", eos_token_ids=load_config(tmp_path / "mlx").get("eos_token_id"))
    assert set(ends_of(model).ids) == wanted.eos_token_ids


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("config", "mapped"), [("a", "b"), ("a", None), (None, "b"), ({"content": "a"}, "b")])
def test_the_tokenizers_own_end_is_transformers_choice(
    config: Any, mapped: Any, listed: bool, chat: Path, tmp_path: Path
) -> None:
    """tokenizer_config.json or special_tokens_map.json: where the one lists the added tokens, the other is not read."""
    shutil.copytree(chat, tmp_path / "model")
    for name, token in (("tokenizer_config.json", config), ("special_tokens_map.json", mapped)):
        path = tmp_path / "model" / name
        content = json.loads(path.read_text("utf-8"))
        drops = {"eos_token"} | ({"added_tokens_decoder"} - {"added_tokens_decoder" if listed else ""})
        content = {key: value for key, value in content.items() if key not in drops}
        if isinstance(token, dict):
            token = {**token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            token |= {} if name == "special_tokens_map.json" else {"__type": "AddedToken"}
        content |= {} if token is None else {"eos_token": token}
        path.write_text(json.dumps(content), encoding="utf-8")
    model = load(tmp_path / "model")
    assert tokenizer_end(model) == load_tokenizer(model).eos_token_id


@pytest.mark.parametrize("value", [2, [2, 5], [5, 2, 5], 0, [], None])
def test_a_graph_ends_where_onnxruntime_genai_does(value: Any, chat: Path, tmp_path: Path) -> None:
    import onnxruntime_genai

    export(random_model(load(chat)), "onnx", tmp_path)
    path = tmp_path / "onnx" / "genai_config.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["pad_token_id"] = 3
    content["model"].pop("eos_token_id")
    content["model"] |= {} if value is None else {"eos_token_id": value}
    path.write_text(json.dumps(content), encoding="utf-8")
    wanted = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "onnx"))).eos_token_ids
    for place in (tmp_path / "onnx", tmp_path / "onnx" / "model.onnx"):
        assert set(ends_of(load(place)).ids) == set(wanted.tolist())


def vocabulary(kind: str, texts: Sequence[str], **keys: int) -> Metadata:
    """The metadata of a vocabulary: 20 tokens that nobody knows, then these texts."""
    tokens = (*(f"<w{n}>" for n in range(20)), *texts)
    entries = {
        "general.architecture": Value.text("llama"),
        "tokenizer.ggml.model": Value.text(kind),
        "tokenizer.ggml.pre": Value.text("llama-bpe" if kind == "gpt2" else "default"),
        "tokenizer.ggml.tokens": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=tokens),
        "tokenizer.ggml.scores": Value(
            type=ValueType.ARRAY, element=ValueType.FLOAT32, value=tuple(-float(n) for n in range(len(tokens)))
        ),
        "tokenizer.ggml.token_type": Value(
            type=ValueType.ARRAY, element=ValueType.INT32, value=(1,) * 20 + (3,) * len(texts)
        ),
        "tokenizer.ggml.merges": Value(type=ValueType.ARRAY, element=ValueType.STRING, value=()),
        **{f"tokenizer.ggml.{key}_token_id": Value.uint32(n) for key, n in keys.items()},
    }
    if kind == "llama":
        entries.pop("tokenizer.ggml.merges")
    return Metadata(entries=entries)


def eog_in_llama_cpp(metadata: Metadata, path: Path) -> set[int]:
    """The tokens that the library itself ends at; it loads the vocabulary alone."""
    from qalora.parity.runtimes.llamacpp_abi import load_library

    path.write_bytes(metadata_bytes(metadata))
    library, _ = load_library()
    is_eog = library.llama_vocab_is_eog
    is_eog.restype, is_eog.argtypes = ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32)
    params = library.llama_model_default_params()
    params.flags[0] = True  # vocab_only
    model = library.llama_model_load_from_file(os.fsencode(path), params)
    assert model, "llama.cpp takes the vocabulary"
    try:
        vocab = library.llama_model_get_vocab(model)
        return {n for n in range(library.llama_vocab_n_tokens(vocab)) if is_eog(vocab, n)}
    finally:
        library.llama_model_free(model)


FILLERS = sorted(text for texts in FILLING.values() for text in texts)
VOCABULARIES: dict[str, tuple[Sequence[str], dict[str, int]]] = {
    "nothing known": (["<a>", "<b>"], {}),
    "one key": (["<a>", "<b>"], {"eos": 21}),
    "three keys": (["<a>", "<b>"], {"eos": 21, "eot": 20, "eom": 3}),
    "a key beyond the vocabulary": (["<a>"], {"eos": 99, "eot": 20}),
    "keys of filling": (["<|fim_pad|>", "<x>", "<y>"], {"eos": 5, "fim_pad": 21, "fim_rep": 22, "fim_sep": 20}),
    "filling by name": (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"], {"eos": 5}),
    "gpt-oss": (["<|end|>", "<|return|>", "<|call|>"], {"eos": 21}),
    "gpt-oss, eos is taken back": (["<|end|>", "<|return|>", "<|call|>"], {"eos": 20}),
    "solar": (["<|end|>", "<|flush|>", "<|calls|>"], {"eos": 21}),
    "gemma 4": (["</s>", "<|tool_response>", "<turn|>", "<eos>"], {"eos": 23}),
    "phi": (["<|end|>", "<|call|>"], {"eos": 20}),
    "all names but those that take back": (
        sorted(NAMES - {"<|return|>", "<|flush|>", "<|tool_response>"}),
        {"eos": 4},
    ),
    **{f"one name, {text}": ([text], {"eos": 4}) for text in sorted(NAMES)},
    **{f"filling, {text}": ([text], {"eos": 4}) for text in FILLERS},
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_gguf_file_ends_where_llama_cpp_does(kind: str, name: str, tmp_path: Path) -> None:
    texts, keys = VOCABULARIES[name]
    metadata = vocabulary(kind, texts, **keys)
    found = eog_of(metadata)
    assert found is not None
    assert set(found.ids) == eog_in_llama_cpp(metadata, tmp_path / "vocabulary.gguf")


def test_no_other_texts_of_common_end_tokens_are_known(tmp_path: Path) -> None:
    """What other families call their end tokens: none is known by name, or it would be missing in NAMES."""
    texts = [
        "<|turn_end|>",
        "<|assistant|>",
        "<|end_of_role|>",
        "<end>",
        "<|EOT|>",
    ]
    texts += ["[/INST]", "<|END_OF_TURN_TOKEN|>", "<|user|>", "<|observation|>", "<end_of_image>", "<|eos|>", "[SEP]"]
    assert eog_in_llama_cpp(vocabulary("gpt2", texts, eos=4), tmp_path / "vocabulary.gguf") == {4}


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "a text": "5",
    "a real number": 5.0,
    "true": True,
    "negative": -1,
    "beyond the vocabulary": 393,
    "a list in a list": [[5]],
    "an object": {"id": 5},
    "a list with a text": [5, "6"],
    "a list with null": [5, None],
    "a list beyond the vocabulary": [5, 10**30],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("where", ["config.json", GENERATION])
def test_what_is_no_token_is_one_sentence(where: str, wrong: str, chat: Path, tmp_path: Path) -> None:
    value = WRONG[wrong]
    changes = {"generation": {"eos_token_id": value}} if where == GENERATION else {"config": value, "generation": None}
    model = changed(chat, tmp_path / "model", **changes)
    with pytest.raises(
        InputError, match=r"eos_token_id: expected a token from 0 to 392, or a list of such, got"
    ) as caught:
        ends_of(model)
    assert where in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="eos_token_id"):
        export(random_model(model), "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_of_a_file_that_does_not_count_is_passed_over_and_said(chat: Path, tmp_path: Path) -> None:
    model = changed(chat, tmp_path / "model", config="nonsense")
    assert set(ends_of(model).ids) == {385, 391}
    assert [note for note in end_notes(model) if "'nonsense': it is passed over" in note]
    export(random_model(model), "qalora", tmp_path)
    assert load(tmp_path / "qalora").config["eos_token_id"] == [385, 391]


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_no_end_token_is_refused_where_a_runtime_takes_another(form: str, chat: Path, tmp_path: Path) -> None:
    """llama.cpp takes token 11 or 2 then, and onnxruntime-genai the padding token; the others end nowhere."""
    model = random_model(changed(chat, tmp_path / "model", generation={}))
    with pytest.raises(InputError, match=f"{form}: .*: no end token: expected one"):
        export(model, form, tmp_path / "out")
    export(model, "gptq", tmp_path / "out")
    assert ends_of(load(tmp_path / "out" / "gptq")).ids == ()


def test_more_ends_than_gguf_has_keys_for_are_refused_by_name(plain: Path, tmp_path: Path) -> None:
    model = random_model(changed(plain, tmp_path / "model", generation={"eos_token_id": [2, 3, 4, 5]}))
    assert len(ends_of(model).ids) == 4
    with pytest.raises(
        InputError, match=r"at most 2 beside eos whose names llama.cpp does not know, got 3 '\[INST\]', 4"
    ):
        export(model, "gguf", tmp_path / "out")
    model = random_model(changed(plain, tmp_path / "other", generation={"eos_token_id": [3, 2, 4]}))
    export(model, "gguf", tmp_path / "out")  # </s> has a name that llama.cpp knows
    assert set(ends_of(load(next((tmp_path / "out").rglob("*.gguf")))).ids) == {2, 3, 4}


def test_an_end_that_llama_cpp_takes_back_is_refused() -> None:
    metadata = vocabulary("gpt2", ["<|end|>", "<|return|>", "<|call|>"], eos=21)
    with pytest.raises(InputError, match=r"end token 20 '<\|end\|>': expected one that llama.cpp ends at"):
        with_ends(metadata, [20, 21], 21, "here")


# --- what is written --------------------------------------------------------------------------------------------------

ODD: dict[str, dict[str, Any]] = {
    "the list of generation_config.json": {},
    "config.json alone": {"config": 386, "generation": None},
    "a list in config.json alone": {"config": [386, 384], "generation": None},
    "token 0": {"config": 5, "generation": {"eos_token_id": 0}},
    "the tokenizer's own is another": {"config": 385, "generation": {"eos_token_id": [5, 6]}},
    "the tokenizer's own is in the map": {"generation": {"eos_token_id": 390}, "own": "<|python_tag|>"},
    "three that have no names": {"generation": {"eos_token_id": [392, 386, 388], "max_length": 20}},
}


def artifacts(model: Checkpoint, folder: Path) -> dict[str, Path]:
    """The model in every format that takes its family."""
    known = family_of(model.config, model.path).transformersjs
    forms = [form for form in FORMATS if known or form != "transformersjs"]
    for form in forms:
        export(model, form, folder)
    return {form: next((folder / form).glob("*.gguf")) if form == "gguf" else folder / form for form in forms}


@pytest.mark.parametrize("name", ODD)
def test_every_format_ends_where_the_source_does_and_comes_back(name: str, chat: Path, tmp_path: Path) -> None:
    """There, back, and from each into the next of them."""
    model = changed(chat, tmp_path / "model", **ODD[name])
    wanted = set(ends_of(model).ids)
    first = artifacts(random_model(model), tmp_path / "first")
    for n, (form, path) in enumerate(first.items()):
        again = load(path)
        assert set(ends_of(again).ids) == wanted, form
        following = FORMATS[(n + 1) % len(FORMATS)]
        export(again, following, tmp_path / "second")
        second = tmp_path / "second" / following
        second = next(second.glob("*.gguf")) if following == "gguf" else second
        assert set(ends_of(load(second)).ids) == wanted, (form, following)


@pytest.mark.parametrize("name", CHAT_LAYOUTS)
def test_every_layout_comes_back(name: str, tmp_path: Path) -> None:
    layout = chat_layout(name)
    model = load(chat_model(tmp_path / "model", layout))
    assert set(ends_of(model).ids) == as_set(layout.generation["eos_token_id"])
    for form, path in artifacts(random_model(model), tmp_path).items():
        again = load(path)
        assert set(ends_of(again).ids) == set(ends_of(model).ids), form
        if form not in ("gguf", "onnx"):
            assert as_set(json.loads((path / GENERATION).read_text("utf-8"))["eos_token_id"]) == set(ends_of(model).ids)
        if form != "gguf":
            assert as_set(again.config["eos_token_id"]) == set(ends_of(model).ids)
            assert (path / GENERATION).read_bytes() == (tmp_path / "model" / GENERATION).read_bytes()
