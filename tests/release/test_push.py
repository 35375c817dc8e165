"""Uploads to a Hub on this machine, by huggingface_hub in a fresh process: what arrives is the folder, to the byte."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forks import Forks
from qalora.cli.push import command
from qalora.errors import FormatError, InputError, ProofError
from qalora.releasing.checksums import check_sums, write_sums
from qalora.releasing.push import LARGEST_FILE, openings, plan_push

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# tiny\n",
    "report.json": b'{"schema": "qalora.parity/1", "passed": true}\n',
    "model.sig": b"{}",
    "gptq/config.json": b"{}",
    "gptq/model.safetensors": bytes(range(256)) * 50,
    "gguf/tiny-QALoRA-Q4_1.gguf": b"GGUF" * 1000,
    "gguf/Modelfile": b"FROM ./tiny-QALoRA-Q4_1.gguf\n",
    "mlx/model.safetensors": b"x" * 999,
    "onnx/model.onnx": b"onnx",
    "onnx/portable/model.onnx.data": b"more[1]",
    "onnx/empty[1]*.data": b"",
}


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_sums(folder)
    return folder


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fresh(light_forks: Forks, tmp_path: Path) -> Run:
    """fresh(url, code): Python in a fresh process that knows no Hub but ours."""

    def run(hub_url: str, code: str, **more: str) -> subprocess.CompletedProcess[str]:
        away = ["HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"]
        away += [name for name in light_forks.environment if "proxy" in name.lower()]
        environment: dict[str, str | None] = dict.fromkeys(away)
        environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_" + "a" * 34}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return light_forks.run("-c", code, environment=environment | more)

    return run


@pytest.fixture
def upload(fresh: Run) -> Run:
    """upload(url, folder, words): `qalora release --push-to me/tiny --upload` in a fresh process."""

    def run(hub_url: str, dist: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        arguments = ["push", str(dist), "me/tiny", "--upload", *words]
        code = f"""
import sys
from qalora.cli import main
sys.argv[1:] = {arguments!r}
main()
"""
        return fresh(hub_url, code, **more)

    return run


def test_what_arrives_is_the_folder(hub: Any, dist: Path, tmp_path: Path, upload: Run, fresh: Run) -> None:
    done = upload(hub.url, dist, "--private")
    assert done.returncode == 0, done.stdout + done.stderr
    there = dict(hub.repos["me/tiny"])
    assert there.pop(".gitattributes")
    assert there == {path.relative_to(dist).as_posix(): path.read_bytes() for path in dist.rglob("*") if path.is_file()}
    assert hub.created[0]["visibility"] == "private"
    assert f"uploaded: {hub.url}/me/tiny/commit/" in done.stdout
    # and back again, as a stranger gets it
    code = "import huggingface_hub as h, sys; print(h.snapshot_download('me/tiny', local_dir=sys.argv[1]))"
    back = fresh(hub.url, code.replace("sys.argv[1]", repr(str(tmp_path / "back"))))
    assert back.returncode == 0, back.stderr
    check_sums(tmp_path / "back")
    (tmp_path / "back" / "gptq" / "config.json").unlink()
    with pytest.raises(FormatError, match="config"):
        check_sums(tmp_path / "back")


def test_a_second_upload(hub: Any, dist: Path, upload: Run) -> None:
    """Files of an earlier release are refused by name, and deleted on request."""
    assert upload(hub.url, dist, "--revision", "v2").returncode == 0
    assert hub.branches == ["v2"]
    again = upload(hub.url, dist)
    assert again.returncode == 0, again.stderr
    (dist / "gguf" / "tiny-QALoRA-Q4_1.gguf").rename(dist / "gguf" / "other-Q4_1.gguf")
    write_sums(dist)
    before = dict(hub.repos["me/tiny"])
    refused = upload(hub.url, dist)
    assert refused.returncode == 2
    assert "gguf/tiny-QALoRA-Q4_1.gguf for one" in refused.stderr
    assert hub.repos["me/tiny"] == before
    replaced = upload(hub.url, dist, "--replace")
    assert replaced.returncode == 0, replaced.stderr
    assert set(hub.repos["me/tiny"]) - {".gitattributes"} == {
        path.relative_to(dist).as_posix() for path in dist.rglob("*") if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        (lambda hub: hub.ignored.add("gptq/config.json"), "gptq/config.json was not taken; does a .gitignore"),
        (lambda hub: hub.spoiled.add("gptq/model.safetensors"), "gptq/model.safetensors is not what was sent"),
        (lambda hub: hub.spoiled.add("README.md"), "README.md is not what was sent"),
        (lambda hub: setattr(hub, "status", 401), "the Hub does not know the token"),
        (lambda hub: setattr(hub, "status", 403), "the token may not write to me/tiny"),
        (lambda hub: setattr(hub, "status", 404), "me/tiny is not there"),
        (lambda hub: setattr(hub, "status", 418), "the Hub answers 418"),
    ],
)
def test_what_the_hub_refuses(hub: Any, dist: Path, upload: Run, plant: Callable[[Any], object], sentence: str) -> None:
    plant(hub)
    done = upload(hub.url, dist)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_TOKEN": ""}, "there is none; run hf auth login"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_no_way_to_the_hub(dist: Path, upload: Run, environment: dict[str, str], sentence: str) -> None:
    done = upload("http://127.0.0.1:9", dist, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line


def test_nothing_is_sent_without_the_flag(dist: Path) -> None:
    """HF_HUB_OFFLINE is set in these tests, and nothing complains."""
    result = CliRunner().invoke(command, [str(dist), "me/tiny"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "nothing was sent; --upload sends it" in result.output
    for name, content in FILES.items():
        assert f"{len(content):,}  {name}" in result.output
    total = sum(path.stat().st_size for path in dist.rglob("*") if path.is_file())
    assert f"{total:,}  bytes in {len(FILES) + 1} files" in result.output
    assert 'from_pretrained("me/tiny", subfolder="gptq")' in result.output


def test_what_opens_each_folder(dist: Path) -> None:
    lines = openings(plan_push(dist, "me/tiny"))
    assert {top for top, _ in lines} == {"gptq", "gguf", "mlx", "onnx"}
    assert ("gguf", "llama-cli -hf me/tiny:Q4_1") in lines
    assert ("gptq", 'AutoModelForCausalLM.from_pretrained("me/tiny", subfolder="gptq")') in lines
    (dist / "gptq" / "adapter_config.json").write_bytes(b"{}")  # transformers knows no sub-folder of adapters
    write_sums(dist)
    (line,) = [line for top, line in openings(plan_push(dist, "me/tiny")) if top == "gptq"]
    assert line.endswith('then AutoModelForCausalLM.from_pretrained("tiny/gptq")')
    split = dist / "gguf" / "tiny-QALoRA-Q4_1.gguf"
    for number in (1, 2):
        (dist / "gguf" / f"tiny-QALoRA-Q4_1-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    split.unlink()
    write_sums(dist)
    (line,) = [line for top, line in openings(plan_push(dist, "me/tiny")) if "-hf" in line]
    assert line == "llama-cli -hf me/tiny:Q4_1"


@pytest.mark.parametrize("repo", ["", "me/", "/x", "a/b/c", "me/ti ny", "me/..", "me/x--y", "me/x.git", "-", "tiny"])
def test_names_that_the_hub_does_not_take(dist: Path, repo: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_push(dist, repo)
    assert "\n" not in str(caught.value)


def test_what_is_not_uploaded(dist: Path, tmp_path: Path) -> None:
    (dist / "report.json").write_text(json.dumps({"passed": False}), encoding="utf-8")
    with pytest.raises(FormatError, match="changed since SHA256SUMS"):
        plan_push(dist, "me/tiny")
    write_sums(dist)
    with pytest.raises(ProofError, match="`allow_unproven`"):
        plan_push(dist, "me/tiny")
    assert plan_push(dist, "me/tiny", allow_unproven=True).nbytes > 0
    (dist / "report.json").write_text("[" * 100_000, encoding="utf-8")
    write_sums(dist)
    with pytest.raises(InputError, match=r"report\.json: expected JSON, got lists or objects nested too deeply"):
        plan_push(dist, "me/tiny")
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            plan_push(folder, "me/tiny")


def test_a_file_that_is_too_large(dist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit that the tests can afford: each format's sentence names the option that splits it."""
    assert LARGEST_FILE == 50_000_000_000
    for limit, option in ((5000, "--max-shard-size"), (3000, "--split-max-size")):
        monkeypatch.setattr("qalora.releasing.push.LARGEST_FILE", limit)
        with pytest.raises(InputError, match=option):
            plan_push(dist, "me/tiny")
        (dist / "gptq" / "model.safetensors").write_bytes(b"small")
        write_sums(dist)
