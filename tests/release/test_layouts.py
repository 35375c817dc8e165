"""Chat models laid out as families publish them, through one release to every format each.

Every gate passes but for what a runtime does by a rule of its own, which is named here. Then each runtime is asked by
itself: the tokens that it makes of a chat are transformers' of the source, and a model that wants to end its turn ends
it there as in transformers' `generate`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora.chat_layouts import PIECES
from qalora.converters import load
from qalora.parity import ParityReport
from qalora.parity.runtimes import open_runtime
from qalora.quantization import quantize
from qalora.releasing.options import ReleaseOptions
from qalora.releasing.package import plan_release, release
from qalora.testing import CHAT_LAYOUTS, chat_layout, chat_model, random_adapter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FORMATS = ("gptq", "onnx", "openvino", "gguf", "mlx", "hqq", "qalora")
CHAT = [
    {"role": "user", "content": "Hello there, who are you?"},
    {"role": "assistant", "content": "I am a model.\nAsk me  something, in 2 lines."},
    {"role": "user", "content": "What is 2+2, and why isn't it 5?"},
]

NAMES = {("gguf in llama.cpp", "end")}
"""llama.cpp ends at tokens by their names, whatever a file says."""

SPACES = {("gguf", "tokenizer"), ("gguf in llama.cpp", "tokenizer")}
"""llama.cpp has no place for white space that is dropped beside tokens, nor for a space before the first part alone."""

GENAI = {("onnx in onnxruntime-genai", "tokenizer")}
"""Nor has onnxruntime-genai one for the latter, or for white space that is dropped before tokens."""

LIMITS: dict[str, set[tuple[str, str]]] = {
    "llama3": NAMES,
    "llama3-base": NAMES,
    "phi3": NAMES,
    "phi4": NAMES | SPACES | GENAI,
    "phi4-mini": SPACES,
    "qwen2.5": NAMES,
    "qwen2.5-base": NAMES,
    "qwen3": NAMES,
    "mistral": SPACES | GENAI,
    "smollm2": NAMES,
    "smollm3": NAMES,
    "olmo2": NAMES,
    "granite3": NAMES,
    "granite4": NAMES,
    "exaone4": NAMES,
}
"""What is ambiguous of each layout's gates on tokenizers and ends; nothing else is."""

LESSER = ("llama3", "llama3-base", "qwen2.5-base", "qwen3", "mistral-v0.1", "olmo3", "granite4")
"""Layouts of whose kind another is tried in every run."""

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_of_families_has_what_is_ambiguous() -> None:
    said = ((NAMES, "llama.cpp ends at more, by names"), (SPACES, "llama.cpp: spaces"), (GENAI, "genai: plain text"))
    wanted = []
    for name in CHAT_LAYOUTS:
        layout, limit = chat_layout(name), LIMITS.get(name, set())
        words = "; ".join(text for kind, text in said if kind <= limit) or "nothing"
        rule = "SentencePiece" if layout.cut in PIECES else layout.cut
        wanted.append(f"| {name} | {layout.family} | {rule} | {words} |".replace("_", "\\_"))
    page = PAGE.read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(page) if line.startswith("| laid out as"))
    assert page[start + 2 : start + 2 + len(wanted)] == wanted
    assert not page[start + 2 + len(wanted)]


@dataclass(frozen=True, kw_only=True)
class Released:
    """A layout's release, its float folder, the token that the model always wants to say, and the report."""

    dist: Path
    source: Path
    says: int
    report: ParityReport

    def place(self, form: str) -> Path:
        """The artefact of a format."""
        return next((self.dist / "gguf").glob("*.gguf")) if form == "gguf" else self.dist / form


def released(name: str, root: Path) -> Released:
    """The model says the end token that config.json and the tokenizer are the likeliest to forget: the last one."""
    layout = chat_layout(name)
    ends = layout.generation["eos_token_id"]
    says = ends[-1] if isinstance(ends, list) else ends
    source = chat_model(root / "model", layout, says=layout.tokenizer.convert_ids_to_tokens(says))
    base = quantize(load(source), bits=4, group_size=32)
    adapter = random_adapter(base, seed=1, a_size=0.05, scaling=2.0)
    options = ReleaseOptions(targets=FORMATS, max_tokens=64, generate=4)
    planned = plan_release(base, options, root / "dist", adapter=adapter)
    done = release(planned, root / "dist")
    return Released(dist=done.folder, source=source, says=says, report=done.report)


def limits(report: ParityReport) -> set[tuple[str, str]]:
    """(artefact's format and runtime, gate) of what is ambiguous of tokenizers and ends."""
    found = set()
    for where, result in report.results():
        if result.status != "pass":
            assert (result.status, result.gate) in {("ambiguous", "tokenizer"), ("ambiguous", "end")}, (where, result)
            name, _, runtime = where.partition(" in ")
            found.add((" in ".join([name.split("/")[0], *([runtime] if runtime else [])]), result.gate))
    return found


def spoken(place: Path, form: str, text: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """(runtime, the tokens that it makes of a chat, what it says then), of each runtime of a format."""
    if form in ("onnx", "openvino"):
        name = {"onnx": "onnxruntime-genai", "openvino": "openvino-genai"}[form]
        runtime = open_runtime(name, place)
        ids = runtime.words.tokenize(text, special=True)
        yield name, ids, runtime.generate(ids, 6)
        runtime.close()
    elif form == "gguf":
        runtime = open_runtime("llama.cpp", place)
        ids = runtime.words.tokenize(text, special=True)
        ends, made = runtime.ends(), runtime.generate(ids, 6)
        runtime.close()
        stop = next((n for n, token in enumerate(made) if token in ends.ids), len(made) - 1)
        yield "llama.cpp", ids, made[: stop + 1]
    elif form == "mlx":
        import mlx.core
        from mlx_lm import load as load_mlx
        from mlx_lm.generate import stream_generate

        with mlx.core.stream(mlx.core.cpu):
            model, tokenizer = load_mlx(str(place))
            ids = tokenizer.encode(text, add_special_tokens=False)
            yield "mlx-lm", ids, [step.token for step in stream_generate(model, tokenizer, ids, max_tokens=6)]
    elif form == "hqq":
        yield (
            "transformers' tokenizer",
            AutoTokenizer.from_pretrained(place)(text, add_special_tokens=False)["input_ids"],
            [],
        )
    else:
        ids = AutoTokenizer.from_pretrained(place)(text, add_special_tokens=False)["input_ids"]
        yield "transformers", ids, generated(place, ids)


def generated(folder: Path, ids: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.compiler.set_stance("force_eager"):
        made = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LESSER else ()) for name in CHAT_LAYOUTS]
)
def test_a_published_layout_is_proven_in_every_format(name: str, tmp_path: Path) -> None:
    made = released(name, tmp_path)
    assert limits(made.report) == LIMITS.get(name, set())
    assert {run["kind"] for artifact in made.report.to_json()["artifacts"] for run in artifact["runs"]} >= {
        *("gptqmodel", "onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai"),
        *("llama.cpp", "mlx", "hqq", "torch"),
    }
    tokenizer = AutoTokenizer.from_pretrained(made.source)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert generated(made.source, ids) == [made.says]
    for form in FORMATS:
        for runtime, tokens, says in spoken(made.place(form), form, text):
            assert tokens == ids, f"{form}: {runtime}"
            assert says in ([made.says], []), f"{form}: {runtime}"
            assert says or form == "hqq"
