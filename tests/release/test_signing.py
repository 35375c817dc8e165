"""model.sig: signed and checked by us, checked by model-signing's own command, and each fault named in one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from forks import Forks
from qalora.errors import FormatError, InputError, MissingLibraryError, OutputError
from qalora.releasing.checksums import check_sums, write_sums
from qalora.releasing.signing import SIGNATURE, check_key, sign, verify_signature


def write_key(path: Path, private: object, *, password: str | None = None, form: str = "PKCS8") -> Path:
    """`path` and `path`.pub, in PEM."""
    locked = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    )
    formats = {"PKCS8": serialization.PrivateFormat.PKCS8, "SEC1": serialization.PrivateFormat.TraditionalOpenSSL}
    pem = serialization.Encoding.PEM
    path.write_bytes(private.private_bytes(pem, formats[form], locked))  # type: ignore[attr-defined]
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    path.with_suffix(".pub").write_bytes(public)
    return path


def model_signing(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("keys") / "key", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """A folder of the form of a release, with files that model-signing ignores by default."""
    folder = tmp_path / "dist"
    for name in (
        "README.md",
        "gptq/model.safetensors",
        "gguf/tiny-Q4_1.gguf",
        ".gitignore",
        ".github/x",
        "gptq/.git/y",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"the bytes of {name}".encode())
    write_sums(folder)
    return folder


def test_signed_and_checked_by_both(dist: Path, key: Path) -> None:
    sign(dist, key)
    verify_signature(dist, key.with_suffix(".pub"))
    check_sums(dist)
    words = ("verify", "key", dist, "--signature", dist / SIGNATURE, "--public_key", key.with_suffix(".pub"))
    assert model_signing(*words).returncode == 1, "it leaves out git's files, and then misses them"
    by_them = model_signing(*words, "--no-ignore-git-paths")
    assert by_them.returncode == 0, by_them.stdout + by_them.stderr
    (dist / "README.md").write_bytes(b"other")
    assert model_signing(*words, "--no-ignore-git-paths").returncode == 1


def test_checked_by_their_command_as_docs_have_it(dist: Path, key: Path) -> None:
    """A release has none of git's files; a download from the Hub has one, and needs no option for it either."""
    shutil.rmtree(dist / ".github")
    (dist / ".gitignore").unlink()
    sign(dist, key)
    (dist / ".gitattributes").write_text("*.gguf filter=lfs", encoding="utf-8")
    words = ("verify", "key", dist, "--signature", dist / SIGNATURE, "--public_key", key.with_suffix(".pub"))
    done = model_signing(*words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_signed_and_no_place_is_named(dist: Path, key: Path) -> None:
    import base64

    work = dist.rename(dist.parent / ".dist.abcdef")
    sign(work, key, name="dist")
    bundle = (work / SIGNATURE).read_text("utf-8")
    payload = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
    files = {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()}
    assert {item["name"] for item in payload["predicate"]["resources"]} == files - {SIGNATURE}
    assert payload["subject"][0]["name"] == "dist"
    assert str(dist.parent) not in json.dumps(payload)
    assert "abcdef" not in json.dumps(payload)


def test_a_signature_made_by_their_command(dist: Path, key: Path) -> None:
    """Theirs leaves out git's files by default: then they are named; with all files signed it is good."""
    words = ("sign", "key", dist, "--signature", dist / SIGNATURE, "--private_key", key)
    assert model_signing(*words).returncode == 0
    with pytest.raises(FormatError, match=r"dist/\.github/x: not signed in model\.sig"):
        verify_signature(dist, key.with_suffix(".pub"))
    done = model_signing(*words, "--no-ignore-git-paths")
    assert done.returncode == 0, done.stderr
    verify_signature(dist, key.with_suffix(".pub"))
    assert model_signing(*words, "--ignore-paths", dist / "gguf", "--no-ignore-git-paths").returncode == 0
    with pytest.raises(FormatError, match=r"tiny-Q4_1\.gguf: not signed"):
        verify_signature(dist, key.with_suffix(".pub"))


def change(name: str) -> Callable[[Path], object]:
    return lambda dist: (dist / name).write_bytes(b"the bytes of README.mD")


@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        (change("README.md"), r"dist/README\.md: changed since it was signed"),
        (change(".gitignore"), r"dist/\.gitignore: changed since it was signed"),
        (change("SHA256SUMS"), r"dist/SHA256SUMS: changed since it was signed"),
        (change("gguf/more.gguf"), r"dist/gguf/more\.gguf: not signed in model\.sig"),
        (lambda dist: (dist / "gguf/tiny-Q4_1.gguf").unlink(), r"tiny-Q4_1\.gguf: signed in model\.sig, and not there"),
        (lambda dist: (dist / "gguf/tiny-Q4_1.gguf").rename(dist / "b.gguf"), r"tiny-Q4_1\.gguf: signed in"),
        (lambda dist: (dist / SIGNATURE).unlink(), r"model\.sig: expected a signature, got no such file"),
        (change(SIGNATURE), r"model\.sig: expected a signature of model-signing 1\.x"),
        (lambda dist: (dist / SIGNATURE).write_bytes(b"[" * 100_000), r"expected a signature of model-signing"),
        (lambda dist: (dist / "away").symlink_to(dist.parent), r"away: expected a file inside the model's folder"),
        (lambda dist: (dist / "away").symlink_to(dist / "gptq"), r"away: expected a file or a folder, got a link"),
        (lambda dist: os.mkfifo(dist / "pipe"), r"pipe: expected a file or a folder, got a link or device"),
    ],
)
def test_each_planted_change_is_named(dist: Path, key: Path, plant: Callable[[Path], object], sentence: str) -> None:
    sign(dist, key)
    plant(dist)
    with pytest.raises(InputError, match=sentence) as caught:
        verify_signature(dist, key.with_suffix(".pub"))
    assert "\n" not in str(caught.value)


def test_another_key(dist: Path, key: Path, tmp_path: Path) -> None:
    sign(dist, key)
    other = write_key(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(
        FormatError,
        match=r"expected a signature made with the key of .*other\.pub, got a signature made with a different key",
    ):
        verify_signature(dist, other.with_suffix(".pub"))


def edited(path: Path, edit: Callable[[dict], object]) -> None:
    bundle = json.loads(path.read_text("utf-8"))
    edit(bundle)
    path.write_text(json.dumps(bundle), encoding="utf-8")


def _relist(bundle: dict) -> None:
    import base64

    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"].pop()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (_relist, "edited since it was made"),
        (lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(sig="AAAA"), "edited since it was made"),
        (lambda bundle: bundle["dsseEnvelope"].update(signatures=[]), r"model\.sig: "),
        (lambda bundle: bundle["dsseEnvelope"].pop("payload"), "expected a signature of model-signing"),
        (
            lambda bundle: bundle.update(verificationMaterial={"certificate": {}}),
            "made with a key, got a signature without one",
        ),
        (lambda bundle: bundle.update(mediaType="x"), r"model\.sig: .*mediaType"),
        (
            lambda bundle: bundle["verificationMaterial"].pop("publicKey"),
            "made with a key, got a signature without one",
        ),
    ],
)
def test_an_edited_signature(dist: Path, key: Path, edit: Callable[[dict], object], sentence: str) -> None:
    sign(dist, key)
    edited(dist / SIGNATURE, edit)
    with pytest.raises(FormatError, match=sentence) as caught:
        verify_signature(dist, key.with_suffix(".pub"))
    assert "\n" not in str(caught.value)


def test_a_folder_from_the_hub(dist: Path, key: Path, tmp_path: Path) -> None:
    """A snapshot in the Hub's cache links to blobs, and has .gitattributes; `hf download --local-dir` leaves notes."""
    sign(dist, key)
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(dist, snapshot)
    (snapshot / "README.md").rename(blobs / "1")
    (snapshot / "README.md").symlink_to("../../blobs/1")
    (snapshot / ".gitattributes").write_text("*.gguf filter=lfs", encoding="utf-8")
    (snapshot / ".cache" / "huggingface").mkdir(parents=True)
    (snapshot / ".cache" / "huggingface" / "note").write_text("x", encoding="utf-8")
    verify_signature(snapshot, key.with_suffix(".pub"))
    check_sums(snapshot)
    (blobs / "1").write_text("other", encoding="utf-8")
    with pytest.raises(FormatError, match=r"README\.md: changed since it was signed"):
        verify_signature(snapshot, key.with_suffix(".pub"))


def test_a_link_is_not_signed(dist: Path, key: Path) -> None:
    (dist / "again").symlink_to("README.md")
    with pytest.raises(FormatError, match="again: expected a file to sign, got a link"):
        sign(dist, key)
    assert not (dist / SIGNATURE).exists()


def test_signed_again_on_request_alone(dist: Path, key: Path) -> None:
    sign(dist, key)
    first = (dist / SIGNATURE).read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        sign(dist, key)
    sign(dist, key, force=True)
    assert (dist / SIGNATURE).read_bytes() != first  # ECDSA draws a random number
    verify_signature(dist, key.with_suffix(".pub"))


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
@pytest.mark.parametrize("form", ["PKCS8", "SEC1"])
@pytest.mark.parametrize("password", [None, "geheim ß"])
def test_key_files(dist: Path, tmp_path: Path, curve: type, form: str, password: str | None) -> None:
    made = write_key(tmp_path / "key", ec.generate_private_key(curve()), form=form, password=password)
    sign(dist, made, password=password)
    verify_signature(dist, made.with_suffix(".pub"))


def test_keys_that_do_not_do(key: Path, tmp_path: Path) -> None:
    locked = write_key(tmp_path / "locked", ec.generate_private_key(ec.SECP256R1()), password="right")
    bad = {
        "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }
    (tmp_path / "garbage").write_bytes(os.urandom(300))
    (tmp_path / "empty").write_bytes(b"")
    cases: list[tuple[Path, str | None, str]] = [
        (locked, None, "an encrypted one and no password"),
        (locked, "wrong", "a wrong password"),
        (key, "some", "a password, and a key that has none"),
        (key.with_suffix(".pub"), None, "expected a private key in PEM"),
        (tmp_path / "garbage", None, "expected a private key in PEM"),
        (tmp_path / "empty", None, "expected a private key in PEM"),
        (tmp_path / "absent", None, "No such file"),
        (tmp_path, None, "expected a regular file"),
        *((write_key(tmp_path / name, made), None, "expected an elliptic curve key") for name, made in bad.items()),
    ]
    for path, password, sentence in cases:
        with pytest.raises(InputError, match=sentence) as caught:
            check_key(path, password=password)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["private", "garbage", "rsa"])
def test_public_keys_that_do_not_do(dist: Path, key: Path, tmp_path: Path, wrong: str) -> None:
    sign(dist, key)
    (tmp_path / "garbage").write_bytes(os.urandom(300))
    other = write_key(tmp_path / "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    paths = {"private": key, "garbage": tmp_path / "garbage", "rsa": other.with_suffix(".pub")}
    sentences = {"private": "got a private key", "garbage": "got a file that is no key", "rsa": "got RSA"}
    with pytest.raises(InputError, match=sentences[wrong]):
        verify_signature(dist, paths[wrong])


def test_without_the_library(dist: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr("qalora.releasing.signing.find_spec", lambda name: None)
    assert importlib.util.find_spec("model_signing") is not None
    for call in (lambda: sign(dist, key), lambda: verify_signature(dist, key.with_suffix(".pub"))):
        with pytest.raises(MissingLibraryError, match=re.escape("pip install 'qalora[sign]'")):
            call()


def test_no_import_before_it_is_needed(light_forks: Forks) -> None:
    code = (
        "import qalora.releasing.signing, sys; print(*{'model_signing', 'cryptography', 'OpenSSL'} & set(sys.modules))"
    )
    done = light_forks.run("-c", code)
    assert (done.returncode, done.stdout.split()) == (0, [])
