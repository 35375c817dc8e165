"""A page that chats with an exported model: in a headless Chromium, with nothing but what its server gives."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from embeddings import with_coded_embedding
from in_chromium import Chromium, served, skip_without_chromium
from in_node import skip_without_node
from qalora.browser import write_page
from qalora.browser.page import WEB
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.converters.tokenizer import load_tokenizer
from qalora.errors import MissingLibraryError, OutputError
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.testing import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[m] {% endif %}"
)
GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
CONTEXT = 400
"""Tokens that the model reads: fewer than two answers."""

PLAIN = "?repetition_penalty=1"
STATUS = "document.getElementById('status')"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks, in its folder for transformers.js, and a page for it; codes of 8 bits as embedding."""
    skip_without_chromium()
    skip_without_node()
    root = tmp_path_factory.mktemp("site")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    floats = load(tiny_llama(root / "float", tokenizer=tokenizer, config={"max_position_embeddings": CONTEXT}))
    export(with_coded_embedding(quantize(floats, group_size=32)), ["transformersjs"], root / "dist", ExportOptions())
    write_page(root / "chat", root / "dist" / "transformersjs", "A <tiny> model")
    return root


@pytest.fixture
def browser(site: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Chromium, str]]:
    options = GPU if getattr(request, "param", "") == "webgpu" else ()
    with served(site / "chat") as address, Chromium(tmp_path / "profile", *options) as page:
        yield page, address


def ask(page: Chromium, words: str) -> None:
    page.value(f"document.getElementById('text').value = {words!r}; document.getElementById('form').requestSubmit()")


def settled(page: Chromium) -> str:
    """What the page says when it has ended what it did."""
    said = page.wait(f"['ready', 'error'].includes({STATUS}.dataset.state) && {STATUS}.textContent")
    assert page.value(f"{STATUS}.dataset.state") == "ready", said
    return str(said)


@pytest.mark.slow
def test_it_answers_as_the_library_does_in_node(site: Path, browser: tuple[Chromium, str], tmp_path: Path) -> None:
    """Twice, the second time with the first answer before it; all that is asked for is the server's."""
    page, address = browser
    page.open(f"{address}{PLAIN}")
    assert settled(page) == "Runs in this browser, on the processor. No text leaves this computer."
    assert page.value("document.getElementById('name').textContent") == "A <tiny> model"
    assert page.value("crossOriginIsolated") is True
    folder, messages = site / "dist" / "transformersjs", list[dict[str, str]]()
    tokenizer, runtime = load_tokenizer(load(folder)), open_runtime("transformers.js", folder, threads=1)
    for words in ("Who <b>are</b> you?", "Again!"):
        ask(page, words)
        assert " tokens in " in settled(page)
        answer = page.value("[...document.querySelectorAll('[data-role=model]')].at(-1).textContent")
        messages.append({"role": "user", "content": words})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        made = runtime.generate(ids, min(256, CONTEXT - len(ids)))
        assert answer == tokenizer.decode(made, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    runtime.close()
    page.screenshot(tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 5000  # an empty page has 3,000
    assert page.errors == []
    assert {urlsplit(one).netloc for one in page.requests} == {urlsplit(address).netloc}
    assert any(one.endswith("model_q4.onnx_data") for one in page.requests)


@pytest.mark.slow
def test_an_answer_is_stopped(browser: tuple[Chromium, str]) -> None:
    page, address = browser
    page.open(address)
    settled(page)
    ask(page, "Go on for ever.")
    page.wait("document.querySelector('[data-role=model]').textContent.length > 5")
    page.value("document.getElementById('form').requestSubmit()")
    assert int(settled(page).split()[0]) < 256


@pytest.mark.slow
@pytest.mark.parametrize("browser", ["webgpu"], indirect=True)
def test_it_runs_on_webgpu(site: Path, browser: tuple[Chromium, str]) -> None:
    """By a processor that does as a GPU does (SwiftShader)."""
    page, address = browser
    page.open(f"{address}{PLAIN}&device=webgpu")
    if not page.value("navigator.gpu && navigator.gpu.requestAdapter().then(one => Boolean(one))"):
        pytest.skip("no adapter for WebGPU")
    assert settled(page).startswith("Runs in this browser, on the GPU.")
    ask(page, "Hello?")
    page.wait("document.querySelector('[data-role=model]').textContent.length > 5")
    page.value("document.getElementById('form').requestSubmit()")
    count = int(settled(page).split()[0])
    folder = site / "dist" / "transformersjs"
    tokenizer, runtime = load_tokenizer(load(folder)), open_runtime("transformers.js", folder, threads=1)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello?"}], add_generation_prompt=True)
    made = tokenizer.decode(runtime.generate(ids["input_ids"], count), skip_special_tokens=True)
    assert page.value("document.querySelector('[data-role=model]').textContent") == made
    runtime.close()


def test_without_the_library_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(MissingLibraryError, match="a page that chats needs @huggingface/transformers 4, which is not"):
        write_page(tmp_path / "chat", tmp_path, "m")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_by_force_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's files made up."""
    library, web = (tmp_path / "js" / name for name in ("@huggingface/transformers", "onnxruntime-web"))
    for package, names in ((library, ["transformers.min.js"]), (web, WEB)):
        (package / "dist").mkdir(parents=True)
        (package / "package.json").write_text("{}", encoding="utf-8")
        for name in names:
            (package / "dist" / name).write_text(name, encoding="utf-8")
    monkeypatch.setenv("NODE_PATH", str(tmp_path / "js"))
    write_page(tmp_path / "chat", tmp_path / "dist", "m")
    assert {path.name for path in (tmp_path / "chat" / "lib").iterdir()} == {"transformers.min.js", *WEB}
    with pytest.raises(OutputError, match="exists already"):
        write_page(tmp_path / "chat", tmp_path / "dist", "m")
    write_page(tmp_path / "chat", tmp_path / "dist", "n", force=True)
    assert '"n"' in (tmp_path / "chat" / "page.json").read_text("utf-8")
