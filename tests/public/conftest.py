"""A tiny model, integers of it, an adapter and an artefact, for the keywords of public functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import qalora
from qalora.adapter import write_adapter
from qalora.converters import load
from qalora.demo import demo_text
from qalora.folding import fold
from qalora.quantization import quantize as quantize_model
from qalora.testing import random_adapter

pytest.register_assert_rewrite("public_world")

from public_world import World  # noqa: E402 - after that


@pytest.fixture(scope="package")
def shared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("public")
    base = quantize_model(load(tiny), bits=4, group_size=32)
    adapter = random_adapter(base, pool_size=None, seed=1, a_size=0.05, b_size=0.05, scaling=2.0)
    (place / "text.txt").write_text(demo_text()[:9000], encoding="utf-8")
    write_adapter(adapter, place / "adapter")
    qalora.export(fold(base, adapter), "qalora", place)
    return World(
        float_model=tiny,
        base=base,
        whole=quantize_model(load(tiny), bits=4, group_size=32, zeros="integer"),
        adapter=adapter,
        text=place / "text.txt",
        artifact=place / "qalora",
        out=place,
    )


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    return replace(shared, out=tmp_path)
