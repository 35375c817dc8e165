"""Model cards: of a real release of a tiny model in every format, whose blocks are run; and of manifests that lie."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from forks import Forks
from in_node import missing_in_node
from qalora.converters import TARGETS, load
from qalora.converters.plan import ExportOptions
from qalora.errors import FormatError, InputError
from qalora.formats.record_json import decode, encode
from qalora.parity.reading import report_from_json
from qalora.quantization import quantize
from qalora.releasing.card import PARTS, card_text, check_template, default_template
from qalora.releasing.licences import HUB_LICENCES
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.releasing.records import ArtifactEntry, Manifest
from qalora.releasing.sbom import sbom_bytes
from qalora.releasing.usage import usage
from qalora.testing import byte_tokenizer, random_adapter, tiny_llama
from targets import OF_REAL_ZEROS

Json = dict[str, Any]

EXTERNAL = {
    "llama-cli": {"-m", "-p", "-n"},
    "ollama": {"-f"},
}
"""Programs that no package index has, and the flags that their documents know: these lines are not run."""


def released(root: Path, targets: tuple[str, ...], *, adapted: bool = True, **options: Any) -> Path:
    """A release of a tiny model at root/dist."""
    tiny_llama(root / "float", tokenizer=byte_tokenizer())
    model = quantize(load(root / "float"), bits=4, group_size=32)
    adapter = random_adapter(model, seed=1) if adapted else None
    chosen = ReleaseOptions(targets=targets, export=ExportOptions(name="tiny"), **options)
    planned = plan_release(model, chosen, root / "dist", adapter=adapter)
    release(planned, root / "dist")
    return root / "dist"


def parts(folder: Path) -> tuple[Json, Json]:
    manifest, report = (json.loads((folder / name).read_text("utf-8")) for name in ("manifest.json", "report.json"))
    return manifest, report


def made(manifest: Json, report: Json, **given: Any) -> str:
    """The card of what the two files hold."""
    return card_text(decode(Manifest, manifest, "manifest.json"), report_from_json(report, "report.json"), **given)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights alone, and no runtime."""
    return released(tmp_path_factory.mktemp("light"), ("gguf", "onnx", "qalora"), level="weights")


ABSENT = [
    *(["transformersjs"] if missing_in_node() else []),
    *(["mnn"] if importlib.util.find_spec("MNN") is None else []),
]
ALL = tuple(name for name in OF_REAL_ZEROS if name not in ABSENT)
"""Formats of real zero points whose runtimes are here."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format, each proven in its runtime."""
    return released(tmp_path_factory.mktemp("whole"), ALL, max_tokens=32, generate=4)


def blocks(card: str) -> list[tuple[str, str]]:
    """Language and text of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_it_is_a_function_of_manifest_and_report(light: Path) -> None:
    manifest, report = parts(light)
    assert made(manifest, report) == (light / "README.md").read_text("utf-8")
    report["artifacts"][0]["weights"]["codes_differ"] = 7
    assert "| 7 |" in made(manifest, report)


def test_the_table_counts_what_a_device_loads(light: Path) -> None:
    """By hand: Q4_1's blocks, and codes, scale and min of ONNX's one data file; a float32 embedding."""
    manifest, report = parts(light)
    gguf, onnx = (manifest["artifacts"][n] for n in (0, 1))
    shape = manifest["base"]["tensors"]["model.embed_tokens.weight"]["shape"]
    size = f"{4 * shape[0] * shape[1] / 1000:.3g} kB"
    rows = [row for row in onnx["tensors"] if "_proj" in row["name"]]
    weights = sum(row["bytes"] for row in gguf["tensors"] if "_proj" in row["name"]) * 8 / 5
    bits = sum(row["bytes"] for row in rows) * 8 / weights
    for folder, linear in (("gguf", 5.0), ("onnx", bits)):
        row = next(line for line in made(manifest, report).splitlines() if line.startswith(f"| `{folder}/`"))
        assert f"| {linear:.2f}, embedding 32.00 ({size}) |" in row


def test_a_release_of_an_earlier_version_reads_as_it_was(light: Path) -> None:
    """Its manifest does not say what a device loads: the same JSON again, and the card's table counts all files."""
    manifest, report = parts(light)
    for artifact in manifest["artifacts"]:
        del artifact["device_load"]
    assert encode(decode(Manifest, manifest, "manifest.json")) == manifest
    rows = [line for line in made(manifest, report).splitlines() if re.match(r"\| `(gguf|onnx|qalora)/`", line)]
    for row, artifact in zip(rows, manifest["artifacts"], strict=True):
        assert f"| {artifact['bits_per_weight']:.2f} |" in row
    bom = json.loads(sbom_bytes(decode(Manifest, manifest, "manifest.json")))
    metrics = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {row["type"] for row in metrics if "bits" in row["type"]} == {"bits per weight"}


def test_front_matter(light: Path) -> None:
    manifest, report = parts(light)
    plain = ModelCard(made(manifest, report)).data.to_dict()
    assert plain["tags"] == ["qa-lora", "quantized", "4-bit", "gguf", "onnx", "qalora"]
    assert plain["library_name"] == "gguf" and plain["pipeline_tag"] == "text-generation"
    assert not {"base_model", "base_model_relation", "license", "language", "datasets", "quantized_by"} & set(plain)
    manifest["options"]["card"] = {
        "base_model": "some/base",
        "license": "Apache-2.0",
        "language": ["en", "de"],
        "datasets": ["some/data"],
        "quantized_by": "somebody",
    }
    told = ModelCard(made(manifest, report)).data.to_dict()
    assert told["base_model"] == "some/base" and told["base_model_relation"] == "finetune"
    assert told["license"] == "apache-2.0" and "license_name" not in told
    assert told["language"] == ["en", "de"] and told["datasets"] == ["some/data"]
    assert told["quantized_by"] == "somebody"
    manifest["adapter"] = None
    assert ModelCard(made(manifest, report)).data.to_dict()["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("card", "licences", "expected"),
    [
        ({}, [], {}),
        ({"license": "mit"}, ["LICENSE"], {"license": "mit"}),
        (
            {"license": "smollm-community"},
            ["LICENSE"],
            {"license": "other", "license_name": "smollm-community", "license_link": "LICENSE"},
        ),
        ({}, ["LICENSE.md"], {"license": "other", "license_name": "as-in-its-file", "license_link": "LICENSE.md"}),
        (
            {"license": "own", "license_link": "https://example.com/own"},
            [],
            {"license": "other", "license_name": "own", "license_link": "https://example.com/own"},
        ),
    ],
)
def test_licences(light: Path, card: Json, licences: list[str], expected: Json) -> None:
    manifest, report = parts(light)
    manifest["options"]["card"], manifest["licences"] = card, licences
    found = ModelCard(made(manifest, report)).data.to_dict()
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    template = "---\n{{ card_data }}\nextra: 1\n---\n# Ours: {{title}}\n{{ proof }}\n{% not executed %} {{ '{{' }}\n"
    with pytest.raises(InputError, match=r"got no template; give it as `card_template`|expected the template that"):
        made(*_with_template(tmp_path, template))
    manifest, report = _with_template(tmp_path, template)
    text = made(manifest, report, template=template)
    assert "# Ours: tiny, fine-tuned\n" in text and "{% not executed %} {{ '{{' }}" in text
    assert ModelCard(text).data.to_dict()["extra"] == 1
    with pytest.raises(InputError, match="got a different template; give it as `card_template`"):
        made(manifest, report, template=default_template())


def _with_template(root: Path, template: str) -> tuple[Json, Json]:
    if not (root / "dist").exists():
        released(root, ("gguf",), level="weights", template=template)
    return parts(root / "dist")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("---\n{{ card_data }}\n---\n\n{{ figures }}", r"line 5: expected one of card_data, .*got 'figures'"),
        ("# no front matter", "expected '---' in its first line"),
        ("---\n{{ card_data }}\n[\n---\n", "front matter is not read"),
        ("---\n- a list\n---\n", "front matter is not read"),
    ],
)
def test_templates_that_make_no_card(light: Path, template: str, message: str) -> None:
    from qalora.releasing.digests import content_digest

    manifest, report = parts(light)
    manifest["options"]["template"] = content_digest(template.encode())
    with pytest.raises(InputError, match=message):
        made(manifest, report, template=template)
    with pytest.raises(InputError, match=message):
        check_template(template)
    check_template(default_template())


def test_every_part_is_in_the_default_template() -> None:
    assert set(re.findall(r"\{\{ (\w+) \}\}", default_template())) == set(PARTS)


EVIL = (
    "x\n---\nlicense: mit\n# [a](https://evil.example) <script>alert(1)</script> | `b` {{ card_data }} www.evil.example"
)


def _name(manifest: Json, report: Json) -> None:
    manifest["name"] = EVIL


def _carrier(manifest: Json, report: Json) -> None:
    manifest["artifacts"][0]["tensors"][0]["carrier"] = EVIL


def _source(manifest: Json, report: Json) -> None:
    manifest["base"]["source"] = manifest["options"]["card"]["license"] = EVIL


def _report(manifest: Json, report: Json) -> None:
    report["artifacts"][0]["name"] = EVIL
    report["artifacts"][0]["runs"] = [
        {
            "kind": EVIL,
            "runtime": {"name": EVIL, "version": EVIL, "backend": EVIL, "dtype": EVIL, "threads": 1},
            "rounding": EVIL,
            "lost": 0.5,
        }
    ]


@pytest.mark.parametrize("plant", [_name, _carrier, _source, _report])
def test_strings_of_others_stay_text(light: Path, plant: Callable[[Json, Json], None]) -> None:
    manifest, report = deepcopy(parts(light))
    plant(manifest, report)
    text = made(manifest, report)
    card = ModelCard(text)
    code = re.sub(r"`[^`\n]*`", "", card.text)
    assert "<script>" not in code and "](http" not in code and "www.evil" not in code
    assert "{{" not in code and "\n---\nlicense" not in card.text
    assert card.data.to_dict().get("license") != "mit"
    clean = ModelCard((light / "README.md").read_text("utf-8")).text
    assert card.text.count("\n#") == clean.count("\n#")
    assert [row.count("|") for row in card.text.splitlines() if row[:1] == "|"][:6] == [8] * 5 + [8]


FILE = {"bytes": 1, "sha256": "sha256:" + 64 * "0"}


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["options"]["card"].update(language="en"),
        lambda manifest: manifest["options"]["card"].update(quantized_by=["a"]),
        lambda manifest: manifest["artifacts"][0].update(target="exe"),
        lambda manifest: manifest["artifacts"][0].update(files={'gguf/a" && rm -r x.gguf': FILE}),
        lambda manifest: manifest["artifacts"][0].update(files={}),
        lambda manifest: manifest["adapter"].update(convention="a`b"),
        lambda manifest: manifest["base"]["tensors"].update(x={"bits": 4}),
    ],
)
def test_manifests_that_lie_are_refused(light: Path, change: Callable[[Json], None]) -> None:
    manifest, report = parts(light)
    change(manifest)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        made(manifest, report)


@pytest.mark.parametrize(
    "report",
    [
        {"schema": "qalora.parity/2"},
        {"text": None, "level": "weights"},
        {"text": {"tokens": "many", "source": None, "windows": 1}, "level": "logits", "artifacts": []},
        {"text": {"tokens": 1, "source": None, "windows": 1}, "level": "weights", "artifacts": [{"name": 1}]},
    ],
)
def test_reports_that_are_none(light: Path, report: Json) -> None:
    with pytest.raises(FormatError, match=r"^report\.json: "):
        made(parts(light)[0], {"schema": "qalora.parity/1", **report})


def test_every_target_has_its_usage(light: Path) -> None:
    manifest, _ = parts(light)
    for target in TARGETS:
        files = {"gguf/a.gguf": FILE} if target == "gguf" else {}
        changed = {**manifest["artifacts"][0], "target": target, "files": files, "tensors": []}
        assert blocks(usage(decode(ArtifactEntry, changed, ""), manifest["name"]))


@pytest.mark.slow
def test_the_blocks_of_a_card_run(light_forks: Forks, whole: Path) -> None:
    """Each in a fresh process, in the release's folder; a block of Python prints what it made of its prompt."""
    card = (whole / "README.md").read_text("utf-8")
    found = [block for block in blocks(card) if block[0] != "js"]  # Node runs that one: see test_transformersjs
    assert {language for language, _ in found} == {"python", "sh"}
    assert [language for language, _ in found].count("python") == 9 + ("mnn" in ALL)
    for language, text in found:
        if language == "python":
            done = light_forks.run("-c", text, folder=whole, timeout=600)
            assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"
            assert len(done.stdout.replace("Once upon a time", "").strip()) > 4, f"{text}\n{done.stdout}"
        else:
            for line in text.splitlines():
                _shell(light_forks, line, whole)


def _shell(forks: Forks, line: str, folder: Path) -> None:
    """Run a line, or hold what it names: its files are there, its flags are known."""
    words = shlex.split(line)
    if words[0] in EXTERNAL:
        assert {word for word in words if word.startswith("-")} <= EXTERNAL[words[0]]
        assert all((folder / word).is_file() for word in words if word.startswith("gguf/"))
        return
    if words[0] in ("qalora", "python"):
        given = ["-m", *words] if words[0] == "qalora" else words[1:]
        done = forks.run(*given, folder=folder, timeout=600)
    else:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_folder_is_as_it_was(whole: Path, tmp_path: Path) -> None:
    """Trying the blocks leaves nothing behind, and a copy elsewhere has the same card."""
    shutil.copytree(whole, tmp_path / "copy")
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "copy", check=False)
    assert done.returncode == 0
    assert made(*parts(tmp_path / "copy")) == (whole / "README.md").read_text("utf-8")
    assert all(kind in (whole / "README.md").read_text("utf-8") for kind in ("| mlx |", "| hqq |", "| llama.cpp |"))


def test_every_word_of_a_licence_is_whole() -> None:
    """A word that a line broke in two would make the card of such a model say `other`."""
    assert {"cc-by-3.0", "cc-by-nc-sa-3.0", "apache-2.0"} <= HUB_LICENCES
    assert not [word for word in HUB_LICENCES if word.endswith("-") or word[0].isdigit()]
    assert not HUB_LICENCES & {"by-3.0", "nc-sa-3.0"}
