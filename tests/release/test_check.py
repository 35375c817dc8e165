"""Planted changes in a release of a tiny model: each is found, and each by its name; an untouched copy is right."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qalora.adapter import write_adapter
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.errors import InputError
from qalora.formats.output import write_json
from qalora.quantization import quantize
from qalora.releasing.check import Checked, check_release
from qalora.releasing.checksums import SUMS, write_sums
from qalora.releasing.digests import file_digest, range_digest
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/qalora with a licence, other-base, adapter, other, and dist with a GGUF and an MLX artefact."""
    root = tmp_path_factory.mktemp("check")
    for name, seed in (("base", 0), ("other-base", 5)):
        tiny_llama(root / f"{name}-float", seed=seed, tokenizer=byte_tokenizer())
        export(quantize(load(root / f"{name}-float"), bits=4, group_size=32), ["qalora"], root / name)
    (root / "base" / "qalora" / "LICENSE").write_text("free as air", encoding="utf-8")
    base = load(root / "base" / "qalora")
    write_adapter(random_adapter(base, seed=1), root / "adapter")
    write_adapter(random_adapter(base, seed=2), root / "other")
    options = ReleaseOptions(targets=("gguf", "mlx"), level="logits", max_tokens=24, generate=2)
    release(plan_release(base, options, root / "dist", adapter=random_adapter(base, seed=1)), root / "dist")
    return root


@pytest.fixture
def dist(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "dist", tmp_path / "dist")
    return tmp_path / "dist"


def base_of(place: Path) -> Checkpoint:
    return load(place / "base" / "qalora")


def check(dist: Path, place: Path, *, again: bool, **options: Any) -> Checked:
    return check_release(dist, base=base_of(place) if again else None, open_artifacts=False, **options)


def gguf(dist: Path) -> Path:
    return next((dist / "gguf").glob("*.gguf"))


def edit(dist: Path, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads((dist / name).read_text("utf-8"))
    change(content)
    write_json(dist / name, content)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


def tensor_row(dist: Path, name: str, target: str = "gguf") -> Any:
    manifest = json.loads((dist / "manifest.json").read_text("utf-8"))
    artifact = next(found for found in manifest["artifacts"] if found["target"] == target)
    return next(row for row in artifact["tensors"] if row["name"] == name)


Q = "model.layers.0.self_attn.q_proj.weight"


def flipped_code(dist: Path) -> None:
    flip(gguf(dist), tensor_row(dist, Q)["offset"] + 5)


def listed_again(dist: Path) -> None:
    """A flipped code, and everything that holds a digest of it made to agree."""
    flipped_code(dist)
    path = gguf(dist)
    name = f"gguf/{path.name}"

    def agree(manifest: Any) -> None:
        artifact = next(found for found in manifest["artifacts"] if found["target"] == "gguf")
        artifact["files"][name]["sha256"] = file_digest(path)
        for row in artifact["tensors"]:
            row["sha256"] = range_digest(path, row["offset"], row["bytes"])

    edit(dist, "manifest.json", agree)
    render(dist)


def render(dist: Path) -> None:
    """Card, page and SBOM made again from what is there, and the sums over it."""
    from qalora.parity.html import to_html
    from qalora.parity.reading import report_from_json
    from qalora.releasing.card import card_text
    from qalora.releasing.manifest import read_manifest
    from qalora.releasing.sbom import sbom_bytes

    manifest = read_manifest(dist)
    report = report_from_json(json.loads((dist / "report.json").read_text("utf-8")), "")
    (dist / "README.md").write_text(card_text(manifest, report), encoding="utf-8")
    (dist / "report.html").write_text(to_html(report, speed=False), encoding="utf-8")
    (dist / "sbom.cdx.json").write_bytes(sbom_bytes(manifest))
    write_sums(dist)


def sums_of_tensor(dist: Path) -> None:
    flipped_code(dist)
    write_sums(dist)


def edited_card(dist: Path) -> None:
    card = dist / "README.md"
    text = card.read_text("utf-8")
    assert "4-bit" in text
    card.write_text(text.replace("4-bit", "3-bit", 1), encoding="utf-8")
    write_sums(dist)


def edited_report(dist: Path) -> None:
    def better(report: Any) -> None:
        report["artifacts"][0]["runs"][0]["lost"] = 0.0

    edit(dist, "report.json", better)
    render(dist)


def edited_count(dist: Path) -> None:
    def more(report: Any) -> None:
        report["artifacts"][0]["weights"]["codes"] += 1

    edit(dist, "report.json", more)
    render(dist)


def failed_gate(dist: Path) -> None:
    def beyond(report: Any) -> None:
        gate = next(g for g in report["artifacts"][0]["runs"][0]["gates"] if g["bound"] and g["gate"] != "top-1")
        gate["value"] = 2 * gate["bound"]

    edit(dist, "report.json", beyond)
    render(dist)


def renamed_verdict(dist: Path) -> None:
    edit(dist, "report.json", lambda report: report.update(passed=False))
    render(dist)


def no_licence(dist: Path) -> None:
    (dist / "LICENSE").unlink()
    write_sums(dist)


def other_licence(dist: Path) -> None:
    (dist / "LICENSE").write_text("all rights reserved", encoding="utf-8")
    write_sums(dist)


def other_artefact(dist: Path) -> None:
    """MLX weights of another adapter's release would look the same; here its minima are another's by one bit."""
    row = tensor_row(dist, Q, "mlx")
    flip(dist / "mlx" / row["file"], row["offset"] + row["bytes"] - 1)
    write_sums(dist)


def more_files(dist: Path) -> None:
    (dist / "gguf" / "more.py").write_text("print()", encoding="utf-8")
    write_sums(dist)


def fewer_files(dist: Path) -> None:
    (dist / "mlx" / "config.json").unlink()
    write_sums(dist)


def a_link(dist: Path) -> None:
    outside = dist.parent / "outside"
    outside.write_text("secret", encoding="utf-8")
    (dist / "LICENSE").unlink()
    (dist / "LICENSE").symlink_to(outside)


def other_page(dist: Path) -> None:
    page = dist / "report.html"
    page.write_text(page.read_text("utf-8").replace("Every gate passed", "Every gate passed twice"), encoding="utf-8")
    write_sums(dist)


def other_sbom(dist: Path) -> None:
    edit(dist, "sbom.cdx.json", lambda sbom: sbom["components"].pop())
    write_sums(dist)


def other_base_named(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["base"].update(digest="sha256:" + 64 * "1"))
    render(dist)


def other_schema(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest.update(schema="qalora.release/2"))
    write_sums(dist)


def unknown_key(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["options"].update(trust_me=True))
    write_sums(dist)


def missing_option(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["options"].pop("gguf_form"))
    write_sums(dist)


def no_number(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["artifacts"][0].update(bits_per_weight=float("nan")))
    write_sums(dist)


def unknown_loss(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["options"].update(allow_loss=["everything"]))
    write_sums(dist)


def key_twice(dist: Path) -> None:
    text = (dist / "manifest.json").read_text("utf-8")
    (dist / "manifest.json").write_text(text.replace('"passed": true', '"passed": false,\n  "passed": true'), "utf-8")
    write_sums(dist)


def nested(dist: Path) -> None:
    (dist / "report.json").write_text('{"gates": ' + "[" * 100_000, encoding="utf-8")
    write_sums(dist)


def other_option(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["options"].update(max_tokens=23))
    render(dist)


def truncated(dist: Path) -> None:
    path = gguf(dist)
    path.write_bytes(path.read_bytes()[:-100])
    write_sums(dist)


def broken_sums(dist: Path) -> None:
    (dist / SUMS).write_text("deadbeef  README.md\n", encoding="utf-8")


def _first_row(**changes: int) -> Callable[[Any], None]:
    return lambda manifest: manifest["artifacts"][0]["tensors"][0].update(changes)


def negative_offset(dist: Path) -> None:
    edit(dist, "manifest.json", _first_row(offset=-5))
    render(dist)


def absurd_offset(dist: Path) -> None:
    edit(dist, "manifest.json", _first_row(offset=10**30))
    render(dist)


def negative_size(dist: Path) -> None:
    edit(dist, "manifest.json", _first_row(bytes=-1))
    render(dist)


def _place_outside(dist: Path) -> Path:
    outside = dist.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret", encoding="utf-8")
    return outside


def folder_beside(dist: Path) -> None:
    _place_outside(dist)
    edit(dist, "manifest.json", lambda manifest: manifest["artifacts"][0].update(folder="../outside"))
    render(dist)


def folder_elsewhere(dist: Path) -> None:
    outside = _place_outside(dist)
    edit(dist, "manifest.json", lambda manifest: manifest["artifacts"][0].update(folder=str(outside)))
    render(dist)


def folder_of_everything(dist: Path) -> None:
    edit(dist, "manifest.json", lambda manifest: manifest["artifacts"][0].update(folder="."))
    render(dist)


def folder_linked(dist: Path) -> None:
    outside = _place_outside(dist)
    shutil.rmtree(dist / "gguf")
    (dist / "gguf").symlink_to(outside)


PLANTED: list[tuple[Callable[[Path], None], bool, str]] = [
    (flipped_code, False, rf"^gguf/.*\.gguf: {Q}: not the bytes"),
    (sums_of_tensor, False, rf"^gguf/.*\.gguf: {Q}: not the bytes"),
    (listed_again, True, rf"^gguf/.*\.gguf: {Q}, at byte \d+: not what base and adapter give"),
    (edited_card, False, r"^README\.md:\d+: .*3-bit.* where report\.json and manifest\.json give .*4-bit"),
    (edited_report, True, r"^report\.json: artifacts\[gguf/.*\.runs\[llama\.cpp\]\.lost: it says 0, and measured"),
    (edited_count, True, r"^report\.json: artifacts\[gguf/.*\]\.weights\.codes: it says"),
    (failed_gate, False, r"^report\.json: gguf/.* in llama\.cpp: .* is no pass"),
    (renamed_verdict, False, r"^report\.json: passed: its gates say otherwise"),
    (no_licence, False, r"^LICENSE: the base's licence is not there"),
    (other_licence, False, r"^LICENSE: not the base's licence"),
    (other_artefact, False, rf"^mlx/model\.safetensors: {Q}: not the bytes"),
    (more_files, False, r"^gguf/more\.py: manifest\.json does not list it"),
    (fewer_files, False, r"^mlx/config\.json: manifest\.json lists it, and it is not there"),
    (a_link, False, r"^LICENSE: .*a link to"),
    (other_page, False, r"^report\.html: not what"),
    (other_sbom, False, r"^sbom\.cdx\.json: not what"),
    (other_base_named, False, r"^gguf/.*: qalora\.provenance\.base: .* where manifest\.json says"),
    (other_schema, False, r"^manifest\.json: .*schema: expected qalora\.release/1"),
    (unknown_key, False, r"^manifest\.json: .*options\.trust_me: unknown key"),
    (missing_option, False, r"^manifest\.json: .*options\.gguf_form: this key is missing"),
    (no_number, False, r"^manifest\.json: .*artifacts\[0\]\.bits_per_weight: expected a finite number, got nan"),
    (unknown_loss, False, r"^manifest\.json: .*options: allow_loss: expected one of zeros, .*, got 'everything'"),
    (key_twice, False, r"^manifest\.json: .*manifest\.json: a key appears twice"),
    (nested, False, r"^report\.json: .*report\.json: expected JSON, got lists or objects nested too deeply"),
    (other_option, True, r"^report\.json: text\.tokens: it says 24, and measured again it is 23"),
    (truncated, False, r"^gguf/.*\.gguf: not the bytes"),
    (broken_sums, False, r"^checksums: .*SHA256SUMS:1: expected a SHA-256 digest"),
    (negative_offset, False, r"^gguf/.*\.gguf: .*: manifest\.json places it outside of the file's \d+ bytes"),
    (absurd_offset, False, r"^gguf/.*\.gguf: .*: manifest\.json places it outside of the file's \d+ bytes"),
    (negative_size, False, r"^gguf/.*\.gguf: .*: manifest\.json places it outside of the file's \d+ bytes"),
    (folder_beside, False, r"^manifest\.json: the folder '\.\./outside' is not the one of its target, gguf$"),
    (folder_elsewhere, False, r"^manifest\.json: the folder '/.* is not the one of its target, gguf$"),
    (folder_of_everything, False, r"^manifest\.json: the folder '\.' is not the one of its target, gguf$"),
    (folder_linked, False, r"^gguf: .*expected a file inside the model's folder, got a link to .*outside"),
]


@pytest.mark.filterwarnings("ignore")  # of the libraries that it runs
@pytest.mark.parametrize(("plant", "again", "said"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_change_is_found_by_name(
    place: Path, dist: Path, plant: Callable[[Path], None], again: bool, said: str
) -> None:
    import re

    plant(dist)
    found = check(dist, place, again=again)
    texts = [str(finding) for finding in found.findings]
    assert any(re.search(said, text) for text in texts), texts
    assert not any("secret" in text for text in texts)


@pytest.mark.filterwarnings("ignore")
def test_an_untouched_copy_is_right(place: Path, dist: Path) -> None:
    found = check(dist, place, again=True, adapter=place / "adapter")
    assert not found.findings
    assert [check.question for check in found.checks if check.skipped] == ["signature", "opening"]
    assert not any(check.notes for check in found.checks)


@pytest.mark.filterwarnings("ignore")
def test_a_release_of_an_earlier_version_is_right(place: Path, dist: Path) -> None:
    """Its manifest does not say what a device loads: that alone is no finding, made again or not."""

    def as_before(manifest: Any) -> None:
        for artifact in manifest["artifacts"]:
            del artifact["device_load"]

    edit(dist, "manifest.json", as_before)
    render(dist)
    assert check(dist, place, again=True).findings == ()


def test_another_adapter_or_base_is_named(place: Path, dist: Path) -> None:
    swapped = check(dist, place, again=True, adapter=place / "other").findings
    assert [str(one) for one in swapped] == [
        "adapter: model.layers.0.mlp.down_proj: other a and b: it is not the adapter of this release"
    ]
    other = check_release(dist, base=load(place / "other-base" / "qalora"), open_artifacts=False).findings
    assert str(other[0]).startswith("base: ")
    assert "it is not the base of this release" in str(other[0])


def test_a_swapped_copy_of_the_adapter_is_found(place: Path, dist: Path) -> None:
    shutil.rmtree(dist / "adapter")
    shutil.copytree(place / "other", dist / "adapter")
    write_sums(dist)
    found = check(dist, place, again=True).findings
    assert "it is not the adapter of this release" in str(found[0])


@pytest.mark.parametrize("damage", [lambda data: b"\xff" * 40 + data[40:], lambda data: data[: len(data) // 2]])
def test_a_damaged_graph_is_found_beside_its_checksum(
    place: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    dist = tmp_path / "dist"
    release(plan_release(base_of(place), ReleaseOptions(targets=("onnx",), level="weights"), dist), dist)
    assert not check_release(dist, open_artifacts=False).findings
    graph = dist / "onnx" / "model.onnx"
    graph.write_bytes(damage(graph.read_bytes()))
    result = run("check", dist)
    assert result.exit_code == 1, result.output
    assert f"onnx/model.onnx: changed since {SUMS} was written" in result.stdout
    assert f"onnx/model.onnx: {graph}: expected an ONNX model, got bytes that protobuf cannot read" in result.stdout


def test_what_lies_behind_a_link_is_given_to_no_runtime(dist: Path) -> None:
    folder_linked(dist)
    (check,) = (check for check in check_release(dist).checks if check.question == "opening")
    assert check.skipped == "weights are not as listed, and are given to no runtime"


@pytest.mark.parametrize("length", [300, 5000])
def test_a_name_that_no_file_can_have_is_a_finding(dist: Path, length: int) -> None:
    with (dist / SUMS).open("a", encoding="utf-8") as file:
        file.write(f"{'0' * 64}  {'x' * length}/model.bin\n")
    result = CliRunner().invoke(main, ["check", str(dist)])
    assert result.exit_code == 1
    assert "xxx" in result.stdout


def test_a_folder_that_is_no_release_is_bad_input(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a release"):
        check_release(tmp_path)


def test_a_base_without_adapter(place: Path, tmp_path: Path) -> None:
    base = replace(base_of(place))
    options = ReleaseOptions(targets=("qalora",), level="weights")
    release(plan_release(base, options, tmp_path / "dist"), tmp_path / "dist")
    assert not check_release(tmp_path / "dist", base=base, open_artifacts=False).findings


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def alone(place: Path, tmp_path: Path) -> Path:
    """A release of a GGUF artefact alone, since each artefact costs a process that imports its runtime."""
    options = ReleaseOptions(targets=("gguf",), level="weights")
    release(plan_release(base_of(place), options, tmp_path / "alone"), tmp_path / "alone")
    return tmp_path / "alone"


@pytest.mark.slow
def test_every_artefact_is_opened_in_a_fresh_process(alone: Path) -> None:
    good = run("check", alone)
    assert good.exit_code == 0, good.output
    assert "opening  ok" in good.stdout
    flip(gguf(alone), 1)  # the magic
    write_sums(alone)
    bad = run("check", alone, "--json")
    assert bad.exit_code == 1
    stages = {stage["question"]: stage for stage in json.loads(bad.stdout)["stages"]}
    assert stages["files"]["findings"][0]["where"].startswith("gguf/")


@pytest.mark.slow
def test_what_does_not_open_is_named(alone: Path) -> None:
    """The sums are right, and the file is not: its head says more tensors than it has."""
    path = gguf(alone)
    path.write_bytes(path.read_bytes()[:-4096])
    write_sums(alone)
    found = check_release(alone).findings
    assert any(str(one).startswith(f"gguf/{path.name} in llama.cpp: it does not open") for one in found)
