"""Where a file of a model may lie: in its folder, or in the blobs of the Hub cache that the folder belongs to."""

from pathlib import Path

import pytest

from qalora.errors import FormatError
from qalora.formats.files import contained, read_limited

CACHE = "models--me--tiny"


def linked(root: Path, folder: str, target: str) -> Path:
    """A folder below `root` with config.json, a link to `target` there; gives the folder."""
    place, file = root / folder, root / target
    for path in (place, file.parent):
        path.mkdir(parents=True, exist_ok=True)
    file.write_text("{}", encoding="utf-8")
    depth = len(place.relative_to(root).parts)
    (place / "config.json").symlink_to("../" * depth + target)
    return place


@pytest.mark.parametrize("below", ["", "/gptq", "/onnx/portable", "/snapshots/other"])
def test_a_snapshot_of_the_hub_links_to_its_blobs(below: str, tmp_path: Path) -> None:
    folder = linked(tmp_path, f"{CACHE}/snapshots/abc{below}", f"{CACHE}/blobs/1")
    assert read_limited(contained(folder, "config.json"), 9) == b"{}"


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        (f"{CACHE}/snapshots/abc/gptq", "models--me--other/blobs/1"),
        (f"{CACHE}/snapshots/abc/gptq", f"{CACHE}/refs/main"),
        (f"{CACHE}/snapshots/abc/gptq", f"{CACHE}/snapshots/abc/config.json"),
        (f"{CACHE}/snapshots/abc/gptq", f"{CACHE}/snapshots/def/gptq/config.json"),
        (f"{CACHE}/snapshots", f"{CACHE}/blobs/1"),
        (f"{CACHE}/other/abc", f"{CACHE}/blobs/1"),
        ("backup/snapshots/monday/model", "backup/blobs/1"),
        ("model", "blobs/1"),
    ],
)
def test_a_link_elsewhere_is_refused(folder: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: expected a file inside the model's folder, got a link to"):
        contained(linked(tmp_path, folder, target), "config.json")


def test_blobs_that_are_a_link_themselves_lead_nowhere(tmp_path: Path) -> None:
    folder = linked(tmp_path, f"{CACHE}/snapshots/abc/gptq", "elsewhere/1")
    (tmp_path / CACHE / "blobs").symlink_to("../elsewhere")
    with pytest.raises(FormatError, match="got a link to"):
        contained(folder, "config.json")


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "a/" * 1025 + "b"])
def test_a_name_that_no_file_system_takes_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"file name '.{0,60}: expected a name that a file can have$"):
        contained(tmp_path, name)
    assert contained(tmp_path, "x" * 255).name == "x" * 255
