"""The metadata that travels with an artefact: undone, restored where the values bear it out, refused where not."""

from dataclasses import replace

import pytest
import torch

from qalora.checkpoint import LazyTensor
from qalora.converters.specs import fits, parse_specs, restored, specs_text
from qalora.errors import FormatError
from qalora.tensor import GroupQuantTensor, QuantSpec, pack_codes
from qalora.testing import assert_same_tensor, lazily, random_tensor

HALVES = {"scale_dtype": torch.float16, "min_dtype": torch.float16}
REAL = QuantSpec(bits=3, group_size=64, zeros="real", **HALVES)
INTEGER = QuantSpec(bits=6, group_size=32, zeros="integer", scale_dtype=torch.float16, min_dtype=torch.float32, zero=32)


def stored(tensor: GroupQuantTensor, **changes: object) -> LazyTensor:
    lazy = lazily("m.weight", tensor)
    assert lazy.spec is not None
    return replace(lazy, spec=replace(lazy.spec, **changes))


def test_text_is_undone() -> None:
    specs = {"a": REAL, "b.c": INTEGER, "d": replace(REAL, bits=8, min_dtype=torch.float32)}
    assert parse_specs(specs_text(specs), "f") == specs


def test_a_zero_may_be_left_out() -> None:
    assert parse_specs('{"a": [3, 64, "real", "float16", "float16"]}', "f") == {"a": REAL}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"a": 1}',
        '{"a": [3, 64, "real", "float16"]}',
        '{"a": [7, 64, "real", "float16", "float16"]}',
        '{"a": [3, 0, "real", "float16", "float16"]}',
        '{"a": [3, 64, "half", "float16", "float16"]}',
        '{"a": [3, 64, "real", "bfloat16", "float16"]}',
        '{"a": [3, 64, "real", ["float16"], "float16"]}',
        '{"a": [true, 64, "real", "float16", "float16"]}',
        '{"a": [3, 64, "real", "float16", "float16", 4]}',
        '{"a": [3, 64, "integer", "float16", "float16", 8]}',
        '{"a": [3, 64, "integer", "float16", "float16", -1]}',
        "[" * 100000,
    ],
)
def test_what_is_no_such_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"^f: qalora\.tensors") as caught:
        parse_specs(text, "f")
    assert "\n" not in str(caught.value)


def test_narrower_codes_and_larger_groups_come_back() -> None:
    tensor = random_tensor(8, 128, bits=3, group_size=64)
    carried = replace(tensor.regrouped(32), packed=pack_codes(tensor.codes(), 4), bits=4)
    back = restored(stored(carried), REAL)
    assert back.spec == REAL
    assert_same_tensor(back.load_quantized(), tensor)
    part = back.rows(2, 5)
    assert isinstance(part, GroupQuantTensor)
    assert_same_tensor(part, tensor.rows(2, 5))


def test_moved_codes_come_back() -> None:
    """As Q8_0 holds symmetric 6-bit codes: + 96, zero point 128."""
    tensor = random_tensor(8, 64, bits=6, group_size=32)
    tensor = replace(tensor, min=-32 * tensor.scale)
    carried = GroupQuantTensor.from_codes(tensor.codes() + 96, tensor.scale, -128 * tensor.scale, 8, 32)
    lazy = stored(carried, zeros="integer", zero=128, min_dtype=torch.float32)
    assert_same_tensor(restored(lazy, INTEGER).load_quantized(), tensor)
    assert not fits(lazy, replace(INTEGER, zero=None))


def test_what_the_values_do_not_bear_out_is_refused() -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=32)
    for spec, sentence in (
        (REAL, "codes: expected 3 bits"),
        (replace(REAL, bits=4), "scale: expected one value for 64 columns"),
        (replace(REAL, bits=4, group_size=32, zeros="integer"), "zero points: expected integers"),
    ):
        with pytest.raises(FormatError, match=f"m.weight: {sentence}"):
            restored(stored(tensor), spec).load()
    fine = replace(tensor, min=tensor.min * 1.0001)
    with pytest.raises(FormatError, match="min: expected float16 values"):
        restored(stored(fine), replace(REAL, bits=4, group_size=32)).load()
    whole = random_tensor(8, 128, bits=4, group_size=32, zeros="integer")
    with pytest.raises(FormatError, match="zero points: expected 8"):
        restored(stored(whole), replace(INTEGER, bits=4, zero=8)).load()


@pytest.mark.parametrize(
    "change", [{"bits": 5}, {"group_size": 48}, {"group_size": 16}, {"group_size": 256}, {"bits": 3, "group_size": 16}]
)
def test_what_cannot_be_is_refused_at_once(change: dict[str, int]) -> None:
    lazy = stored(random_tensor(8, 128, bits=4, group_size=32))
    assert not fits(lazy, replace(REAL, **change))
    with pytest.raises(FormatError, match="expected what the tensor can hold"):
        restored(lazy, replace(REAL, **change))
