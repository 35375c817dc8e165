"""Seeded fuzzing of every reader: whatever the bytes, either the file is read or one InputError says why not.

Each case is a small valid model; one of its files is mutated, blindly (bytes flipped, cut, doubled, overwritten with
extreme numbers) or by structure (a JSON value replaced by another, a key dropped or renamed), and everything in it is
read. Each file has 150 rounds to be read in and 50 to be inspected in, and twenty times as many under `long`, where
files are damaged too that are like another one. tools/fuzz goes on for as long as it is told, by coverage.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from damage import damaged
from qalora.converters import load
from qalora.errors import InputError
from readable import FILES, Example, adapters, deltas, models, texts


def rounds(count: int) -> pytest.MarkDecorator:
    """Seeds from 0, `count` of them; as `long`, those after them, up to twenty times as many."""
    more = pytest.param(range(count, 20 * count), marks=pytest.mark.long, id="more")
    return pytest.mark.parametrize("seeds", [pytest.param(range(count), id="few"), more])


ALIKE = ("generation_config.json", "peft", "onnx-portable", "onnx-version1", "model-00001-of-00002.safetensors")
"""Files and kinds whose readers others of the list run too."""

NOT_HERE = ("data", "release", "tokenizer")
"""Kinds that tools/fuzz alone reads: damage seldom makes them what is refused, or each round takes long."""


NOT_INSPECTED = ("delta", "peft", "recipe")
"""Kinds that `inspect` does not take, or takes as another one."""


def files(*left_out: str) -> Iterator[object]:
    """The pairs of a kind and a file of it but for some kinds; as `long` those that are like another."""
    for kind, names in FILES.items():
        for name in names if kind not in left_out else ():
            long = kind in ALIKE or name in ALIKE
            yield pytest.param(kind, name, id=f"{kind}/{name}", marks=pytest.mark.long if long else ())


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    """One small valid example for each reader."""
    root = tmp_path_factory.mktemp("fuzz")
    found = models(root)
    return {**found, **adapters(root, load(root / "qalora")), **texts(root), **deltas(root)}


def each_damage(example: Example, name: str, seeds: range, folder: Path) -> Iterator[int]:
    """A copy of the example in `folder`, damaged anew in the file for each seed."""
    shutil.copytree(example.folder, folder)
    good = (folder / name).read_bytes()
    for seed in seeds:
        (folder / name).write_bytes(damaged(good, name, random.Random(seed)))
        example.mend(folder, name)
        yield seed


@rounds(150)
@pytest.mark.parametrize(("kind", "name"), list(files(*NOT_HERE)))
def test_damage_is_one_sentence(
    kind: str, name: str, seeds: range, examples: dict[str, Example], tmp_path: Path
) -> None:
    example = examples[kind]
    example.read(example.folder)
    refused = 0
    for seed in each_damage(example, name, seeds, tmp_path / "model"):
        try:
            example.read(tmp_path / "model")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    assert refused > len(seeds) // 10  # the mutations do damage


@rounds(50)
@pytest.mark.parametrize(("kind", "name"), list(files(*NOT_HERE, *NOT_INSPECTED)))
def test_inspect_of_damage_is_a_report_or_one_sentence(
    kind: str, name: str, seeds: range, examples: dict[str, Example], tmp_path: Path
) -> None:
    example = examples[kind]
    assert example.inspect is not None
    for seed in each_damage(example, name, seeds, tmp_path / "model"):
        try:
            example.inspected(tmp_path / "model")
        except InputError as error:
            assert "\n" not in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
