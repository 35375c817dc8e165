"""The work folder: results by the digest of what they are made of, whole or not at all, and nobody else's removed."""

import os
from pathlib import Path
from typing import Any

import pytest

from qalora.errors import InputError
from qalora.pipeline.steps import Result, Step, Store
from qalora.releasing.digests import file_digest


def step(kind: str = "make", **changes: Any) -> Step:
    return Step(kind=kind, name="thing", **{"options": {"n": 1}, "inputs": {"from": "sha256:1"}, **changes})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text("", encoding="utf-8")
    return tmp_path / "recipe.toml"


@pytest.fixture
def store(tmp_path: Path, recipe: Path) -> Store:
    return Store(tmp_path / "work", recipe)


def made(text: str = "content") -> Any:
    def action(place: Path) -> None:
        place.mkdir()
        (place / "file").write_text(text, encoding="utf-8")

    return action


def refused(place: Path) -> None:
    raise AssertionError("done again")


def done(store: Store, one: Step, action: Any = None) -> Result:
    with store.opened():
        store.use("label", one)
        return store.run(one, action or made())


def test_a_key_depends_on_everything() -> None:
    keys = {
        one.key
        for one in (
            step(),
            step("other"),
            step(options={"n": 2}),
            step(inputs={"from": "sha256:2"}),
            step(libraries={"torch": "1"}),
        )
    }
    assert len(keys) == 5
    assert step().key == step().key
    assert step(inputs={"from": None}).key is None


def test_a_result_is_found_again(store: Store, recipe: Path) -> None:
    assert store.found(step()) is None
    result = done(store, step())
    again = Store(store.folder, recipe)
    assert again.found(step()) == result
    assert result.nbytes == len("content")
    assert again.found(step(options={"n": 2})) is None


@pytest.mark.parametrize("change", ["text", "more", "less", "record"])
def test_a_result_that_changed_is_made_again(store: Store, recipe: Path, change: str) -> None:
    place = done(store, step()).path
    if change == "text":
        (place / "file").write_text("CONTENT", encoding="utf-8")
    elif change == "more":
        (place / "other").touch()
    elif change == "less":
        (place / "file").unlink()
    else:
        next((store.folder / "make").glob("*.json")).write_text("{", encoding="utf-8")
    again = Store(store.folder, recipe)
    assert again.found(step()) is None
    assert done(again, step()).path == place
    assert (place / "file").read_text("utf-8") == "content"
    assert sorted(one.name for one in place.iterdir()) == ["file"]


def test_an_interrupted_step_leaves_nothing_that_counts(store: Store, recipe: Path) -> None:
    def stopped(place: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done(store, step(), stopped)
    again = Store(store.folder, recipe)
    assert again.found(step()) is None
    assert done(again, step()).path.is_dir()


def test_a_whole_result_without_record_is_taken(store: Store, recipe: Path) -> None:
    """Interrupted between the rename and the record."""
    result = done(store, step())
    next((store.folder / "make").glob("*.json")).unlink()
    again = Store(store.folder, recipe)
    assert again.found(step()) is None
    assert done(again, step(), refused).digest == result.digest


def test_digests_are_of_contents_and_are_remembered(tmp_path: Path, store: Store, recipe: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "weights").write_bytes(b"1")
    (model / "deep" / "config").write_bytes(b"2")
    (model / ".hidden").write_bytes(b"3")
    (model / "out").mkdir()
    (model / "out" / "file").write_bytes(b"4")
    (model / "link").symlink_to(tmp_path)
    files = store.files(model, skip=[model / "out"])
    assert files == {"deep/config": file_digest(model / "deep" / "config"), "weights": file_digest(model / "weights")}
    before = store.digest(model)
    old = 1_000_000_000
    os.utime(model / "weights", (old, old))
    assert store.digest(model) == before
    (model / "weights").write_bytes(b"9")
    os.utime(model / "weights", (old, old))  # same size, time and inode: what a memo cannot tell
    assert store.digest(model) == before
    os.utime(model / "weights", (old, old + 1))
    assert store.digest(model) != before


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    status = file.stat()
    before = store.digest(file)
    file.write_bytes(b"2")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.digest(file) != before


def test_what_no_recipe_used_last_is_removed(tmp_path: Path, store: Store, recipe: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("", encoding="utf-8")
    old, new, shared, begun = (step(options={"n": n}) for n in range(4))
    done(store, old)
    neighbour = Store(store.folder, other)
    done(neighbour, shared)
    with neighbour.opened():
        neighbour.finish({})
        neighbour.use("again", begun)  # a run that was interrupted
    done(neighbour, begun)
    mine = Store(store.folder, recipe)
    done(mine, new)
    with mine.opened():
        mine.finish({"key": "k"})
    assert [mine.found(one) is not None for one in (old, new, shared, begun)] == [False, True, True, True]
    other.unlink()
    mine = Store(store.folder, recipe)
    with mine.opened():
        mine.use("label", new)
        mine.finish({})
    assert [mine.found(one) is not None for one in (new, shared, begun)] == [True, False, False]
    assert Store(store.folder, recipe).last["released"] == {}


def test_results_are_kept_on_request(store: Store, recipe: Path) -> None:
    done(store, step())
    again = Store(store.folder, recipe)
    done(again, step(options={"n": 2}))
    with again.opened():
        again.finish({}, keep=True)
    assert again.found(step()) is not None


def test_a_folder_with_other_things_is_refused(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear", encoding="utf-8")
    with pytest.raises(InputError, match="holds files that no recipe made"):
        Store(tmp_path / "home", recipe)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a file or a link"):
        Store(tmp_path / "link", recipe)
    with pytest.raises(InputError, match="a file or a link"):
        Store(recipe, recipe)
    assert (tmp_path / "home" / "letters").read_text("utf-8") == "dear"


def test_one_run_at_a_time(store: Store, recipe: Path) -> None:
    with store.opened(), pytest.raises(InputError, match="in use by another run"), Store(store.folder, recipe).opened():
        pass
    with Store(store.folder, recipe).opened():
        assert (store.folder / "lock").exists()


def test_how_long_it_took(store: Store, recipe: Path) -> None:
    assert store.seconds("label") is None
    with store.opened():
        store.took("label", 1.5)
    assert Store(store.folder, recipe).seconds("label") == 1.5


def test_damaged_records_are_none(store: Store, recipe: Path) -> None:
    done(store, step())
    for path in store.folder.rglob("*.json"):
        path.write_bytes(b"[" * 100_000)
    again = Store(store.folder, recipe)
    assert again.found(step()) is None
    assert again.seconds("label") is None
    assert done(again, step()).path.is_dir()
