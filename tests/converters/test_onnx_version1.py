"""Folders that version 0.1 wrote: onnx_version1.tar.xz has two, each beside the model that they were made of."""

import tarfile
from pathlib import Path

import pytest
import torch

from qalora.converters import load
from qalora.parity.runtimes import open_runtime
from qalora.testing import assert_same_model

GRAPHS = ("onnx", "onnx/portable")
TOKENS = list(range(1, 13))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("version1")
    with tarfile.open(Path(__file__).with_name("onnx_version1.tar.xz")) as archive:
        archive.extractall(place, filter="data")
    return place


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["real4", "integer5"])
def test_an_earlier_folder_reads_as_the_model_that_it_was_made_of(folders: Path, kind: str, graph: str) -> None:
    assert_same_model(load(folders / kind / graph), load(folders / kind / "qalora"))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["real4", "integer5"])
def test_an_earlier_folder_runs(folders: Path, kind: str, graph: str) -> None:
    """Within 8 times the error of torch's own float32, as in test_onnx."""
    from qalora.converters.torch_module import build

    module, ids = build(load(folders / kind / "qalora")), torch.tensor([TOKENS])
    single = module(input_ids=ids).logits[0].double()
    double = module.double()(input_ids=ids).logits[0]
    logits = open_runtime("onnxruntime", folders / kind / graph).logits(TOKENS)
    assert float((logits.double() - double).abs().max()) <= 8 * float((single - double).abs().max())
