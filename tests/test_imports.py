"""The direction of imports: a room imports from the rooms below it only. And what the command line needs to start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qalora

ROOT = Path(qalora.__file__).parent

FLOORS = [
    {"cli", "__main__"},
    {"release", "demo", "inspection", "testing", "chat_layouts"},
    {"parity"},
    {"calibration", "integrations", "training"},
    {"converters"},
    {"folding", "adapter", "quantization", "residual", "checkpoint"},
    {"formats"},
    {"fused"},
    {"tensor"},
    {"errors", "_version"},
]
HEIGHT = {room: -n for n, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def _room(module: str) -> str:
    return module.split(".")[1]


def _imports(path: Path, *, run_time: bool) -> set[str]:
    """The qalora modules that a file imports, those for type checkers alone left out where `run_time` is set."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if run_time:
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    upwards = {name for name in _imports(path, run_time=True) if HEIGHT[_room(name)] > HEIGHT[room]}
    assert not upwards


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import qalora.cli", {"torch", "transformers", "numpy", "onnx"}),
        ("import qalora", {"torch", "transformers", "numpy", "onnx"}),
        ("import qalora.converters.exports", {"transformers", "onnx", "onnxruntime"}),
    ],
)
def test_light_imports_stay_light(code: str, absent: set[str]) -> None:
    script = f"{code}; import sys; print(*[name for name in {sorted(absent)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


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
    assert sorted(qalora.__all__) == [
        "QaloraError",
        "__version__",
        "export",
        "fold",
        "load",
        "quantize",
        "train",
        "verify",
    ]
