"""The direction of imports: a room imports from the rooms below it only. And what the command line needs to start."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import qalora

ROOT = Path(qalora.__file__).parent

FLOORS = [
    {"cli", "__main__"},
    {"pipeline"},
    {"releasing", "demo", "inspection", "testing", "chat_layouts"},
    {"parity"},
    {"browser", "calibration", "delta", "integrations", "training"},
    {"converters"},
    {"folding", "adapter", "quantization", "residual", "checkpoint"},
    {"formats"},
    {"fused"},
    {"devices", "engines", "node_packages", "tensor"},
    {"options"},
    {"errors", "_version"},
]
HEIGHT = {room: -n for n, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def _room(module: str) -> str:
    return module.split(".")[1]


def _imports(path: Path) -> set[str]:
    """The qalora modules that a file imports, but for those that are for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} if node.module != "qalora" else {f"qalora.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path}: relative import")
    return {name for name in found if name.startswith("qalora.")}


def test_every_room_has_a_floor() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms == set(HEIGHT)


def test_imports_go_downwards() -> None:
    upwards = {}
    for path in MODULES:
        place = path.relative_to(ROOT)
        height = HEIGHT[place.parts[0].removesuffix(".py")]
        if found := {name for name in _imports(path) if HEIGHT[_room(name)] > height}:
            upwards[str(place)] = found
    assert not upwards


def test_a_family_is_data() -> None:
    """A family's file needs the record, and other families' facts at the most."""
    folder = ROOT / "converters" / "families"
    for path in set(folder.glob("*.py")) - {folder / "__init__.py"}:
        assert all(name.startswith("qalora.converters.families") for name in _imports(path)), path


LIGHT = {
    "import qalora.cli": {"torch", "transformers", "numpy", "onnx"},  # the package's own first
    "import qalora.converters.exports": {"transformers", "onnx", "onnxruntime"},
}


def test_light_imports_stay_light() -> None:
    """One after the other in one process: what the second may not bring, the first may not either."""
    lines = ["import sys"]
    for code, absent in LIGHT.items():
        lines += [code, f"[print({code!r}, 'brings', name) for name in {sorted(absent)} if name in sys.modules]"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["converters", "formats"])
def test_top_level_links_lead_into_the_package(name: str) -> None:
    link = ROOT.parent / name
    if not link.exists():
        pytest.skip("not a checkout")
    assert link.is_symlink()
    assert link.readlink() == Path("qalora") / name


def test_no_room_hides_a_function() -> None:
    """A submodule becomes an attribute of the package when it is first imported: `qalora.fold` must stay a function."""
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms.isdisjoint(qalora.__all__)


def test_public_names() -> None:
    """Each is there, and what is a function is one of these."""
    functions = {name for name in qalora.__all__ if inspect.isfunction(getattr(qalora, name))}
    made = {"load", "quantize", "train", "fold", "export", "save"}
    assert functions == made | {"verify", "inspect", "release", "check", "run"}
