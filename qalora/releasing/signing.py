"""model.sig: a signature over every file of a release but itself, as OpenSSF's model-signing writes and reads it.

The file is a Sigstore bundle (JSON): a DSSE envelope around an in-toto statement that lists each file with its SHA-256
(predicate https://model_signing/signature/v1.0). A key is an elliptic curve one (P-256, P-384 or P-521) in PEM; nothing
here needs a network. `model_signing verify key DIST --signature DIST/model.sig --public_key KEY.pub` checks it as well.

ECDSA draws a random number for each signature, so model.sig differs from run to run, alone among the files of a
release; SHA256SUMS leaves it out for that reason.

model-signing by itself leaves out whatever the signature tells it to, and .gitignore and .github by default. Here the
files that must be signed are those of `release_files`, all of them, whatever the signature says, and the first one at
fault is named. Nothing here makes keyless signatures (docs/release.md has the commands), or knows certificates.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from qalora.errors import FormatError, InputError, MissingLibraryError
from qalora.formats.files import read_limited
from qalora.formats.output import check_output, new_file
from qalora.releasing.checksums import HUBS, SIGNATURE, release_files

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from model_signing.hashing import Config

__all__ = ["SIGNATURE", "check_key", "sign", "verify_signature"]

CURVES = ("secp256r1", "secp384r1", "secp521r1")
_KEY_BYTES = 1 << 20
_SIGNATURE_BYTES = 64 << 20
_ALGORITHM = "sha256"


def sign(folder: Path, key: Path, *, password: str | None = None, name: str | None = None, force: bool = False) -> None:
    """Write `folder/model.sig` over every other file below `folder`.

    key: a private key in PEM (PKCS #8, SEC 1, or PKCS #8 encrypted with `password`). name: what the signature calls the
    model, the folder's own name by default; it is informative. Raises InputError for a key that cannot be used,
    FormatError for a link or a device in the folder, OutputError where a signature exists and `force` is not set.
    """
    check_key(key, password=password)
    for file in release_files(folder):
        if (folder / file).is_symlink():
            raise FormatError(f"{folder / file}: expected a file to sign, got a link; copy the file there")
    from model_signing import signing

    config = signing.Config().use_elliptic_key_signer(
        private_key=key,
        password=None if password is None else password.encode(),  # type: ignore[arg-type]  # its hint says str
    )
    config.set_hashing_config(_hashing(name or folder.resolve().name))
    check_output(folder / SIGNATURE, force=force)
    with tempfile.TemporaryDirectory() as place:  # outside of the folder, all of which is signed
        made = Path(place, SIGNATURE)
        config.sign(folder, made)
        with new_file(folder / SIGNATURE, force=force) as out:
            out.write_bytes(made.read_bytes())


def verify_signature(folder: Path, public_key: Path) -> None:
    """Check `folder/model.sig` against the key and against every other file below `folder`.

    public_key: PEM (SubjectPublicKeyInfo). Raises FormatError for what is wrong: another key, an edited signature, a
    file that differs, is missing, or is not signed; InputError for a key that cannot be read. What the Hub's clients
    put into a folder (see `release_files`) need not be signed.
    """
    _need_library()
    path = folder / SIGNATURE
    if not path.exists():
        raise InputError(str(path), expected="a signature", got="no such file", todo="the release is not signed")
    key = _public_key(public_key)
    present = set(release_files(folder)) - {SIGNATURE}
    content = read_limited(path, _SIGNATURE_BYTES)
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    config.set_hashing_config(_hashing(folder.name).set_allow_symlinks(True))  # release_files knows the links
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning about signatures of old versions
            config.verify(folder, path)
    except Exception as error:  # the file is untrusted: whatever its reader raises says that it is no good
        raise _fault(folder, content, key, public_key, error) from error
    _compare_names(folder, _signed(path, content), present)


def check_key(key: Path, *, password: str | None = None) -> None:
    """Raise InputError, before any long work, unless `key` is a private key that `sign` can use."""
    _need_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = read_limited(key, _KEY_BYTES)
    secret = None if password is None else password.encode()
    try:
        private = load_pem_private_key(content, secret)
    except TypeError as error:  # encrypted and no password, or a password and not encrypted
        got = "an encrypted one and no password" if secret is None else "a password, and a key that has none"
        raise InputError(str(key), expected="a private key", got=got) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = secret is not None and b"ENCRYPTED" in content
        got = "a wrong password, or a damaged file" if wrong else "a file that is no key"
        raise InputError(str(key), expected="a private key in PEM", got=got) from error
    _check_curve(key, private)


def _need_library() -> None:
    if find_spec("model_signing") is None or find_spec("OpenSSL") is None:
        raise MissingLibraryError("model-signing", "a signature", "sign")


def _hashing(name: str) -> Config:
    """Every file whole, by SHA-256, but the signature and what the Hub's clients add. `name`: the model's."""
    from model_signing import hashing, manifest

    class ConfigWithName(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            content = super().hash(model_path, files_to_hash=files_to_hash)
            items = [
                manifest.FileManifestItem(path=PurePosixPath(item.identifier), digest=item.digest)
                for item in content.resource_descriptors()
            ]
            form = {**content.serialization_type, "ignore_paths": sorted(content.serialization_type["ignore_paths"])}
            return manifest.Manifest(name, items, manifest.SerializationType.from_args(form))

    config: Config = ConfigWithName().use_file_serialization(hashing_algorithm="sha256")  # type: ignore[no-untyped-call]
    config.set_ignored_paths(paths=[SIGNATURE, *HUBS], ignore_git_paths=False)
    return config


def _public_key(path: Path) -> EllipticCurvePublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = read_limited(path, _KEY_BYTES)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        got = "a private key" if b"PRIVATE KEY" in content else "a file that is no key"
        raise InputError(str(path), expected="a public key in PEM", got=got) from error
    _check_curve(path, key)
    return cast("EllipticCurvePublicKey", key)


def _check_curve(path: Path, key: object) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        kind = curve or type(key).__name__.strip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
        raise InputError(str(path), expected=f"an elliptic curve key ({', '.join(CURVES)})", got=kind)


def _signed(path: Path, content: bytes) -> dict[str, str]:
    """The files that a signature lists, each with its digest in hexadecimal."""
    try:
        payload = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"], validate=True))
        listed = payload["predicate"]["resources"]
        signed = {str(item["name"]): str(item["digest"]) for item in listed if item["algorithm"] == _ALGORITHM}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            str(path), expected="a signature of model-signing 1.x", got="content that it does not write"
        ) from error
    if len(signed) != len(listed):
        raise FormatError(str(path), expected=f"one {_ALGORITHM} digest for each file")
    return signed


def _fault(
    folder: Path, content: bytes, key: EllipticCurvePublicKey, public_key: Path, error: Exception
) -> FormatError:
    """The sentence for a signature that model-signing refused."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    path = folder / SIGNATURE
    signed = _signed(path, content)
    material = json.loads(content).get("verificationMaterial")
    hint = material.get("publicKey") if isinstance(material, dict) else None
    if not isinstance(hint, dict):
        return FormatError(
            str(path), expected="a signature made with a key", got="a signature without one", todo="see docs/release.md"
        )
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if hint.get("hint") not in (None, hashlib.sha256(pem).hexdigest()):
        return FormatError(
            str(path),
            expected=f"a signature made with the key of {public_key}",
            got="a signature made with a different key",
        )
    if isinstance(error, InvalidSignature):
        return FormatError(f"{path}: edited since it was made, or made with another key than that of {public_key}")
    try:
        _compare_names(folder, signed, set(release_files(folder)) - {SIGNATURE})
        _compare_digests(folder, signed)
    except FormatError as fault:
        return fault
    return FormatError(f"{path}: {' '.join(str(error).split())[:300] or type(error).__name__}")


def _compare_names(folder: Path, signed: dict[str, str], present: set[str]) -> None:
    """FormatError for the first file that is missing or is not signed."""
    for name in sorted(set(signed) - present):
        raise FormatError(f"{folder / name}: signed in {SIGNATURE}, and not there")
    for name in sorted(present - set(signed)):
        raise FormatError(f"{folder / name}: not signed in {SIGNATURE}")


def _compare_digests(folder: Path, signed: dict[str, str]) -> None:
    """FormatError for the first file that differs."""
    for name, digest in sorted(signed.items()):
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, _ALGORITHM).hexdigest() != digest:
                raise FormatError(f"{folder / name}: changed since it was signed")
