"""compressed-tensors folders, made by compressed-tensors' own code, against its own decompression; and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from packed import by_compressed_tensors, change_config, copied, put, say
from qalora.converters import load
from qalora.converters.compressed_tensors import read
from qalora.errors import FormatError
from qalora.formats.compressed_tensors import pack_rows, pack_zeros, row_words, unpack_rows, unpack_zeros
from qalora.inspection import inspect
from qalora.tensor import BITS, pack_codes
from qalora.testing import assert_same_model, assert_same_tensor, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao, which transformers imports, and of its progress bars

Q_PROJ = "model.layers.0.self_attn.q_proj"


def weights(bits: int = 4, group_size: int | None = 32, symmetric: bool = False, **more: Any) -> dict[str, Any]:
    """What a group says of its weights; group_size None: of rows."""
    size = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **size, **more}}


def linears(**options: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], **weights(**options)}}


def assert_theirs(folder: Path, theirs: dict[str, torch.Tensor]) -> None:
    """Every packed weight is theirs, in their dtype: scale * (code - zero) is exact in float32 for 16-bit scales."""
    model = load(folder)
    packed = {name for name, lazy in model.tensors.items() if lazy.spec is not None}
    assert packed == set(theirs) and set(model.linears) <= packed
    for name, weight in theirs.items():
        assert torch.equal(model.tensors[name].load_float().to(weight.dtype), weight), name


# ---- as the library writes them


@pytest.mark.pairs(
    bits=BITS, group_size=[16, 32, None], symmetric=[True, False], dtype=[torch.float16, torch.bfloat16], tied=[0, 1]
)
def test_what_the_library_packs(
    bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype, tied: int, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "float", config={"tie_word_embeddings": bool(tied)})
    ignore = ["lm_head"] if tied else []
    groups = linears(bits=bits, group_size=group_size, symmetric=symmetric)
    theirs = by_compressed_tensors(source, tmp_path / "packed", groups, ignore=ignore, dtype=dtype)
    assert_theirs(tmp_path / "packed", theirs)
    model = load(tmp_path / "packed")
    spec = model.tensors[f"{Q_PROJ}.weight"].spec
    assert spec is not None and spec.zero == (1 << (bits - 1) if symmetric else None)
    assert ("lm_head.weight" in theirs, model.tied, model.notes) == (not tied, bool(tied), ())
    report = inspect(tmp_path / "packed")
    assert {finding.code for finding in report.warnings} <= {"no-tokenizer"}


def test_float32_scales_are_kept(tiny_untied: Path, tmp_path: Path) -> None:
    """The library rounds (code - zero) * scale once; here are codes, zero points and scales themselves."""
    by_compressed_tensors(tiny_untied, tmp_path / "packed", linears(bits=8), dtype=torch.float32)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    tensor = load(tmp_path / "packed").tensors[f"{Q_PROJ}.weight"].load_quantized()
    zero = unpack_zeros(stored[f"{Q_PROJ}.weight_zero_point"], 64, 8)
    assert torch.equal(tensor.scale, stored[f"{Q_PROJ}.weight_scale"])
    assert torch.equal(tensor.min, -tensor.scale * zero)
    assert torch.equal(tensor.packed.view(torch.int32), stored[f"{Q_PROJ}.weight_packed"])


GROUPS: dict[str, Any] = {
    "of all": {"targets": ["Linear"], **weights(bits=4)},
    "of some": {"targets": ["re:.*mlp\\.(up|gate)_proj$"], **weights(bits=3, symmetric=True)},
    "of two": {"targets": ["model.layers.1.mlp.up_proj", "re:.*layers\\.1.*o_proj"], **weights(bits=8, group_size=64)},
    "of the embedding": {"targets": ["Embedding"], **weights(bits=6, group_size=None, symmetric=True)},
}


def test_groups_with_targets_of_each_kind(tiny_untied: Path, tmp_path: Path) -> None:
    """A path counts before expressions, these before classes; and the library's own reading of what it has written."""
    ignore = ["re:.*k_proj", "model.layers.0.self_attn.v_proj", "lm_head"]
    theirs = by_compressed_tensors(tiny_untied, tmp_path / "packed", GROUPS, ignore=ignore, max_shard_size="20KB")
    model = load(tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    for name, weight in theirs.items():
        assert torch.equal(model.tensors[name].load_float().half(), weight), name
    widths = {name: lazy.spec and (lazy.spec.bits, lazy.spec.group_size) for name, lazy in model.tensors.items()}
    layers = [f"model.layers.{n}" for n in range(2)]
    assert [widths[f"{layer}.mlp.up_proj.weight"] for layer in layers] == [(3, 32), (8, 64)]
    assert [widths[f"{layer}.mlp.gate_proj.weight"] for layer in layers] == [(3, 32), (3, 32)]
    assert [widths[f"{layer}.self_attn.o_proj.weight"] for layer in layers] == [(4, 32), (8, 64)]
    assert [widths[f"{layer}.self_attn.k_proj.weight"] for layer in layers] == [None, None]
    assert [widths[f"{layer}.self_attn.v_proj.weight"] for layer in layers] == [None, (4, 32)]
    assert (widths["model.embed_tokens.weight"], widths["lm_head.weight"]) == ((6, 64), None)


@pytest.fixture(scope="module")
def packed(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 bits in groups of 32, asymmetric; it is everybody's."""
    folder = tmp_path_factory.mktemp("packed")
    by_compressed_tensors(tiny_untied, folder, linears())
    return folder


def test_rows_are_those_of_the_whole(packed: Path) -> None:
    lazy = load(packed).tensors[f"{Q_PROJ}.weight"]
    assert lazy.by_rows
    assert_same_tensor(lazy.rows(5, 12), lazy.load_quantized().rows(5, 12))


# ---- as earlier versions write them


def by_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as version 0.9.4 packs them: 32 // bits in a word, none in two (pack_quantized.py)."""
    per = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per), dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // per] |= codes[:, column].long() << bits * (column % per)
    return words.to(torch.int32)


@pytest.mark.parametrize("bits", BITS)
def test_words_of_earlier_versions(bits: int, tiny_untied: Path, tmp_path: Path) -> None:
    by_compressed_tensors(tiny_untied, tmp_path / "packed", linears(bits=bits))

    def as_before(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module, words = name.removesuffix(".weight_packed"), tensors[name]
            rows, columns = tensors[f"{module}.weight_shape"].tolist()
            zero = unpack_zeros(tensors[f"{module}.weight_zero_point"], rows, bits)
            packed = unpack_rows(words, columns, bits)
            codes = torch.stack([code_of(packed, column, bits) for column in range(columns)], dim=1)
            tensors[name] = by_words(codes, bits)
            tensors[f"{module}.weight_zero_point"] = by_words(zero.t(), bits).t().contiguous()

    before = copied(tmp_path / "packed", tmp_path / "before", as_before)
    assert_same_model(load(before), load(tmp_path / "packed"))


def code_of(packed: torch.Tensor, column: int, bits: int) -> torch.Tensor:
    """The codes of a column, from the bits of packed rows."""
    places = [column * bits + bit for bit in range(bits)]
    return sum(((packed[:, place // 8].int() >> place % 8 & 1) << n for n, place in enumerate(places)), torch.tensor(0))


def test_columns_in_groups_of_their_own(packed: Path, tmp_path: Path) -> None:
    """actorder group: weight_g_idx holds the group of each column (0.9.4, quantization/lifecycle/forward.py)."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32

    def ordered(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_shape")]:
            columns = int(tensors[name][1])
            index = order if columns == 64 else torch.arange(columns) // 32
            tensors[name.replace("_shape", "_g_idx")] = index.int()

    folder = copied(packed, tmp_path / "ordered", ordered)
    change_config(folder, lambda said: said["config_groups"]["group_0"]["weights"].update(actorder="group"))
    model, plain = load(folder), load(packed)
    for name in model.linears:
        got, lazy = model.tensors[name].load_quantized(), model.tensors[name]
        was = plain.tensors[name].load_quantized()
        index = order if got.shape[1] == 64 else torch.arange(got.shape[1]) // 32
        assert lazy.spec is not None and lazy.spec.act_order == (got.shape[1] == 64)
        wanted = was.scale[:, index] * was.codes() + was.min[:, index]
        assert torch.equal(got.dequantize(), wanted)


def test_zero_points_that_nothing_packed(packed: Path, tmp_path: Path) -> None:
    """int8, as they are; and one that its width does not hold."""

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("zero_point")]:
            rows = int(tensors[name.replace("zero_point", "shape")][0])
            tensors[name] = (unpack_zeros(tensors[name], rows, 4).to(torch.int16) - 8).to(torch.int8)

    folder = copied(packed, tmp_path / "plain", plain)
    assert_same_model(load(folder), load(packed))
    far = copied(folder, tmp_path / "far", lambda tensors: tensors[f"{Q_PROJ}.weight_zero_point"].fill_(8))
    with pytest.raises(FormatError, match=r"q_proj\.weight: weight_zero_point: expected values of 4 bits"):
        load(far).tensors[f"{Q_PROJ}.weight"].load()


@pytest.mark.parametrize("bits", BITS)
def test_words_there_and_back(bits: int) -> None:
    """Against the library's own packing, for lengths that fill no word."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (5, 40), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    rows = pack_codes(codes, bits)
    assert torch.equal(pack_rows(rows), pack_to_int32(signed, bits))
    assert torch.equal(unpack_rows(pack_rows(rows), 40, bits), rows)
    for count in (1, 3, 5):
        zeros = pack_zeros(codes[:count], bits)
        assert torch.equal(zeros, pack_to_int32(signed[:count], bits, packed_dim=0))
        assert torch.equal(unpack_zeros(zeros, count, bits), codes[:count])


# ---- what is refused


def of_group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["config_groups"]["group_0"].update(changes)


def of_weights(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["config_groups"]["group_0"]["weights"].update(changes)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (say(format="float-quantized"), r"format: expected pack-quantized.*got 'float-quantized'"),
    "dense": (say(format="dense"), r"format: expected pack-quantized.*got 'dense'"),
    "NVFP4 in a group": (
        of_group(format="nvfp4-pack-quantized"),
        r"group_0: format: expected pack-quantized, integers in words, got 'nvfp4-pack-quantized'; start from the",
    ),
    "no group's format": (
        lambda said: (said.update(format="mixed-precision"), of_group(format=None)(said)),  # type: ignore[arg-type]
        r"group_0: format: expected pack-quantized.*got null",
    ),
    "quantized activations": (
        of_group(input_activations={"num_bits": 8}),
        r"input_activations: quantized activations, which is not read here",
    ),
    "a quantized cache": (say(kv_cache_scheme={"num_bits": 8}), r"a quantized cache of keys and values"),
    "sparse weights": (say(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config: sparse weights"),
    "transforms": (say(transform_config={"config_groups": {"u": {}}}), r"transform_config: weights that were"),
    "floats": (of_weights(type="float"), r"weights: type: expected int, got 'float'"),
    "7 bits": (of_weights(num_bits=7), r"num_bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
    "one scale": (of_weights(strategy="tensor", group_size=None), r"strategy: expected group or channel, got 'tensor'"),
    "an order that is none": (of_weights(actorder="rows"), r"actorder: expected weight, group or none, got 'rows'"),
    "an order without its tensor": (of_weights(actorder="group"), r"missing tensor weight_g_idx"),
    "a key of weights": (of_weights(outliers=3), r"weights says 'outliers', which is not known here: got 3"),
    "a key of a group": (of_group(rotation="x"), r"group_0 says 'rotation', which is not known here"),
    "a key of all": (say(experts=1), r"quantization_config says 'experts', which is not known here"),
    "a scheme by its name": (say(config_groups={"W4A16": ["Linear"]}), r"W4A16: a scheme by its name"),
    "no groups": (say(config_groups={}), r"config_groups: expected an object of groups, got \{\}"),
    "words that are left out": (say(ignore=["re:.*q_proj"]), r"'re:\.\*q_proj' in ignore leaves out"),
    "words of no target": (of_group(targets=["re:.*mlp"]), r"config_groups: expected a target that is .*, got none"),
    "an expression": (of_group(targets=["re:(a+)+"]), r"'re:\(a\+\)\+': an expression with repeated groups"),
    "another width": (
        of_weights(num_bits=8),
        r"weight_packed: expected int32 \[64, 32\] at 8 bits, as group 'group_0'",
    ),
    "other groups": (of_weights(group_size=16), r"weight_scale: expected float16 \[64, 8\]"),
    "groups that do not fit": (of_weights(group_size=48), r"group_size: expected a divisor of 128 columns, got 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, packed: Path, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    folder = copied(packed, tmp_path / "changed", lambda tensors: None)
    change_config(folder, change)
    with pytest.raises(FormatError, match=message):
        read(folder)


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scales": (put(f"{Q_PROJ}.weight_scale", None), r"q_proj: missing tensor weight_scale"),
    "no zero points": (put(f"{Q_PROJ}.weight_zero_point", None), r"q_proj: missing tensor weight_zero_point"),
    "a scale of activations": (put(f"{Q_PROJ}.input_scale", torch.ones(1)), r"q_proj\.input_scale: a tensor that is"),
    "an order that nothing says": (
        put(f"{Q_PROJ}.weight_g_idx", torch.zeros(64, dtype=torch.int32)),
        r"weight_g_idx: expected none, as actorder says",
    ),
    "a shape of one number": (
        put(f"{Q_PROJ}.weight_shape", torch.ones(1, dtype=torch.int64)),
        r"weight_shape: expected 2 whole numbers",
    ),
    "a shape of no columns": (
        put(f"{Q_PROJ}.weight_shape", torch.tensor([64, 0])),
        r"weight_shape: expected rows, and columns in a multiple of 8, got 64, 0",
    ),
    "rows of another model": (
        put(f"{Q_PROJ}.weight_shape", torch.tensor([32, 64])),
        r"weight_packed: expected int32 \[32, 8\] at 4 bits.*got int32 \[64, 8\]",
    ),
    "words of experts": (
        put(f"{Q_PROJ}.weight_packed", torch.zeros(2, 64, 8, dtype=torch.int32)),
        r"weight_packed: expected int32 \[64, 8\].*got int32 \[2, 64, 8\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_a_sentence(damage: str, packed: Path, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(FormatError, match=message):
        read(copied(packed, tmp_path / "damaged", change))


def test_rows_of_which_nothing_tells_how_they_are_packed(tmp_path: Path) -> None:
    """At 3 bits 48 columns take 5 words either way."""
    assert row_words(48, 3) == row_words(48, 3, padded=True) == 5
    source = tiny_llama(tmp_path / "float", config={"intermediate_size": 48})
    by_compressed_tensors(source, tmp_path / "packed", linears(bits=3, group_size=None))
    with pytest.raises(FormatError, match=r"rows of 48 columns at 3 bits, whose two ways of packing look alike"):
        read(tmp_path / "packed")


def test_zero_points_off_by_one_are_seen(tiny_untied: Path, tmp_path: Path) -> None:
    """As if they had been stored minus one, as GPTQ's are."""
    by_compressed_tensors(tiny_untied, tmp_path / "packed", linears(), moved=False)

    def lower(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("zero_point")]:
            rows = int(tensors[name.replace("zero_point", "shape")][0])
            tensors[name] = pack_zeros(unpack_zeros(tensors[name], rows, 4) - 1, 4)

    lowered = copied(tmp_path / "packed", tmp_path / "lower", lower)
    seen = [{one.code for one in inspect(place).warnings} for place in (tmp_path / "packed", lowered)]
    assert ["zeros-off-by-one" in codes for codes in seen] == [False, True]
