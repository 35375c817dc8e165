"""Right refusals that help: they name what lies there instead, and say what to do. Every sentence is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora.adapter import open_adapter, read_adapter, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.gptq.dynamic import parse_rules, rule_of
from qalora.converters.gptq.reader import read as read_gptq
from qalora.converters.onnx.slots import read_adapter_file
from qalora.errors import FormatError, InputError
from qalora.formats.around import instead_of_weights
from qalora.parity.artifacts import recognize
from qalora.testing import assert_same_model, random_adapter, random_model, small_tokenizer, tiny_llama
from qalora.training.data import read_documents
from targets import OF_REAL_ZEROS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float, adapter, and the float model in each format."""
    root = tmp_path_factory.mktemp("good")
    model = load(tiny_llama(root / "float", tokenizer=small_tokenizer(), config={"tie_word_embeddings": False}))
    whole = random_model(model, zeros="symmetric")
    export(whole, OF_REAL_ZEROS, root)
    write_adapter(random_adapter(whole), root / "adapter")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "in")
    return tmp_path / "in"


def said(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "Error(" not in text
    assert "\n" not in text
    return text


# Git LFS pointers


def of_a_folder(name: str) -> Callable[[Path], Callable[[], object]]:
    return lambda root: lambda: load(root / name)


POINTERS: list[tuple[str, Callable[[Path], Callable[[], object]]]] = [
    ("float/model.safetensors", of_a_folder("float")),
    ("float/config.json", of_a_folder("float")),
    ("float/tokenizer.json", of_a_folder("float")),
    ("float/tokenizer_config.json", of_a_folder("float")),
    ("float/tokenizer.model", of_a_folder("float")),
    ("float/chat_template.jinja", of_a_folder("float")),
    ("float/generation_config.json", of_a_folder("float")),
    ("float/model.safetensors.index.json", lambda root: lambda: _indexed(root / "float")),
    ("gptq/quantize_config.json", lambda root: lambda: _unconfigured(root / "gptq")),
    ("gptq/model.safetensors", of_a_folder("gptq")),
    ("mlx/model.safetensors", of_a_folder("mlx")),
    ("hqq/model.safetensors", of_a_folder("hqq")),
    ("torchao/model.safetensors", of_a_folder("torchao")),
    ("qalora/model.safetensors", of_a_folder("qalora")),
    ("gguf/model.gguf", of_a_folder("gguf/model.gguf")),
    ("gguf/model.gguf", lambda root: lambda: recognize([root / "gguf" / "model.gguf"])),
    ("onnx/model.onnx", of_a_folder("onnx")),
    ("onnx/portable/model.onnx.data", lambda root: lambda: _values(load(root / "onnx"))),
    ("adapter/adapter_model.safetensors", lambda root: lambda: open_adapter(root / "adapter")),
    ("adapter/adapter_config.json", lambda root: lambda: open_adapter(root / "adapter")),
    ("adapter/qalora_adapter.json", lambda root: lambda: open_adapter(root / "adapter")),
    ("a.onnx_adapter", lambda root: lambda: read_adapter_file(root / "a.onnx_adapter")),
    ("data.jsonl", lambda root: lambda: list(read_documents(str(root / "data.jsonl"), None))),
    ("data.txt", lambda root: lambda: list(read_documents(str(root / "data.txt"), None))),
]


def _indexed(folder: Path) -> Checkpoint:
    (folder / "model.safetensors").unlink()
    return load(folder)


def _unconfigured(folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load(folder)


def _values(model: Checkpoint) -> list[object]:
    return [lazy.load() for lazy in model.tensors.values()]


@pytest.mark.parametrize(("name", "call"), POINTERS, ids=[f"{n} {name}" for n, (name, _) in enumerate(POINTERS)])
def test_a_pointer_of_git_lfs(name: str, call: Callable[[Path], Callable[[], object]], place: Path) -> None:
    if name.endswith(".gguf"):
        (place / "gguf" / "model.gguf").write_text(POINTER, encoding="utf-8")
    (place / name).write_text(POINTER, encoding="utf-8")
    text = said(call(place))
    assert f"{place / name}: a Git LFS pointer" in text
    assert "git lfs pull" in text


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/specification", "version 2", "", "v"])
def test_what_is_no_pointer_is_read_as_it_is(content: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(f"{content}\nand more", encoding="utf-8")
    (document,) = read_documents(str(tmp_path / "data.txt"), None)
    assert document.text.startswith(content)


# what lies there instead


def move(old: str, new: str) -> Change:
    def change(root: Path) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return change


def both(*changes: Change) -> Change:
    def change(root: Path) -> None:
        for one in changes:
            one(root)

    return change


def touch(*names: str) -> Change:
    def change(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()

    return change


W = "float/model.safetensors"
MODELS: list[tuple[str, Change, str, tuple[str, ...]]] = [
    ("float", move(W, "float/gptq_model-4bit-32g.safetensors"), "gptq_model-4bit-32g.safetensors", ("rename it to",)),
    ("float", move(W, "float/consolidated.safetensors"), "consolidated.safetensors", ("rename it to",)),
    (
        "float",
        both(move(W, "float/a.safetensors"), touch("float/b.safetensors")),
        "a.safetensors, b.safetensors",
        ("leave the one",),
    ),
    (
        "float",
        move(W, "float/model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors without the index",
        ("put model.safetensors.index.json there",),
    ),
    ("float", move(W, "float/pytorch_model.bin"), "pytorch_model.bin", ("save_pretrained",)),
    ("float", move(W, "float/checkpoint-30/model.safetensors"), "checkpoint-30", ("such as", "checkpoint-30")),
    ("float", move(W, "float/model.gguf"), "model.gguf", ("give the file",)),
    ("float", move(W, "float/adapter_model.safetensors"), "an adapter", ("`adapter`",)),
    ("adapter", touch(), "got an adapter", ("give its base as the model", "`adapter`")),
    ("gguf", touch(), ".gguf", ("give the file",)),
    (".", touch(), "models in", ("give one of them",)),
    (
        "out",
        touch("out/checkpoint-9/adapter_config.json"),
        "adapters in checkpoint-9",
        ("`adapter`", "checkpoint-9"),
    ),
    ("lone", touch("lone/model.safetensors"), "model.safetensors alone", ("config.json",)),
    ("empty", touch("empty/x/y"), "got none", ()),
]


@pytest.mark.parametrize(("name", "change", "got", "todo"), MODELS, ids=[got for _, _, got, _ in MODELS])
def test_a_model_that_is_not_there(name: str, change: Change, got: str, todo: tuple[str, ...], place: Path) -> None:
    change(place)
    text = said(lambda: load(place / name))
    assert got in text
    assert all(word in text for word in todo)


A = "adapter/adapter_model.safetensors"
C = "adapter/adapter_config.json"
ADAPTERS: list[tuple[str, Change, str, tuple[str, ...]]] = [
    ("outer", move("adapter", "outer/tuned"), "adapters in tuned", ("outer/tuned",)),
    (
        "outer",
        both(move("adapter", "outer/checkpoint-10"), touch("outer/checkpoint-9/adapter_config.json")),
        "adapters in checkpoint-9, checkpoint-10",
        ("outer/checkpoint-10",),
    ),
    ("adapter", move(A, "adapter/adapter_model_v2.safetensors"), "adapter_model_v2.safetensors", ("rename it to",)),
    ("adapter", move(A, "adapter/lora.safetensors"), "lora.safetensors", ("rename it to adapter_model.safetensors",)),
    (
        "adapter",
        both(move(A, "adapter/a.safetensors"), touch("adapter/b.safetensors")),
        "a.safetensors, b.safetensors",
        ("rename the one",),
    ),
    ("adapter", move(A, "adapter/checkpoint-5/adapter_model.safetensors"), "checkpoint-5", ("checkpoint-5",)),
    ("adapter", move(C, "adapter/config_of_adapter.json"), "adapter_model.safetensors alone", ("fetch",)),
    ("adapter", move(A, "adapter/adapter_model.bin"), "adapter_model.bin: a pickle", ("convert_pickle.py",)),
    (A, touch(), "got a file", ("give its folder",)),
    ("float", touch(), "got a model", ("adapter_config.json",)),
    ("gguf", touch(), ".gguf", ("qalora adapter convert",)),
    ("nothing", touch(), "got nothing", ()),
]


@pytest.mark.parametrize(("name", "change", "got", "todo"), ADAPTERS, ids=[got for _, _, got, _ in ADAPTERS])
def test_an_adapter_that_is_not_there(name: str, change: Change, got: str, todo: tuple[str, ...], place: Path) -> None:
    change(place)
    text = said(lambda: read_adapter(place / name))
    assert got in text
    assert all(word in text for word in todo)


def test_an_artefact_that_is_not_there(place: Path) -> None:
    touch("out/checkpoint-1/adapter_config.json")(place)
    assert "got adapters in checkpoint-1" in said(lambda: recognize([place / "out"]))
    assert "got an adapter" in said(lambda: recognize([place / "adapter"]))


def test_a_folder_of_many_files_is_told_in_few_words(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"part{n}.safetensors").touch()
    got, _ = instead_of_weights(tmp_path)
    assert got == "part0.safetensors, part1.safetensors, part2.safetensors, part3.safetensors and 26 more"


# integers that no config tells of


def config_without(folder: Path, *keys: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gptq", "holds GPTQ integers, 14 tensors such as"),
        ("qalora", "holds qalora integers"),
        ("hqq", "holds HQQ integers"),
        ("torchao", "holds torchao integers"),
        ("mlx", "holds MLX integers"),
    ],
)
def test_integers_without_their_config(name: str, told: str, place: Path) -> None:
    (place / "gptq" / "quantize_config.json").unlink()
    config_without(place / name, "quantization_config", "quantization")
    text = said(lambda: load(place / name))
    assert told in text
    assert "config.json has no quantization_config" in text
    assert ("quantize_config.json" in text) == (name == "gptq")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"m.qweight": (64, 8), "m.qzeros": (2, 8), "m.scales": (2, 64)}, "holds AWQ integers"),
        ({"m.qweight": (8, 64), "m.qzeros": (2, 8), "m.scales": (2, 64)}, "holds GPTQ integers"),
        ({"m.weight_packed": (64, 8)}, "holds compressed-tensors integers"),
        ({"m.weight.absmax": (64,)}, "holds bitsandbytes' weights of 4 bits"),
        ({"m.weight_scale_inv": (2, 2)}, "holds FP8, floats of 8 bits"),
        ({"m.weight_scale_2": (1,), "m.weight_scale": (4, 4)}, "holds NVFP4, floats of 4 bits"),
        ({"m.down_proj_blocks": (4, 4)}, "holds MXFP4, floats of 4 bits"),
    ],
)
def test_integers_of_others(tensors: dict[str, tuple[int, ...]], told: str, place: Path) -> None:
    held = load_file(place / "float" / "model.safetensors")
    made = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in tensors.items()}
    save_file({**held, **made}, place / "float" / "model.safetensors")
    assert told in said(lambda: load(place / "float"))


# rules for layers of a GPTQ checkpoint


def mixed(base: Path, folder: Path, dynamic: dict[str, Any], bits: dict[str, int]) -> Checkpoint:
    """A GPTQ folder whose layers have widths of their own, by the ends of their names; gives what it holds."""
    from qalora.converters.gptq.forms import encode
    from qalora.formats.gptq import pack_qweight, pack_qzeros

    model = random_model(load(base), zeros="integer")
    export(model, ["gptq"], folder)
    other = random_model(load(base), bits=8, group_size=64, zeros="integer")
    path = folder / "gptq" / "model.safetensors"
    held, tensors = load_file(path), dict(model.tensors)
    for name in model.linears:
        module = name.removesuffix(".weight")
        if not any(module.endswith(end) for end in bits):
            continue
        tensors[name] = other.tensors[name]
        tensor = tensors[name].load_quantized()
        layer = encode(tensor, "own")
        held[f"{module}.qweight"] = pack_qweight(layer.packed)
        held[f"{module}.qzeros"] = pack_qzeros(layer.zero, 8, "gptq_v2")
        held[f"{module}.scales"] = layer.scale.t().contiguous()
        held[f"{module}.g_idx"] = (torch.arange(tensor.shape[1]) // 64).int()
    save_file(held, path, {"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((folder / "gptq" / name).read_text("utf-8"))
        config.get("quantization_config", config)["dynamic"] = dynamic
        (folder / "gptq" / name).write_text(json.dumps(config), encoding="utf-8")
    return replace(model, tensors=tensors)


WIDE = {"bits": 8, "group_size": 64}


@pytest.mark.parametrize(
    "dynamic",
    [
        {r"+:.*\.down_proj": WIDE},
        {r".*\.down_proj": WIDE},
        {r"+:model\.layers\.\d+\.mlp\.down_proj$": {**WIDE, "sym": False, "desc_act": False}},
        {r"-:lm_head": {}, r"+:.*down": WIDE, r"+:.*": {"bits": 4}},
        {r"+:.*(down|sideways)_proj": WIDE, r"+:.*down_proj": {"bits": 3}},  # the first that matches decides
    ],
)
def test_rules_of_dynamic_are_followed(dynamic: dict[str, Any], tiny_untied: Path, tmp_path: Path) -> None:
    expected = mixed(tiny_untied, tmp_path, dynamic, {"down_proj": 8})
    assert_same_model(read_gptq(tmp_path / "gptq"), expected)


@pytest.mark.parametrize(
    ("dynamic", "sentence"),
    [
        (
            {r"+:.*up_proj": WIDE},
            r"up_proj.scales: expected .* groups of 64 .* at 8 bits, by the rule '\+:\.\*up_proj'",
        ),
        ({r"-:.*down_proj": {}}, r"the rule '-:\.\*down_proj' of dynamic leaves out .*down_proj: expected floats"),
        ({r"+:.*down": {"bits": 7}}, r"rule '\+:\.\*down': bits: expected one of 2, 3, 4, 8, got 7"),
        ({r"+:.*down": {**WIDE, "rotation": "x"}}, r"rule '\+:\.\*down' says 'rotation': expected bits, group_size"),
        ({r"+:.*down": {**WIDE, "pack_dtype": "int16"}}, r"says 'pack_dtype'"),
        ({r"+:(down": WIDE}, r"is no regular expression"),
        ({r"+:(.*)*(.*)*x": WIDE}, r"an expression with repeated groups"),
        (["down"], r"dynamic: expected an object of rules, got a list"),
    ],
)
def test_rules_that_are_not_understood(dynamic: Any, sentence: str, tiny_untied: Path, tmp_path: Path) -> None:
    mixed(tiny_untied, tmp_path, dynamic, {})
    with pytest.raises(FormatError, match=sentence):
        read_gptq(tmp_path / "gptq")


def test_a_module_that_is_left_out_is_read_as_floats(tiny_untied: Path, tmp_path: Path) -> None:
    mixed(tiny_untied, tmp_path, {r"-:.*v_proj": {}}, {})
    path = tmp_path / "gptq" / "model.safetensors"
    floats, held = load_file(tiny_untied / "model.safetensors"), load_file(path)
    kept = {name: value for name, value in held.items() if "v_proj" not in name}
    save_file({**kept, **{name: value for name, value in floats.items() if "v_proj" in name}}, path)
    model = read_gptq(tmp_path / "gptq")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert model.tensors[name].spec is None
    assert torch.equal(model.tensors[name].load_float(), floats[name])


@pytest.mark.slow
def test_rules_decide_as_gptqmodel_has_them_decide() -> None:
    from gptqmodel.quantization.config import dynamic_get

    rules = {
        r"-:.*\.0\.mlp": {},
        r"+:model\.layers\.1\.": {"bits": 8},
        r"^model\.layers\.0\.self_attn\.q_proj$": {"bits": 2},
        r".*k_proj": {"group_size": 64},
        r"+:(lm_head|.*o_proj)": {"bits": 3, "group_size": 128},
    }
    parsed = parse_rules(rules, "config")
    modules = [f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in ("mlp.up_proj", "self_attn.q_proj")]
    modules += [f"model.layers.{n}.self_attn.{k}_proj" for n in (0, 2, 10) for k in "ko"] + ["lm_head", "lm_head_2"]
    for module in modules:
        rule = rule_of(parsed, module)
        expected = dynamic_get(rules, module)
        if expected is False:
            assert rule is not None
            assert rule.out
        elif not expected:
            assert rule is None, module
        else:
            assert rule is not None
            told = {"bits": rule.bits, "group_size": rule.group_size}
            assert {key: value for key, value in told.items() if value is not None} == expected
