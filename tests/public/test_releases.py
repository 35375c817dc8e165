"""Releases and recipes: every keyword does what it says, one effect for each, and none without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import qalora
from public_world import Effects, World, unrecorded
from qalora.adapter import read_adapter, write_adapter
from qalora.converters import load
from qalora.errors import InputError, OutputError
from qalora.folding import fold
from qalora.options.export import Export
from qalora.options.release import Package
from qalora.options.verify import Verify
from qalora.testing import assert_same_model

effect = Effects("releases")


# release and check


def released(world: World, name: str = "dist", **options: Any) -> Path:
    given = {"verify": Verify(max_tokens=24, generate=2), "adapter": world.adapter, **options}
    made = qalora.release(world.base, Export(targets=("qalora",)), Package(out=world.out / name), **given)
    assert made.folder == world.out / name
    return made.folder


@effect("release", "model", "export", "package", "adapter", "verify", "force")
def _(world: World) -> None:
    dist = released(world, verify=Verify(level="weights"))
    assert_same_model(load(dist / "qalora"), fold(world.base, world.adapter))
    assert json.loads((dist / "report.json").read_text("utf-8"))["level"] == "weights"
    assert (dist / "adapter").is_dir()
    export, package = Export(targets=("gguf",), name="Ours"), Package(out=dist, with_adapter=False, license="mit")
    with pytest.raises(OutputError, match="exists already"):
        qalora.release(world.out / "nothing", export, package)
    made = qalora.release(world.base, export, package, force=True, verify=Verify(level="weights"))
    assert not (dist / "adapter").exists()
    assert "license: mit" in (dist / "README.md").read_text("utf-8")
    assert [plan.target for plan in made.plans] == ["gguf"]


@effect("release", "convention")
def _(world: World) -> None:
    place = unrecorded(world)
    with pytest.raises(InputError, match="give `convention`"):
        released(world, adapter=place)
    dist = released(world, adapter=place, convention="official", verify=Verify(level="weights"))
    assert_same_model(load(dist / "qalora"), fold(world.base, read_adapter(place, world.base, convention="official")))


@effect("release", "password", "watch")
def _(world: World) -> None:
    key = signing_key(world.out / "key", password="open")
    package = Package(out=world.out / "dist", sign=key)
    export, verify = Export(targets=("qalora",)), Verify(level="weights")
    with pytest.raises(InputError, match="password"):
        qalora.release(world.base, export, package, password="shut")
    told: list[Any] = []
    watch = qalora.Watch(judged=told.append, done=told.append)
    made = qalora.release(world.base, export, package, password="open", verify=verify, watch=watch)
    assert told == [made.report, made]
    assert (world.out / "dist" / "model.sig").is_file()


@effect("check", "folder", "base", "adapter", "open_artifacts", "progress", "allow_unproven")
def _(world: World) -> None:
    """What is not asked of it is said to be skipped."""
    dist, told = released(world), []
    found = qalora.check(dist, base=world.base, progress=told.append)
    assert not found.findings
    assert not next(check for check in found.checks if check.question == "made again").skipped
    assert told
    skipped = {check.question for check in qalora.check(dist, open_artifacts=False).checks if check.skipped}
    assert {"opening", "made again"} <= skipped
    other = replace(world.adapter, layers=dict(list(world.adapter.layers.items())[1:]))
    write_adapter(other, world.out / "other")
    assert qalora.check(dist, base=world.base, adapter=world.out / "other", open_artifacts=False).findings
    assert qalora.check(dist, open_artifacts=False, allow_unproven=True).findings == ()
    (dist / "README.md").write_text("another", encoding="utf-8")
    assert qalora.check(dist, open_artifacts=False).findings


@effect("check", "public_key", "text", "template")
def _(world: World) -> None:
    key = signing_key(world.out / "key")
    (world.out / "words").write_text("some words " * 50, encoding="utf-8")
    (world.out / "card.md").write_text("---\n{{ card_data }}\n---\nOurs.\n", encoding="utf-8")
    qalora.release(
        world.base,
        Export(targets=("qalora",)),
        Package(out=world.out / "dist", sign=key, card_template=world.out / "card.md"),
        verify=Verify(text=world.out / "words", max_tokens=24, generate=2),
    )
    given = {"public_key": world.out / "key.pub", "base": world.base, "open_artifacts": False}
    read = {"text": "some words " * 50, "template": (world.out / "card.md").read_text("utf-8")}
    assert qalora.check(world.out / "dist", **given, **read).findings == ()
    without = qalora.check(world.out / "dist", open_artifacts=False)
    assert {"signature", "card"} <= {check.question for check in without.checks if check.skipped}
    signing_key(world.out / "another")
    assert qalora.check(world.out / "dist", **{**given, "public_key": world.out / "another.pub"}, **read).findings


def signing_key(path: Path, password: str | None = None) -> Path:
    """A private key, and its public one at `<path>.pub`."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_name(f"{path.name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    return path


# run


@effect("run", "recipe", "force", "dry_run", "watch")
def _(world: World) -> None:
    qalora.save(world.base, world.out / "base")
    recipe = world.out / "recipe.toml"
    lines = (
        '[base]\nmodel = "base"\n[export]\nto = ["qalora"]\n[verify]\nlevel = "weights"\n[release]\noutput = "dist"\n'
    )
    recipe.write_text(lines, encoding="utf-8")
    told: list[tuple[str, str]] = []
    watch = qalora.Watch(step=lambda step, state, seconds: told.append((step, state)))
    assert {row.state for row in qalora.run(recipe, dry_run=True, watch=watch)} == {"to do"}
    assert not (world.out / "dist").exists()
    assert not told
    qalora.run(str(recipe), watch=watch)
    assert ("release", "finished") in told
    assert {row.state for row in qalora.run(recipe)} == {"reused"}
    (world.out / "dist" / "README.md").write_text("another", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        qalora.run(recipe)
    qalora.run(recipe, force=True)
    assert qalora.check(world.out / "dist", open_artifacts=False).findings == ()


# all of them


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's dynamic INT8
@effect.parametrized()
def test_a_keyword_does_what_it_says(proof: Callable[[World], None], world: World) -> None:
    proof(world)


def test_every_keyword_has_an_effect_here() -> None:
    assert not effect.missing()
