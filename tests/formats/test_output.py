"""An output appears whole or not at all."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qalora.errors import InputError, OutputError
from qalora.formats.files import InputFile, OutputFile
from qalora.formats.output import check_apart, check_output, check_writable, left_beside, new_file, new_folder


def _everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as work:
        (work / "file").write_text("x", encoding="utf-8")
        assert not (tmp_path / "a" / "b").exists()
    assert _everything(tmp_path) == ["a", "a/b", "a/b/file"]


def test_nothing_is_left_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b") as work:
        (work / "file").write_text("x", encoding="utf-8")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_file(tmp_path / "c" / "d") as file:
        file.write_text("x", encoding="utf-8")
        raise RuntimeError
    assert _everything(tmp_path) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    for write in (
        "with new_folder(path) as work: (work / 'file').touch(); end()",
        "with new_file(path) as work: end()",
    ):
        code = f"""
import os, pathlib, signal
from qalora.formats.output import new_file, new_folder
path = pathlib.Path({str(tmp_path / "a")!r})
end = lambda: (work.touch() if not work.is_dir() else None, os.kill(os.getpid(), signal.SIGKILL))
{write}
"""
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "a").exists() and ".a.partial" in _everything(tmp_path)
        with new_folder(tmp_path / "a") as work:
            assert not [*work.iterdir()]
            (work / "new").touch()
        assert _everything(tmp_path) == ["a", "a/new"]
        shutil.rmtree(tmp_path / "a")


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    busy = pytest.raises(OutputError, match="a: another run is writing it; wait for that run, or choose another place")
    with new_folder(tmp_path / "a") as work:
        (work / "file").write_text("first", encoding="utf-8")
        with busy, new_folder(tmp_path / "a"):
            pytest.fail("entered")
    assert (tmp_path / "a" / "file").read_text(encoding="utf-8") == "first"


def test_a_run_that_is_refused_leaves_the_layers_of_the_first(tmp_path: Path) -> None:
    with left_beside(tmp_path / "a", ".layers") as file:
        file.write_text("first", encoding="utf-8")
        with (
            pytest.raises(OutputError, match="another run is writing it"),
            left_beside(tmp_path / "a", ".layers"),
        ):
            pytest.fail("entered")
        assert file.read_text(encoding="utf-8") == "first"
    assert _everything(tmp_path) == []
    with pytest.raises(RuntimeError), left_beside(tmp_path / "b" / "a", ".layers") as file:
        file.touch()
        raise RuntimeError
    assert _everything(tmp_path) == []


def test_a_file_waits_for_the_run_that_writes_it(tmp_path: Path) -> None:
    begun, order = threading.Event(), []

    def second() -> None:
        begun.set()
        with new_file(tmp_path / "a", force=True) as work:
            order.append("second")
            work.write_text("second", encoding="utf-8")

    thread = threading.Thread(target=second)
    with new_file(tmp_path / "a") as work:
        thread.start()
        assert begun.wait(60)
        work.write_text("first", encoding="utf-8")
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "second" and _everything(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets two folders change their places")
def test_a_folder_is_never_away_while_it_is_replaced(tmp_path: Path) -> None:
    place, missing, end = tmp_path / "a", [], threading.Event()

    def watch() -> None:
        while not end.is_set():
            missing.append(not (place / "config.json").is_file())

    for _ in range(2):
        with new_folder(place, force=True, names=["config.json"]) as work:
            (work / "config.json").touch()
    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(200):
        with new_folder(place, force=True, names=["config.json"]) as work:
            (work / "config.json").touch()
    end.set()
    thread.join(60)
    assert missing and not any(missing)
    assert _everything(tmp_path) == ["a", "a/config.json"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"), new_folder(tmp_path / "a") as work:
        (work / "file").write_text("x", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert _everything(tmp_path) == []


def test_that_a_folder_cannot_be_made_is_known_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert _everything(tmp_path) == []
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in (tmp_path / "file" / "a", Path("/proc/a")):
        with pytest.raises(OutputError, match=f"^{place.parent}|{place}: "):
            check_writable(place)
    assert _everything(tmp_path) == ["file"]


def test_a_link_and_a_mount_are_no_outputs_even_when_empty(tmp_path: Path) -> None:
    """A folder is put in place by renaming, which neither allows: known before the work, not after it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for force in (False, True):
        with pytest.raises(OutputError, match="link: expected a name, got a link"):
            check_output(tmp_path / "link", force=force)
        with pytest.raises(OutputError, match="/dev/shm: expected a name, got a mount point; name a folder inside it"):
            check_output(Path("/dev/shm"), force=force)


def test_an_output_holds_nothing_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    check_apart(tmp_path / "out", tmp_path / "in", tmp_path)
    check_apart(tmp_path / "in", "in", tmp_path / "in" / "absent")  # a Hub id may have any name
    for out, source in (("in", "in"), ("in", "in/deep/file"), (".", "in"), ("in", "link")):
        with pytest.raises(
            OutputError, match=r"expected a place apart from what is read, got one that holds .*; choose another"
        ):
            check_apart(tmp_path / out, tmp_path / "other", tmp_path / source)


def test_the_folder_one_is_in_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (Path(), tmp_path, tmp_path / "a" / ".."):
        with pytest.raises(OutputError, match="expected a name, got the folder you are in"), new_folder(place):
            pytest.fail("entered")


def test_an_output_is_replaced_by_force_only(tmp_path: Path) -> None:
    place = tmp_path / "a"
    for force in (False, True):
        with new_folder(place, force=force, names=["config.json"]) as work:
            (work / "config.json").write_text(str(force), encoding="utf-8")
    assert (place / "config.json").read_text(encoding="utf-8") == "True"
    assert _everything(tmp_path) == ["a", "a/config.json"]
    with pytest.raises(OutputError, match="exists already; choose another place or give `force`"), new_folder(place):
        pytest.fail("entered")


def test_force_spares_what_is_no_earlier_output(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters").write_text("dear", encoding="utf-8")
    refused = pytest.raises(OutputError, match="does not look like an earlier output")
    with refused, new_folder(home, force=True, names=["config.json"]):
        pytest.fail("entered")
    (tmp_path / "link").symlink_to(home)
    with pytest.raises(OutputError, match="a link"), new_folder(tmp_path / "link", force=True, names=["letters"]):
        pytest.fail("entered")
    assert (home / "letters").exists()


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    with new_folder(tmp_path) as work:
        (work / "file").write_text("x", encoding="utf-8")
    assert _everything(tmp_path) == ["file"]


def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool, bool]] = []
    fsync, folder, file = os.fsync, tmp_path / "folder", tmp_path / "file"

    def watched(number: int) -> None:
        synced.append((os.fstat(number).st_ino, folder.exists(), file.exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", watched)
    with new_folder(folder) as work:
        (work / "below").mkdir()
        (work / "below" / "letters").write_text("x", encoding="utf-8")
        (work / "link").symlink_to("below")
    for path in (folder, folder / "below", folder / "below" / "letters"):
        assert (path.stat().st_ino, False, False) in synced
    assert synced[-1] == (tmp_path.stat().st_ino, True, False)
    with new_file(file) as place:
        place.write_text("x", encoding="utf-8")
    assert (file.stat().st_ino, True, False) in synced
    assert synced[-1] == (tmp_path.stat().st_ino, True, True)


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with new_folder(tmp_path / "a") as work:
        (work / "letters").write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, "fsync", failing)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        new_folder(tmp_path / "a", force=True, names=["letters"]) as work,
    ):
        (work / "letters").write_text("new", encoding="utf-8")
    with pytest.raises(OutputError, match="Input/output error"), new_file(tmp_path / "b") as place:
        place.write_text("x", encoding="utf-8")
    assert _everything(tmp_path) == ["a", "a/letters"]
    assert (tmp_path / "a" / "letters").read_text(encoding="utf-8") == "old"


def test_files_are_read_inside_their_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    with InputFile(path) as file:
        assert file.read(2, 3) == b"234"
        for offset, length in ((8, 3), (-1, 2), (0, -1), (1 << 62, 1)):
            with pytest.raises(InputError, match="got a file of 10 bytes"):
                file.read(offset, length)
    with pytest.raises(InputError, match="No such file"):
        InputFile(tmp_path / "b")
    with pytest.raises(InputError, match="expected a regular file"):
        InputFile(tmp_path)


def test_files_are_written_inside_their_bounds(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a", 6) as file:
        assert file.write_all(1, [b"bc", b"def"]) == 5
        file.zeros(0, 1)
        with pytest.raises(ValueError, match=r"bytes 5\.\.7 of a file of 6"):
            file.write(5, b"xy")
    assert (tmp_path / "a").read_bytes() == b"\0bcdef"
    with pytest.raises(OutputError, match="exists already"):
        OutputFile(tmp_path / "a", 1)


def test_a_file_is_written_from_several_threads(tmp_path: Path) -> None:
    parts = [bytes([n]) * 5000 for n in range(200)]
    with OutputFile(tmp_path / "a", 1_000_000) as file, ThreadPoolExecutor(4) as pool:
        list(pool.map(file.write, range(0, 1_000_000, 5000), parts))
    assert (tmp_path / "a").read_bytes() == b"".join(parts)


def test_a_size_that_no_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected room for 4611686018427387904 bytes"):
        OutputFile(tmp_path / "a", 1 << 62)
