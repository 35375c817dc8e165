"""Bad input, to every command: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from qalora.adapter import write_adapter
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama
from said import besides_data


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid things: float, qalora, gptq/, gguf/, onnx/, mlx/, hqq/, adapter, other_adapter, data.txt."""
    root = tmp_path_factory.mktemp("good")
    tiny_llama(root / "float", tokenizer=byte_tokenizer(), config={"num_hidden_layers": 1})
    model = quantize(load(root / "float"), bits=4, group_size=32)
    export(model, ["qalora", "gptq", "gguf", "onnx", "mlx", "hqq"], root)
    next((root / "gguf").glob("*.gguf")).rename(root / "gguf" / "model.gguf")
    write_adapter(random_adapter(model, rank=2, a_size=1.0, b_size=1e-3), root / "adapter")
    other = tiny_llama(root / "other", config={"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 128})
    foreign = random_adapter(quantize(load(other), group_size=32), rank=2, a_size=1.0, b_size=1e-3)
    write_adapter(foreign, root / "other_adapter")
    (root / "data.txt").write_text("some text to learn from. " * 200, encoding="utf-8")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy of the valid things, to be damaged."""
    shutil.copytree(good, tmp_path / "in")
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "letters").write_text("dear", encoding="utf-8")
    return tmp_path


def _run(place: Path, line: str) -> Result:
    words = [word.replace("@", f"{place}/in/").replace("%", f"{place}/") for word in line.split()]
    return CliRunner().invoke(main, words)


def _tree(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


def _refused(place: Path, line: str, sentence: str) -> None:
    before = _tree(place)
    result = _run(place, line)
    assert result.exit_code == 2, f"{line}: {result.exit_code} {result.output} {result.exception!r}"
    message = [line for line in result.stderr.strip().splitlines() if not line.endswith(" ...")]  # stages
    assert sentence in message[-1], result.stderr
    assert message[-1].startswith(("qalora: ", "Error: "))
    assert message[-1].startswith("Error: ") or len(besides_data(message)) == 1
    assert _tree(place) == before


Damage = Callable[[Path], object]


def _cut(name: str, keep: int) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[:keep])

    return damage


def _patch(name: str, at: int, new: bytes) -> Damage:
    def damage(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[at : at + len(new)] = new
        (root / name).write_bytes(data)

    return damage


def _header(name: str, change: Callable[[dict[str, dict[str, object]]], object]) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (root / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def _config(name: str, **changes: object) -> Damage:
    def damage(root: Path) -> None:
        config = json.loads((root / name).read_text(encoding="utf-8"))
        (root / name).write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return damage


def _tensor(name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(root: Path) -> None:
        tensors = safetensors.torch.load_file(root / name)
        tensors[key] = change(tensors[key]).contiguous()
        safetensors.torch.save_file(tensors, root / name)

    return damage


def _without(name: str, key: str) -> Damage:
    def damage(root: Path) -> None:
        tensors = safetensors.torch.load_file(root / name)
        del tensors[key]
        safetensors.torch.save_file(tensors, root / name)

    return damage


def _shard_outside(root: Path) -> None:
    shutil.move(root / "float" / "model.safetensors", root / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (root / "float" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _link_outside(root: Path) -> None:
    shutil.move(root / "float" / "model.safetensors", root / "outside.safetensors")
    (root / "float" / "model.safetensors").symlink_to(root / "outside.safetensors")


def _pickle(root: Path) -> None:
    (root / "float" / "model.safetensors").unlink()
    (root / "float" / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _pickled_adapter(root: Path) -> None:
    (root / "adapter" / "adapter_model.safetensors").unlink()
    (root / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x02.")


def _nothing(root: Path) -> None:
    pass


def _again(name: str, at: int, length: int) -> Damage:
    """The first metadata entry of a GGUF file, once more; its count one higher."""

    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        count = int.from_bytes(data[16:24], "little") + 1
        head = data[:16] + count.to_bytes(8, "little") + data[24:at]
        (root / name).write_bytes(head + data[at : at + length] + data[at:])

    return damage


def _nested(root: Path) -> None:
    """The first metadata entry becomes an array of arrays."""
    data = (root / "gguf" / "model.gguf").read_bytes()
    key = data[24 : 24 + 8 + 20]
    array = (9).to_bytes(4, "little") + (9).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")
    (root / "gguf" / "model.gguf").write_bytes(data[:24] + key + array + data[24:])


def _onnx_outside(root: Path) -> None:
    import onnx

    model = onnx.load(root / "onnx" / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../data.txt"
    (root / "onnx" / "model.onnx").write_bytes(model.SerializeToString())


FIRST = "model.layers.0.self_attn.q_proj"

MODELS: list[tuple[str, Damage, str, str]] = [
    ("missing", _nothing, "%absent", "no such file or folder"),
    ("empty folder", lambda root: (root / "empty").mkdir(), "@empty", "expected a model folder with config.json"),
    ("a text file", _nothing, "@data.txt", "expected a GGUF or ONNX file or a model folder"),
    ("config is no JSON", _cut("float/config.json", 20), "@float", "config.json: expected JSON"),
    ("unknown family", _config("float/config.json", model_type="mamba"), "@float", "model_type: expected one of llama"),
    ("layers missing", _config("float/config.json", num_hidden_layers=3), "@float", "model.layers.1.self_attn.q_proj"),
    ("layers absurd", _config("float/config.json", num_hidden_layers=-1), "@float", "num_hidden_layers"),
    ("safetensors cut", _cut("float/model.safetensors", -9), "@float", "truncated"),
    ("safetensors tiny", _cut("float/model.safetensors", 5), "@float", "expected a safetensors file, got 5 bytes"),
    ("header length lies", _patch("float/model.safetensors", 0, b"\xff" * 8), "@float", "expected a header of at most"),
    (
        "gap",
        _header("float/model.safetensors", lambda h: h.pop("model.layers.0.mlp.up_proj.weight")),
        "@float",
        "gap before tensor",
    ),
    (
        "overflowing product",
        _header("float/model.safetensors", lambda h: h["model.norm.weight"].update(shape=[1 << 62, 1 << 62])),
        "@float",
        "the header lies",
    ),
    (
        "overlap",
        _header(
            "float/model.safetensors",
            lambda h: h["model.norm.weight"].update(
                data_offsets=h["model.layers.0.input_layernorm.weight"]["data_offsets"]
            ),
        ),
        "@float",
        "before tensor",
    ),
    (
        "NaN",
        _tensor("float/model.safetensors", f"{FIRST}.weight", lambda t: t * torch.nan),
        "@float",
        f"{FIRST}.weight",
    ),
    ("index outside", _shard_outside, "@float", "a plain name inside the folder"),
    ("link outside", _link_outside, "@float", "a file inside the model's folder"),
    ("pickle", _pickle, "@float", "pickled weights run code"),
    (
        "unknown quantization",
        _config("float/config.json", quantization_config={"quant_method": "awq"}),
        "@float",
        "awq",
    ),
]

QUANTIZED: list[tuple[str, Damage, str, str]] = [
    ("qalora cut", _cut("qalora/model.safetensors", -1), "@qalora", "truncated"),
    (
        "a group size that does not fit",
        _config(
            "qalora/config.json",
            quantization_config={"quant_method": "qalora", "version": 1, "bits": 4, "group_size": 16},
        ),
        "@qalora",
        "codes: expected torch.uint8",
    ),
    (
        "a newer version",
        _config("qalora/config.json", quantization_config={"quant_method": "qalora", "version": 9}),
        "@qalora",
        "update qalora",
    ),
    (
        "infinite scale",
        _tensor("qalora/model.safetensors", f"{FIRST}.scale", lambda t: t / 0),
        "@qalora",
        f"{FIRST}.weight: scale: expected finite values",
    ),
    (
        "wrong shape",
        _tensor("qalora/model.safetensors", f"{FIRST}.min", lambda t: t[1:]),
        "@qalora",
        f"{FIRST}.min: expected torch.float16",
    ),
    ("gptq cut", _cut("gptq/model.safetensors", -1), "@gptq", "truncated"),
    (
        "gptq wrong shape",
        _tensor("gptq/model.safetensors", f"{FIRST}.qzeros", lambda t: t[:, 1:]),
        "@gptq",
        f"{FIRST}",
    ),
    ("mlx cut", _cut("mlx/model.safetensors", -1), "@mlx", "truncated"),
    (
        "mlx wrong shape",
        _tensor("mlx/model.safetensors", f"{FIRST}.biases", lambda t: t[:, 1:]),
        "@mlx",
        f"{FIRST}.biases: expected [64, 2], got [64, 1]",
    ),
    (
        "mlx wrong words",
        _tensor("mlx/model.safetensors", f"{FIRST}.weight", lambda t: t.view(torch.int32)),
        "@mlx",
        f"{FIRST}.weight: expected a matrix of torch.uint32, got torch.int32",
    ),
    ("mlx no biases", _without("mlx/model.safetensors", f"{FIRST}.biases"), "@mlx", f"a tensor {FIRST}.biases"),
    (
        "mlx infinite scale",
        _tensor("mlx/model.safetensors", f"{FIRST}.scales", lambda t: t / 0),
        "@mlx",
        f"{FIRST}.weight: scale: expected finite values",
    ),
    (
        "mlx other width",
        _config("mlx/config.json", quantization={"bits": 3, "group_size": 32}, quantization_config=None),
        "@mlx",
        "expected 12 words a row for 4 groups of 32 at 3 bits, got [64, 16]",
    ),
    (
        "mlx other mode",
        _config(
            "mlx/config.json",
            quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"},
            quantization_config=None,
        ),
        "@mlx",
        "quantization.mode: expected affine, got 'mxfp4'",
    ),
    (
        "mlx metadata of another model",
        _header(
            "mlx/model.safetensors",
            lambda h: h["__metadata__"].update({"qalora.tensors": '{"a": [4, 32, "real", "float16", "float16"]}'}),
        ),
        "@mlx",
        "qalora.tensors: expected tensors of the file, got 'a.weight'",
    ),
    ("hqq cut", _cut("hqq/model.safetensors", -1), "@hqq", "truncated"),
    (
        "hqq other width",
        _tensor("hqq/model.safetensors", f"{FIRST}.nbits", lambda t: t - 2),
        "@hqq",
        f"{FIRST}.W_q: expected torch.uint8 [32, 32], got torch.uint8 [64, 32]",
    ),
    ("gguf cut", _cut("gguf/model.gguf", -40), "@gguf/model.gguf", "model.gguf"),
    ("gguf tiny", _cut("gguf/model.gguf", 20), "@gguf/model.gguf", "model.gguf"),
    ("gguf version", _patch("gguf/model.gguf", 4, b"\x09\0\0\0"), "@gguf/model.gguf", "version"),
    ("gguf tensor count", _patch("gguf/model.gguf", 8, b"\xff" * 8), "@gguf/model.gguf", "model.gguf"),
    ("gguf key twice", _again("gguf/model.gguf", 24, 8 + 20 + 4 + 8 + 5), "@gguf/model.gguf", "stands twice"),
    ("gguf nested arrays", _nested, "@gguf/model.gguf", "nested array"),
    ("gguf key count", _patch("gguf/model.gguf", 16, b"\xff" * 8), "@gguf/model.gguf", "model.gguf"),
]


@pytest.mark.parametrize(("damage", "model", "sentence"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_quantize(place: Path, damage: Damage, model: str, sentence: str) -> None:
    damage(place / "in")
    _refused(place, f"quantize {model} -o %out/deep", sentence)


@pytest.mark.parametrize(
    ("damage", "model", "sentence"),
    [row[1:] for row in MODELS + QUANTIZED if row[0] != "NaN"],
    ids=[row[0] for row in MODELS + QUANTIZED if row[0] != "NaN"],
)
def test_every_command_that_takes_a_model(place: Path, damage: Damage, model: str, sentence: str) -> None:
    damage(place / "in")
    for line in (
        f"train {model} --data @data.txt -o %out/deep --max-steps 1",
        f"fold {model} @adapter -o %out/deep",
        f"export {model} --to gguf -o %out/deep",
        f"verify {model} @gptq --level weights",
        f"release {model} --adapter @adapter --to gguf -o %out/deep",
    ):
        _refused(place, line, sentence)


ADAPTERS: list[tuple[str, Damage, str, str]] = [
    ("missing", _nothing, "%absent", "absent"),
    ("of another model", _nothing, "@other_adapter", "it is an adapter of another model"),
    ("cut", _cut("adapter/adapter_model.safetensors", -1), "@adapter", "truncated"),
    ("config is no JSON", _cut("adapter/adapter_config.json", 9), "@adapter", "adapter_config.json"),
    ("pickle", _pickled_adapter, "@adapter", "convert_pickle.py"),
    (
        "NaN",
        _tensor(
            "adapter/adapter_model.safetensors", f"base_model.model.{FIRST}.lora_A.weight", lambda t: t * torch.nan
        ),
        "@adapter",
        FIRST,
    ),
    (
        "wrong rank",
        _tensor("adapter/adapter_model.safetensors", f"base_model.model.{FIRST}.lora_A.weight", lambda t: t[1:]),
        "@adapter",
        FIRST,
    ),
    (
        "ordinary LoRA",
        _tensor(
            "adapter/adapter_model.safetensors",
            f"base_model.model.{FIRST}.lora_A.weight",
            lambda t: t.repeat_interleave(32, dim=1),
        ),
        "@adapter",
        FIRST,
    ),
]


@pytest.mark.parametrize(
    ("damage", "adapter", "sentence"), [row[1:] for row in ADAPTERS], ids=[row[0] for row in ADAPTERS]
)
def test_every_command_that_takes_an_adapter(place: Path, damage: Damage, adapter: str, sentence: str) -> None:
    damage(place / "in")
    for line in (
        f"fold @qalora {adapter} -o %out/deep",
        f"export @qalora --adapter {adapter} --to gguf --to onnx -o %out/deep",
        f"verify @qalora @gptq --adapter {adapter} --level weights",
        f"release @qalora --adapter {adapter} --to gguf -o %out/deep",
    ):
        _refused(place, line, sentence)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_onnx_outside, "a plain name inside the folder"),
        (_cut("onnx/model.onnx.data", -5000), "a file that is shorter"),
        (_cut("onnx/model.onnx", 100), "expected an ONNX model"),
        (lambda root: (root / "onnx" / "model.onnx.data").unlink(), "model.onnx.data"),
        (_config("onnx/config.json", hidden_size=-1), "hidden_size"),
        (_cut("gguf/model.gguf", -40), "truncated"),
        (_cut("gptq/model.safetensors", -1), "truncated"),
        (_cut("mlx/model.safetensors", -1), "truncated"),
        (_cut("hqq/model.safetensors", -1), "truncated"),
    ],
)
def test_artefacts(place: Path, damage: Damage, sentence: str) -> None:
    """All artefacts of a folder are read before one is run, so a damaged one is bad input and no failed gate."""
    damage(place / "in")
    _refused(place, "verify @qalora @gptq @gguf @onnx @mlx @hqq", sentence)


def test_a_tokenizer_that_transformers_does_not_take(place: Path) -> None:
    """Wherever a command needs it: to train, to calibrate, to compare it, and for a text to run on."""
    for form in ("float", "qalora"):
        (place / "in" / form / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    sentence = ": its tokenizer cannot be loaded (AttributeError: 'list' object has no attribute 'get')"
    for line in (
        "train @qalora --data @data.txt -o %out/deep --max-steps 1",
        "quantize @float --calibration @data.txt --method gptq -o %out/deep",
        "verify @qalora @gptq --level weights",
        "verify @gptq @qalora --level weights",
        "verify @qalora @gptq --level logits",
    ):
        _refused(place, line, sentence)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("quantize @float -o %exists", "exists already"),
        ("quantize @float -o %exists --force", "does not look like an earlier output"),
        ("quantize @float -o %in/data.txt", "exists already"),
        ("quantize @float -o %out --bits 7", "--bits: expected one of 2, 3, 4, 5, 6, 8, auto, got 7"),
        (
            "quantize @float -o %out --group-size 48",
            f"{FIRST}.weight: group_size: expected a divisor of in = 64, got 48",
        ),
        ("quantize @float -o %out --group-size many", "expected an integer >= 1, or row"),
        ("quantize @qalora -o %out", "--requantize"),
        ("quantize @float", "Missing option '-o'"),
        ("train @float --data @data.txt -o %out", "qalora quantize"),
        ("train @qalora --data %absent.txt -o %out", "absent.txt"),
        ("train @qalora --data @data.txt -o %exists", "exists"),
        ("train @qalora --data @data.txt -o %out --rank 0", "rank"),
        ("train @qalora --data @data.txt -o %out --pool-size 48", "48"),
        ("fold @float @adapter -o %out", "qalora quantize"),
        ("fold @qalora @adapter -o %exists", "exists already"),
        ("export @qalora --to gguf -o %in/data.txt", "data.txt"),
        ("export @qalora --to pickle -o %out", "expected one of gptq, gguf, onnx, mlx"),
        ("export @qalora --to gptq --gptq-form round -o %out", "--allow-loss zeros"),
        ("export @qalora --to gguf -o %in", "exists already"),
        ("quantize @float -o @float --force", "apart from what is read"),
        ("quantize @float -o /proc/nowhere/out", "/proc/nowhere"),
        ("adapter convert @adapter --to peft -o @adapter --force", "apart from what is read"),
        ("fold @qalora @adapter -o @adapter --force", "apart from what is read"),
        ("export @qalora --to gguf --allow-loss nonsense -o %out", "one of zeros, minima, scales, eight-bit, residual"),
        (
            "release @qalora --to gguf --allow-loss nonsense -o %out",
            "one of zeros, minima, scales, eight-bit, residual",
        ),
        ("export @qalora --to mlx --max-shard-size 5XB -o %out", "a size such as 200MB, 5GB or 4GiB, got '5XB'"),
        ("quantize @float -o %out --max-shard-size 0GB", "a size such as 200MB"),
        ("fold @qalora @adapter -o %out --max-shard-size 5iB", "a size such as 200MB"),
        ("verify @qalora %absent", "absent"),
        ("verify @qalora @gguf --level weights --report @float/config.json", "exists already"),
        ("verify @qalora @float/config.json", "config.json"),
        ("inspect %absent", "no such file or folder"),
        ("inspect @adapter --base %absent", "no such file or folder"),
        ("inspect @data.txt", "expected a GGUF or ONNX file or a model folder"),
        ("export @qalora --to gguf --lora-slots @adapter -o %out", "--lora-slots: expected onnx among the formats"),
        ("export @qalora --to onnx --lora-slots %absent -o %out", "absent"),
        ("export @qalora --to onnx --lora-slots @other_adapter -o %out", "--lora-slots: model.layers.1"),
        ("adapter convert @adapter --to gguf-lora -o %out", "give --base MODEL"),
        ("adapter convert @adapter --to gguf-lora --base @qalora -o @data.txt", "exists already"),
        ("adapter convert @other_adapter --to gguf-lora --base @qalora -o %out", "it is an adapter of another model"),
        ("adapter convert @adapter --to onnx-adapter -o %exists", "exists already"),
        ("release @qalora --to gguf -o %exists", "exists already"),
        ("adapter convert %absent --to peft -o %out", "absent"),
        ("adapter convert @adapter --to peft -o %exists", "exists"),
        ("demo -o %exists", "exists already"),
        ("nonsense", "No such command"),
    ],
)
def test_lines_that_cannot_be(place: Path, line: str, sentence: str) -> None:
    _refused(place, line, sentence)


@pytest.mark.parametrize(
    "line",
    [
        "quantize @float -o %out",
        "fold @qalora @adapter -o %out",
        "export @qalora --to gptq -o %out",
        "export @qalora --to gguf -o %out",
        "export @qalora --to onnx -o %out",
        "export @qalora --to mlx -o %out",
        "export @qalora --to gptq --max-shard-size 10kB -o %out",
        "export @qalora --to hqq -o %out",
        "release @qalora --adapter @adapter --to gguf -o %out",
        "adapter convert @adapter --to peft -o %out",
        "adapter convert @adapter --to gguf-lora --base @qalora -o %out",
        "adapter convert @adapter --to onnx-adapter --base @qalora -o %out",
    ],
)
def test_no_space_left(place: Path, line: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2000, hard)
    )  # a real limit of the operating system: writes fail with EFBIG
    try:
        _refused(place, line, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_paths_that_are_not_utf_8(place: Path) -> None:
    """They are shown, and written into reports, with the byte's number."""
    import os
    from xml.dom import minidom

    odd = place / os.fsdecode(b"mod\xffel")
    shutil.copytree(place / "in" / "qalora", odd)
    shown = CliRunner().invoke(main, ["inspect", str(odd), "--quick"])
    assert shown.exit_code == 0, repr(shown.exception)
    assert r"mod\udcffel" in shown.stdout
    told = CliRunner().invoke(main, ["inspect", str(odd), "--quick", "--json"])
    assert told.exit_code == 0, repr(told.exception)
    assert json.loads(told.stdout)["path"] == str(odd)
    files = {kind: place / f"report.{kind}" for kind in ("json", "html", "xml")}
    words = [word for file in files.values() for word in ("--report", str(file))]
    proven = CliRunner().invoke(main, ["verify", str(place / "in" / "qalora"), str(odd), "--level", "weights", *words])
    assert proven.exit_code == 0, repr(proven.exception)
    assert json.loads(files["json"].read_text("utf-8"))["artifacts"][0]["name"] == odd.name
    assert r"mod\udcffel" in files["html"].read_text("utf-8")
    assert minidom.parseString(files["xml"].read_bytes())
    missing = CliRunner().invoke(main, ["inspect", str(odd / "absent")])
    assert missing.exit_code == 2
    assert r"mod\udcffel" in missing.stderr


def test_an_act_order_checkpoint_cannot_be_folded(place: Path) -> None:
    from dataclasses import replace

    model = quantize(load(place / "in" / "float"), bits=4, group_size=32, zeros="integer")
    name = f"{FIRST}.weight"
    lazy = model.tensors[name]
    assert lazy.spec is not None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32) // 32
    shuffled = replace(
        lazy,
        spec=replace(lazy.spec, act_order=True),
        read=lambda start, stop: replace(lazy.read(start, stop), g_idx=order),
    )
    export(replace(model, tensors={**model.tensors, name: shuffled}), ["qalora"], place / "acts")
    _refused(place, "fold %acts/qalora @adapter -o %out", "act-order")
    _refused(place, "export %acts/qalora --to gguf -o %out", "act-order")
