"""No sentence of ours inside another's repr: whoever catches a broad error lets ours pass, a ValueError too."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import qalora
from qalora.converters import load
from qalora.converters.gguf.tokenizer import gguf_tokenizer
from qalora.converters.torch_module import build
from qalora.errors import InputError
from qalora.testing import small_tokenizer, tiny_llama

ROOT = Path(qalora.__file__).parent
BROAD = {"ValueError", "Exception", "BaseException"}
OURS = {"QaloraError", "InputError", "FormatError", "OutputError", "MissingLibraryError"}

ALLOWED = {
    "releasing/opening.py: _answer": "the sentence is the answer of a process",
    "pipeline/cached.py: _kept": "a report that is not read is made again",
    "parity/runtimes/genai.py: ends": "a folder whose tokenizer the library does not take has no ends to compare",
    "fused/__init__.py: _proven": "the plain path instead",
    "parity/tokenizer_texts.py: untried": "the sentence is in the note",
}
"""Handlers that take ours too, and why that is right."""


def names_of(kind: ast.expr | None) -> set[str]:
    if kind is None:
        return {"BaseException"}
    parts = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return {ast.unparse(part).rpartition(".")[2] for part in parts}


def own_names(tree: ast.Module) -> set[str]:
    """What a module has of ours: its own functions and classes, and what it imports from the package."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qalora"):
            found |= {name.asname or name.name for name in node.names}
    return found - {"Checkpoint", "Metadata", "ValueType"}


def calls(body: list[ast.stmt], own: set[str]) -> set[str]:
    """Functions of ours that statements call."""
    found = set()
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in own or (name.startswith("self.") and name.removeprefix("self.") in own):
                found.add(name)
    return found


def wrapping(path: Path) -> set[str]:
    """The functions of a file with a broad handler around a call of ours, and none for our errors before it."""
    tree = ast.parse(path.read_text("utf-8"))
    own, found = own_names(tree), set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if not isinstance(node, ast.Try) or not calls(node.body, own):
                continue
            passed: set[str] = set()
            for handler in node.handlers:
                kinds = names_of(handler.type)
                again = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
                if kinds & BROAD and not passed & OURS and not again:
                    found.add(f"{path.relative_to(ROOT).as_posix()}: {function.name}")
                passed |= kinds
    return found


def test_no_broad_handler_wraps_an_error_of_ours() -> None:
    found = set().union(*(wrapping(path) for path in ROOT.rglob("*.py")))
    assert found - ALLOWED.keys() == set()


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    source = "from qalora.x import ours\ndef f():\n    try:\n        ours()\n{0}    except {1}:\n        pass\n"
    for before, kind, wraps in (
        ("", "(KeyError, ValueError)", True),
        ("", "Exception", True),
        ("    except InputError:\n        raise\n", "ValueError", False),
        ("", "KeyError", False),
    ):
        place = ROOT / "errors.py"
        tree = ast.parse(source.format(before, kind))
        own = own_names(tree)
        (attempt,) = (node for node in ast.walk(tree) if isinstance(node, ast.Try))
        passed: set[str] = set()
        found = False
        for handler in attempt.handlers:
            found |= bool(names_of(handler.type) & BROAD) and not passed & OURS
            passed |= names_of(handler.type)
        assert calls(attempt.body, own) == {"ours"}
        assert found == wraps, (place, before, kind)


Change = Any


def edited(folder: Path, change: Change) -> Path:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def token(n: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": n, "content": "[PAD]", "special": True, **flags}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda found: found["added_tokens"].append(token(512)), "token '[PAD]' has id 512"),
        (lambda found: found["model"]["vocab"].update({"zzzz": 9999}), "token 'zzzz' has id 9999"),
        (lambda found: found["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix: expected none"),
        (lambda found: found.update(normalizer={"type": "Lowercase"}), "normalizer: expected none, or NFC"),
        (lambda found: found.update(pre_tokenizer={"type": "Whitespace"}), "its rule for cutting text"),
    ],
)
def test_a_tokenizer_is_refused_in_one_sentence(change: Change, sentence: str, tmp_path: Path) -> None:
    model = load(edited(tiny_llama(tmp_path / "m", tokenizer=small_tokenizer()), change))
    with pytest.raises(InputError) as caught:
        gguf_tokenizer(model)
    said = str(caught.value)
    assert sentence in said
    assert "Error(" not in said
    assert said.count(": expected") <= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "magic"), ({"hidden_act": "magic"}, "magic")],
)
def test_a_config_is_refused_in_one_sentence(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    from dataclasses import replace

    model = load(tiny_llama(tmp_path / "m"))
    with pytest.raises(InputError) as caught:
        build(replace(model, config={**model.config, **change}))
    said = str(caught.value)
    assert sentence in said
    assert "a config that transformers takes, got" not in said or ": expected" not in said.split(", got ", 1)[1]
