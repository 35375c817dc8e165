"""Embeddings, tokens and biases that an adapter trains beside its A and B, held against PEFT's own forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qalora.adapter import Adapter, carry, read_adapter, to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export_jobs, run_jobs
from qalora.converters.plan import ExportOptions
from qalora.converters.tokenizer import load_tokenizer
from qalora.converters.torch_module import build
from qalora.errors import AdapterError, InputError
from qalora.folding import fold
from qalora.parity import verify
from qalora.parity.reference import Forward, Reference
from qalora.quantization import quantize
from qalora.testing import small_tokenizer, tiny_model
from targets import OF_REAL_ZEROS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's of tied embeddings, and of what it saves

IDS = [3, 250, 17, 14, 5, *((7 * n) % 250 for n in range(20))]
POOL = 32
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TARGETS = ["q_proj", "v_proj", "up_proj"]

SAME = 1e-4
"""Of the largest logit. PEFT and the reference sum the same float32 products in another order: 128 columns, 2 layers
and 64 columns of the output layer, each with 2^-24 * sqrt(columns) of a sum's size, stay below 1e-5; what is tried
here changes logits by more than 0.02."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What PEFT is asked for, and what is expected of it: the tensors that are changed, and whether they stay tied."""

    config: dict[str, Any]
    tied: bool
    changed: set[str]
    stays_tied: bool = False
    family: str = "llama"
    resized: int = 0


CASES = {
    "both of an untied model": Case(
        config={"modules_to_save": ["embed_tokens", "lm_head"]}, tied=False, changed={EMBEDDING, HEAD}
    ),
    "the embedding of an untied model": Case(
        config={"modules_to_save": ["embed_tokens"]}, tied=False, changed={EMBEDDING}
    ),
    "the embedding of a tied model": Case(config={"modules_to_save": ["embed_tokens"]}, tied=True, changed={EMBEDDING}),
    "the output of a tied model": Case(config={"modules_to_save": ["lm_head"]}, tied=True, changed={HEAD}),
    "both of a tied model": Case(
        config={"modules_to_save": ["embed_tokens", "lm_head"]}, tied=True, changed={EMBEDDING, HEAD}
    ),
    "both of a tied model, tied": Case(
        config={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        tied=True,
        changed={EMBEDDING},
        stays_tied=True,
    ),
    "norms": Case(config={"modules_to_save": ["norm"]}, tied=True, changed={NORM}, stays_tied=True),
    "tokens of a tied model": Case(
        config={"trainable_token_indices": [3, 250, 17]}, tied=True, changed={EMBEDDING}, stays_tied=True
    ),
    "tokens of an untied model": Case(
        config={"trainable_token_indices": [3, 250, 17]}, tied=False, changed={EMBEDDING}
    ),
    "tokens of both": Case(
        config={"trainable_token_indices": {"embed_tokens": [3, 14], "lm_head": [14, 5]}},
        tied=False,
        changed={EMBEDDING, HEAD},
    ),
    "biases": Case(
        config={"bias": "all"},
        tied=True,
        stays_tied=True,
        family="qwen2",
        changed={f"model.layers.{n}.self_attn.{kind}_proj.bias" for n in (0, 1) for kind in "qkv"},
    ),
    "a larger vocabulary of a tied model": Case(
        config={}, tied=True, changed={EMBEDDING}, stays_tied=True, resized=320
    ),
    "a larger vocabulary of an untied model": Case(
        config={"modules_to_save": ["embed_tokens", "lm_head"]}, tied=False, changed={EMBEDDING, HEAD}, resized=320
    ),
    "a smaller vocabulary": Case(
        config={"modules_to_save": ["embed_tokens", "lm_head"]}, tied=False, changed={EMBEDDING, HEAD}, resized=288
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """base: ours; folder: PEFT's; logits: of PEFT's model."""

    case: Case
    base: Checkpoint
    folder: Path
    logits: Tensor


def base_of(case: Case, folder: Path) -> Checkpoint:
    settings = {"tie_word_embeddings": case.tied, "vocab_size": 300 if case.resized else 256, "eos_token_id": 2}
    tokenizer = small_tokenizer(size=300) if case.resized else None
    made = tiny_model(folder, case.family, config=settings)
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
    return quantize(load(made), bits=4, group_size=32)


def train(case: Case, root: Path) -> Trained:
    """PEFT's model of the base with random values in everything that it trains; A is the same within pools."""
    base = base_of(case, root / "float")
    module = build(base)
    if case.resized:
        module.resize_token_embeddings(case.resized, mean_resizing=False)
    torch.manual_seed(1)
    made = get_peft_model(module, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **case.config))
    if case.resized and case.tied:
        module.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_A" in name:
                pools = torch.randn(4, parameter.shape[1] // POOL) * 0.3
                parameter.copy_(pools.repeat_interleave(POOL, dim=1))
            elif "lora_B" in name:
                parameter.normal_(std=0.05)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.eval().save_pretrained(root / "adapter", save_embedding_layers=bool(case.resized))
    if case.resized:
        tokenizer = small_tokenizer(size=min(300, case.resized))
        if case.resized > 300:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
        tokenizer.save_pretrained(root / "adapter")
    with torch.no_grad():
        logits = made(input_ids=torch.tensor([IDS])).logits[0]
    return Trained(case=case, base=base, folder=root / "adapter", logits=logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A case by its name, made once."""
    known: dict[str, Trained] = {}

    def made(name: str) -> Trained:
        if name not in known:
            known[name] = train(CASES[name], tmp_path_factory.mktemp("saved"))
        return known[name]

    return made


def pooled(adapter: Adapter) -> Adapter:
    """The same adapter as a QA-LoRA: a column of A for each pool, which can be folded."""
    layers = {
        module: replace(layer, a=layer.a[:, ::POOL].contiguous(), pool_size=POOL)
        for module, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def logits_of(model: Checkpoint) -> Tensor:
    with torch.no_grad():
        return build(model)(input_ids=torch.tensor([IDS])).logits[0]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_reference_computes_what_peft_does(name: str, trained: Callable[[str], Trained]) -> None:
    """The side branch of verify's reference, over the base with the tensors in their places."""
    found = trained(name)
    adapter = read_adapter(found.folder, found.base)
    assert adapter.saved is not None
    carried = carry(found.base, adapter)
    assert set(adapter.saved.names) >= found.case.changed
    assert carried.tied == (found.case.tied and found.case.stays_tied)
    assert bool(carried.config["tie_word_embeddings"]) == carried.tied
    side = Reference(carried, adapter).logits(IDS, Forward(weights="side"))
    assert distance(side, found.logits) < SAME
    if not found.case.resized:
        bare = Reference(found.base, replace(adapter, saved=None)).logits(IDS, Forward(weights="side"))
        assert distance(bare, found.logits) > 0.02


@pytest.mark.parametrize("name", CASES)
def test_the_folded_model_computes_what_peft_does(name: str, trained: Callable[[str], Trained]) -> None:
    """Minima in float32, so that nothing is rounded but by float32."""
    found = trained(name)
    folded = fold(found.base, pooled(read_adapter(found.folder, found.base)), minima="float32")
    assert distance(logits_of(folded), found.logits) < SAME


@pytest.mark.parametrize("name", CASES)
def test_peft_takes_it_as_it_is_written_again(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained(name)
    adapter = read_adapter(found.folder, found.base)
    write_adapter(to_plain_lora(adapter), tmp_path / "again")
    module = build(found.base)
    if found.case.resized:
        module.resize_token_embeddings(found.case.resized, mean_resizing=False)
    loaded = PeftModel.from_pretrained(module, tmp_path / "again").eval()
    with torch.no_grad():
        assert distance(loaded(input_ids=torch.tensor([IDS])).logits[0], found.logits) < SAME
    (tmp_path / "again" / "qalora_adapter.json").unlink()
    again = read_adapter(tmp_path / "again", found.base)
    assert again.saved is not None
    assert again.saved.files.keys() == adapter.saved.files.keys()


EXPORTED = (
    "both of an untied model",
    "the embedding of a tied model",
    "tokens of a tied model",
    "norms",
    "biases",
    "a larger vocabulary of a tied model",
    "a larger vocabulary of an untied model",
)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_export_holds_them_and_verify_agrees(
    name: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    found = trained(name)
    adapter = pooled(read_adapter(found.folder, found.base))
    run_jobs(export_jobs(found.base, OF_REAL_ZEROS, ExportOptions(), adapter=adapter), tmp_path)
    report = verify(found.base, [tmp_path], adapter=adapter, level="weights")
    assert report.passed(), report.failure()
    assert len(report.artifacts) == len(OF_REAL_ZEROS) + 1  # two graphs
    without = verify(found.base, [tmp_path / "qalora"], adapter=replace(adapter, saved=None), level="weights")
    assert not without.passed()


def test_a_base_with_the_adapter_beside_it_holds_them(tmp_path: Path) -> None:
    found = train(CASES["both of an untied model"], tmp_path)
    whole = quantize(load(tmp_path / "float"), bits=4, group_size=32, zeros="integer")
    adapter = pooled(read_adapter(found.folder, whole))
    run_jobs(export_jobs(whole, ["gptq"], ExportOptions(), adapter=adapter), tmp_path / "out")
    beside = load(tmp_path / "out" / "gptq")
    assert beside.beside is not None
    assert torch.equal(beside.tensors[EMBEDDING].load_float(), carry(whole, adapter).tensors[EMBEDDING].load_float())
    assert verify(whole, [tmp_path / "out"], adapter=adapter, level="weights").passed()


def test_it_runs_as_it_was_trained(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("tokens of a tied model")
    adapter = pooled(read_adapter(found.folder, found.base))
    run_jobs(export_jobs(found.base, ["qalora"], ExportOptions(), adapter=adapter), tmp_path)
    report = verify(found.base, [tmp_path / "qalora"], adapter=adapter, tokens=IDS, generate=2, threads=1)
    assert report.passed(), report.failure()


def test_a_larger_vocabulary_comes_with_its_tokenizer(trained: Callable[[str], Trained]) -> None:
    found = trained("a larger vocabulary of a tied model")
    carried = carry(found.base, read_adapter(found.folder, found.base))
    assert carried.config["vocab_size"] == 320
    assert carried.tensors[EMBEDDING].shape[0] == 320
    assert load_tokenizer(carried).convert_tokens_to_ids("<tool>") == 300
    assert load_tokenizer(found.base).convert_tokens_to_ids("<tool>") != 300
    assert any("the tokenizer is the adapter's" in note for note in carried.notes)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_where_there_are_none(bias: str, tmp_path: Path) -> None:
    case = Case(config={"bias": bias}, tied=True, changed=set())
    found = train(case, tmp_path)
    adapter = read_adapter(found.folder, found.base)
    assert adapter.saved is None
    assert distance(Reference(found.base, adapter).logits(IDS, Forward(weights="side")), found.logits) < SAME


def test_trained_values_keep_their_dtype(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("both of an untied model")
    shutil.copytree(found.folder, tmp_path / "a")
    rewrite(tmp_path / "a", lambda held: {k: v.bfloat16() if "lora" not in k else v for k, v in held.items()})
    carried = carry(found.base, read_adapter(tmp_path / "a", found.base))
    assert carried.tensors[EMBEDDING].dtype == torch.bfloat16
    assert torch.equal(carried.tensors[EMBEDDING].rows(3, 9), carried.tensors[EMBEDDING].load_float()[3:9])


def test_rows_are_read_a_tile_at_a_time(trained: Callable[[str], Trained]) -> None:
    found = trained("tokens of an untied model")
    lazy = carry(found.base, read_adapter(found.folder, found.base)).tensors[EMBEDDING]
    whole = lazy.load_float()
    for start, stop in ((0, 4), (3, 4), (4, 17), (17, 18), (18, 256), (249, 251)):
        assert torch.equal(lazy.rows(start, stop), whole[start:stop])
    changed = (whole != found.base.tensors[EMBEDDING].load_float()).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 17, 250]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def relabel(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


E, H = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
Damage = Callable[[Path], object]

REFUSED: list[tuple[str, Damage, str]] = [
    (
        "both of an untied model",
        lambda a: rewrite(a, lambda held: {k: v for k, v in held.items() if k != H}),
        r"modules_to_save 'lm_head': expected a tensor lm_head\.weight in its file, got none",
    ),
    (
        "both of an untied model",
        lambda a: rewrite(a, lambda held: {**held, E: held[E][:, :32]}),
        r"model\.embed_tokens\.weight: expected shape \[256, 64\], got \[256, 32\]",
    ),
    (
        "both of an untied model",
        lambda a: rewrite(a, lambda held: {**held, E: torch.cat([held[E], held[E][:4]])}),
        r"expected one vocabulary, got 260 and 256 rows",
    ),
    (
        "both of an untied model",
        lambda a: rewrite(a, lambda held: {**held, E: held[E] * torch.nan}),
        r"embed_tokens",
    ),
    (
        "norms",
        lambda a: relabel(a, modules_to_save=["lm_head"]),
        r"tensor 'base_model\.model\.model\..*norm\.weight': expected lora_A, lora_B, or what modules_to_save or",
    ),
    (
        "tokens of an untied model",
        lambda a: relabel(a, trainable_token_indices=[3, 250, 999]),
        r"rows of model\.embed_tokens\.weight: expected numbers in 0\.\.255, got 3\.\.999",
    ),
    (
        "tokens of an untied model",
        lambda a: relabel(a, trainable_token_indices=[3, 250, 3]),
        r"trainable_token_indices: 'embed_tokens': expected token ids, each once",
    ),
    (
        "tokens of an untied model",
        lambda a: relabel(a, trainable_token_indices=None),
        r"rows of model\.embed_tokens\.weight: expected trainable_token_indices with their numbers, got none",
    ),
    (
        "tokens of an untied model",
        lambda a: relabel(a, trainable_token_indices=[3, 250]),
        r"rows of model\.embed_tokens\.weight: expected 2 rows of \[64\], got \[3, 64\]",
    ),
    (
        "a larger vocabulary of a tied model",
        lambda a: [path.unlink() for path in a.glob("*token*")],
        r"has 320 rows and the base's has 300, so the tokens differ: expected the new tokenizer in the adapter's",
    ),
    (
        "biases",
        lambda a: relabel(a, bias="none"),
        r"tensor 'base_model\.model\.model\.layers\.\d\.self_attn\.\w_proj\.(base_layer\.)?bias': expected lora_A",
    ),
]


@pytest.mark.parametrize(("name", "damage", "sentence"), REFUSED)
def test_what_does_not_agree_is_refused_by_name(
    name: str, damage: Damage, sentence: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    found = trained(name)
    shutil.copytree(found.folder, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(InputError, match=sentence):
        logits_of(carry(found.base, read_adapter(tmp_path / "a", found.base)))


@pytest.mark.parametrize("name", ["both of an untied model", "the embedding of a tied model", "tokens of a tied model"])
def test_an_embedding_in_integers_is_not_replaced(name: str, trained: Callable[[str], Trained]) -> None:
    found = trained(name)
    only = replace(found.base, tensors={EMBEDDING: found.base.tensors[EMBEDDING]}, linears=(EMBEDDING,))
    coded = quantize(only, bits=8, group_size=32, zeros="symmetric").tensors[EMBEDDING]
    base = replace(found.base, tensors={**found.base.tensors, EMBEDDING: coded})
    with pytest.raises(AdapterError, match=r"brings model\.embed_tokens\.weight in floats, and .* in 8-bit integers"):
        read_adapter(found.folder, base)


def test_what_has_no_place_for_them_says_so(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("tokens of a tied model")
    run_jobs(export_jobs(found.base, ["qalora"], ExportOptions()), tmp_path)
    for form in ("gguf-lora", "onnx-adapter"):
        words = ["adapter", "convert", found.folder, "--to", form, "--base", tmp_path / "qalora", "-o", tmp_path / form]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 2
        assert "holds A and B alone, and this adapter brings model.embed_tokens.weight too" in result.stderr
        assert not (tmp_path / form).exists()


def test_on_the_command_line(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("a larger vocabulary of a tied model")
    run_jobs(export_jobs(found.base, ["qalora"], ExportOptions()), tmp_path)
    adapter = pooled(read_adapter(found.folder, found.base))
    write_adapter(replace(adapter, minima="float16"), tmp_path / "adapter")
    words = ["fold", tmp_path / "qalora", tmp_path / "adapter", "-o", tmp_path / "folded"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "replaced by the adapter's: " in result.stdout
    assert "model.embed_tokens.weight" in result.stdout
    folded = load(tmp_path / "folded")
    assert folded.config["vocab_size"] == 320
    assert distance(logits_of(folded), found.logits) < 0.02  # float16 minima
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "adapter")])
    assert "tensors of the base: " in shown.stdout
    assert "with a tokenizer of its own" in shown.stdout


def test_a_release_holds_them_and_is_checked(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("both of an untied model")
    run_jobs(export_jobs(found.base, ["qalora"], ExportOptions()), tmp_path)
    write_adapter(pooled(read_adapter(found.folder, found.base)), tmp_path / "adapter")
    base, dist = tmp_path / "qalora", tmp_path / "dist"
    line = ["release", base, "--adapter", tmp_path / "adapter", "--to", "qalora", "-o", dist]
    made = CliRunner().invoke(main, [str(word) for word in [*line, "--max-tokens", 32, "--generate", 2]])
    assert made.exit_code == 0, made.output
    checked = CliRunner().invoke(main, ["check", str(dist), "--base", str(base), "--no-open"])
    assert checked.exit_code == 0, checked.output
    rewrite(tmp_path / "adapter", lambda held: {**held, E: held[E] + 1})
    other = ["check", dist, "--base", base, "--adapter", tmp_path / "adapter", "--no-open"]
    found_out = CliRunner().invoke(main, [str(word) for word in other])
    assert found_out.exit_code == 1
    assert "adapter: model.embed_tokens.weight" in found_out.output
