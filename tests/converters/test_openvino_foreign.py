"""OpenVINO folders that optimum-intel 2.2 wrote, compressed by NNCF 3.4 or not, as bases.

The files are as they wrote them, of models with a layer of 32 columns, beside transformers 5.5, beyond which it does
not go: OVModelForCausalLM.from_pretrained(folder, export=True, quantization_config=OVWeightQuantizationConfig(bits=4,
sym=False, group_size=16, ratio=1.0)), and so on.
"""

import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from qalora.converters import load
from qalora.converters.exports import export_jobs, run_jobs
from qalora.converters.plan import ExportOptions
from qalora.converters.torch_module import build
from qalora.errors import FormatError
from qalora.inspection import inspect
from qalora.parity import verify
from qalora.parity.runtimes import open_runtime
from qalora.testing import random_adapter

TOKENS = [5 + (7 * n) % 59 for n in range(40)]
XML = "openvino_model.xml"

KINDS = {
    "llama-int4": {("integer", 4, 16): 7},
    "llama-tied-int8": {("integer", 8, 32): 6, ("integer", 8, 48): 1},
    "qwen2-int4-symmetric": {("integer", 4, 16): 7},
    "qwen3-int4": {("integer", 4, 16): 7},
    "llama-awq": {("integer", 4, 16): 7},
    "llama-float": {None: 7},
}
"""Each folder, and the kinds of its linear weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("optimum")
    with tarfile.open(Path(__file__).with_name("openvino_optimum.tar.xz")) as archive:
        archive.extractall(place, filter="data")
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_computes_what_openvino_does(kind: str, folders: Path) -> None:
    """Within 8 times torch's own float32 error, as a graph of ours."""
    model = load(folders / kind)
    specs = [model.tensors[name].spec for name in model.linears]
    assert Counter(None if one is None else (one.zeros, one.bits, one.group_size) for one in specs) == KINDS[kind]
    assert model.tied == ("tied" in kind)
    module = build(model)
    with torch.no_grad():
        single = module(input_ids=torch.tensor([TOKENS])).logits[0]
        double = module.double()(input_ids=torch.tensor([TOKENS])).logits[0]
    noise = float((single.double() - double).abs().max())
    runtime = open_runtime("openvino", folders / kind, threads=1)
    error = float((runtime.logits(TOKENS).double() - double).abs().max())
    assert error <= 8 * noise, f"{error:.2g} with torch at {noise:.2g}"
    assert [one.code for one in inspect(folders / kind).warnings] == ["no-tokenizer"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama-float"])
def test_an_adapter_on_it_is_folded_and_proven(kind: str, folders: Path, tmp_path: Path) -> None:
    """In our own folder and in OpenVINO: the codes are those of the base, and the reference is checked in OpenVINO."""
    base = load(folders / kind)
    adapter = random_adapter(base, pool_size=None, a_size=0.05, scaling=2.0)
    jobs = export_jobs(base, ["openvino", "qalora"], ExportOptions(), adapter=adapter, minima="float32")
    run_jobs(jobs, tmp_path)
    report = verify(base, [tmp_path], adapter=adapter, minima="float32", level="logits", tokens=TOKENS, threads=1)
    assert report.passed(), report.failure()
    assert [run.kind for run in report.reference_runs] == ["openvino"]


Q = "model.layers.0.self_attn.q_proj"

DAMAGE = {
    "a norm under another name": (
        "__module.model.norm/aten::mul",
        "__module.model.other/aten::mul",
        "rotary positions",
    ),
    "a weight that is not transposed": ('transpose_b="true"', 'transpose_b="false"', "a product with the transpose"),
    "an addition in the chain": (f'name="self.{Q}.weight/zero_point/subtract" type="Subtract"', None, "another chain"),
    "another type of code": ('element_type="u4"', 'element_type="nf4"', "got 'nf4'"),
    "a weight of another name": (f'name="self.{Q}.weight" type="Const"', 'name="self.odd" type="Const"', "odd"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_understood_is_refused(what: str, folders: Path, tmp_path: Path) -> None:
    old, new, words = DAMAGE[what]
    for path in (folders / "llama-int4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / XML).read_text("utf-8")
    assert old in text
    new = old.replace('type="Subtract"', 'type="Add"') if new is None else new
    (tmp_path / XML).write_text(text.replace(old, new), "utf-8")
    with pytest.raises(FormatError) as error:
        load(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_positions_in_the_config_are_refused(folders: Path, tmp_path: Path) -> None:
    for path in (folders / "llama-int4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(text.replace("10000.0", "50000.0"), "utf-8")
    assert "50000.0" in (tmp_path / "config.json").read_text("utf-8")
    with pytest.raises(FormatError, match=r"rotary positions as config\.json says"):
        load(tmp_path)
