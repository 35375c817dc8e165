"""docs/reference: what is generated is current, and has every command, option and public name."""

import importlib.util
from types import ModuleType

import click
import pytest

import qalora
from pages import ROOT
from qalora.cli import COMMANDS, main


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_docs", ROOT / "tools" / "reference_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_current(tool: ModuleType) -> None:
    for path, text in tool.pages().items():
        assert path.read_text("utf-8") == text, "run python tools/reference_docs.py"


def test_every_option_of_every_command_is_there(tool: ModuleType) -> None:
    text = tool.cli_page()
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        _, _, section = text.partition(f"## qalora {name}\n")
        section = section.partition("\n## ")[0]
        inner = command.commands.values() if isinstance(command, click.Group) else [command]
        for param in (param for one in inner for param in one.params if isinstance(param, click.Option)):
            assert all(flag in section for flag in param.opts), (name, param.opts)


def test_every_public_name_is_there(tool: ModuleType) -> None:
    text = tool.api_page()
    for name in qalora.__all__:
        assert name == "__version__" or f"\n### {name}\n" in text, name
    assert " at 0x" not in text


def test_a_docstring_becomes_markdown(tool: ModuleType) -> None:
    code, rows = "    import y\n\n    z(1)", "a, b  one\n    and more\nc     two | three"
    assert tool.prose(f"Do it for <x>.\n\n{code}\n\n{rows}\n\nExample: go --there") == [
        "Do it for &lt;x>.\n",
        "```python\nimport y\n\nz(1)\n```\n",
        "| argument |  |\n| --- | --- |\n| `a`, `b` | one and more |\n| `c` | two &#124; three |\n",
        "```sh\ngo --there\n```\n",
    ]
