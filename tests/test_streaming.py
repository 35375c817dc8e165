"""A layer passes through a writer some rows at a time, and `verify` keeps one layer, however many a model has.

What a process holds is measured in one of its own, after the same was done with a small model, which brings what is
imported. The weights are made when they are read.
"""

from __future__ import annotations

import json

import pytest

from forks import Forks

LAYERS, HIDDEN, WIDE = 3, 1024, 16384

MATRIX = HIDDEN * WIDE // 2 + 8 * HIDDEN * WIDE // 32
"""Bytes of the largest weights in memory: codes of 4 bits, scale and min of each 32 in float32."""

MEASURED = """
import ctypes, json, re, sys, tempfile, torch
from dataclasses import replace
from pathlib import Path
from qalora.checkpoint import LazyTensor
from qalora.converters import TARGETS, load
from qalora.converters.exports import export
from qalora.parity import verify
from qalora.tensor import GroupQuantTensor, QuantSpec
from qalora.testing import random_adapter, small_tokenizer, tiny_llama

layers, hidden, wide = map(int, sys.argv[1:])
spec = QuantSpec(bits=4, group_size=32, zeros="real", scale_dtype=torch.float16, min_dtype=torch.float16)

def lazy(name, rows, columns):
    def read(start, stop):
        groups = (stop - start, columns // 32)
        packed = torch.full((stop - start, columns // 2), 0x63, dtype=torch.uint8)
        scale, minimum = torch.full(groups, 0.125), torch.full(groups, -0.5)
        return GroupQuantTensor(packed=packed, scale=scale, min=minimum, bits=4, group_size=32)
    return LazyTensor(name=name, shape=(rows, columns), spec=spec, by_rows=True, read=read)

def model(source, wide):
    shapes = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    made = {n: lazy(n, *shapes.get(n.split(".")[-2], source.tensors[n].shape)) for n in source.linears}
    config = {**source.config, "intermediate_size": wide}
    return replace(source, config=config, tensors={**source.tensors, **made})

def peak():  # not ru_maxrss, in which the process that started this one counts
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def grown(job):
    ctypes.CDLL(None).malloc_trim(0)  # what the job before this one has freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    before = peak()
    job()
    return peak() - before

with tempfile.TemporaryDirectory() as folder:
    root, found = Path(folder), {}
    config = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": layers}
    source = load(tiny_llama(root / "float", tokenizer=small_tokenizer(), config=config))
    for size in (64, wide):
        out, made = root / str(size), model(source, size)
        adapter = random_adapter(made, a_size=0.01, b_size=0.01)
        for target in TARGETS:
            if target == "compressed-tensors":  # which has no real zero points
                continue
            found[target] = grown(lambda: export(made, [target], out))
        base = load(out / "qalora")
        export(base, ["gguf"], out / "folded", adapter=adapter)
        def proof():
            assert verify(base, [out / "folded/gguf"], adapter=adapter, level="weights").passed()
        found["verify"] = grown(proof)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def grown(light_forks: Forks) -> dict[str, int]:
    done = light_forks.run("-c", MEASURED, LAYERS, HIDDEN, WIDE)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("qalora", 1.5),
        ("mlx", 1.5),
        ("gguf", 1.5),
        ("onnx", 1.5),
        ("openvino", 1.5),
        ("transformersjs", 1.5),
        ("torchao", 1.5),
        ("mnn", 1.5),
        ("gptq", 7),
        ("hqq", 7),
        ("verify", 6),
    ],
)
def test_what_is_held_of_the_largest_weights(what: str, most: float, grown: dict[str, int]) -> None:
    """`most` is in matrices; all of the model are nine and more.

    qalora, mlx, gguf, onnx, openvino, transformersjs, torchao, mnn
                             none whole: the rows of three jobs, and what becomes of them
    gptq, hqq                words join what is far apart: the matrix that is read, the one before it that is written,
                             zero points, what is left over, words; and what the allocator keeps for its threads
    verify                   the base's, the folded minima, the artefact's rows as they are stored and as they are, the
                             fold in float64 (minima of 8 bytes, three times), the artefact's embedding and tokenizer
    """
    assert grown[what] < most * MATRIX
