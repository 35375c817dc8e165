"""What one command makes of a tiny model: signed, with a delta that rebuilds it, ready to be uploaded; and checked."""

import filecmp
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from qalora.adapter import write_adapter
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama

TO = ["--to", "gguf", "--to", "mlx", "--max-tokens", 24, "--generate", 2]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, adapter, a key, and base-dist: the base without adapter."""
    root = tmp_path_factory.mktemp("packaging")
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    model = quantize(load(root / "float"), bits=4, group_size=32)
    export(model, ["qalora"], root / "model")
    write_adapter(random_adapter(model, rank=2, seed=1, a_size=1.0, b_size=0.02), root / "adapter")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"open")
    )
    (root / "key").write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (root / "key.pub").write_bytes(public)
    done = run("release", root / "model" / "qalora", "-o", root / "base-dist", *TO)
    assert done.exit_code == 0, done.output
    return root


@pytest.fixture(scope="module")
def made(place: Path) -> Result:
    os.environ["QALORA_SIGN_PASSWORD"] = "open"
    words = ["release", place / "model" / "qalora", "--adapter", place / "adapter", "-o", place / "dist", *TO]
    words += ["--sign", place / "key"]
    words += ["--license", "mit", "--language", "en", "--quantized-by", "me", "--base-model", "them/tiny"]
    try:
        return run(*words)
    finally:
        del os.environ["QALORA_SIGN_PASSWORD"]


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_release_is_ready_to_be_uploaded(place: Path, made: Result) -> None:
    assert made.exit_code == 0, made.output
    assert (place / "dist" / "model.sig").is_file()
    shown = run("push", place / "dist", "me/tiny")
    assert shown.exit_code == 0, shown.output
    assert "nothing was sent; --upload sends it" in shown.stdout
    card = (place / "dist" / "README.md").read_text("utf-8")
    for line in ("license: mit", "- en", "quantized_by: me", "base_model: them/tiny"):
        assert line in card


def test_it_passes_its_check_signature_and_all(place: Path, made: Result) -> None:
    words = ["check", place / "dist", "--public-key", place / "key.pub"]
    good = run(*words, "--base", place / "model" / "qalora", "--adapter", place / "adapter", "--json")
    assert good.exit_code == 0, good.output
    stages = json.loads(good.stdout)["stages"]
    assert not [stage for stage in stages if stage["skipped"] or stage["findings"]]
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (place / "other.pub").write_bytes(pem)
    bad = run("check", place / "dist", "--public-key", place / "other.pub", "--no-open")
    assert bad.exit_code == 1
    assert "model.sig: " in bad.stderr


def test_the_delta_makes_the_very_release(place: Path, made: Result, tmp_path: Path) -> None:
    done = run("delta", "make", place / "base-dist", place / "dist", "-o", place / "dist.delta")
    assert done.exit_code == 0, done.output
    done = run("delta", "apply", place / "dist.delta", place / "base-dist", "-o", tmp_path / "dist")
    assert done.exit_code == 0, done.output
    names = sorted(path.relative_to(place / "dist") for path in (place / "dist").rglob("*") if path.is_file())
    there = sorted(path.relative_to(tmp_path / "dist") for path in (tmp_path / "dist").rglob("*") if path.is_file())
    assert names == there
    same, other, odd = filecmp.cmpfiles(place / "dist", tmp_path / "dist", [str(name) for name in names], shallow=False)
    assert (len(same), other, odd) == (len(names), [], [])
    checked = run("check", tmp_path / "dist", "--public-key", place / "key.pub", "--no-open")
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sign", "absent.key"], "absent.key"),
        (["--card-template", "absent.md"], "absent.md"),
    ],
)
def test_what_is_wrong_is_said_before_the_long_work(
    place: Path, tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("release", place / "model" / "qalora", "--to", "gguf", "-o", "dist", *words)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
