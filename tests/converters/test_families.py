"""Every family's float model in our torch module, both graphs, llama.cpp and mlx-lm, held against transformers' own
forward in float64. Its integers are the matter of test_families_proof.

FORMS are what is tested: families, and what their configs can vary. A new family is a line there, and
`qalora/converters/README.md` says what else.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from in_openvino import InOpenvino
from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.decoder import decoder_of
from qalora.converters.essentials import essentials
from qalora.converters.families import FAMILIES
from qalora.converters.onnx import read as read_onnx
from qalora.converters.torch_module import build
from qalora.errors import InputError
from qalora.parity.runtimes import open_runtime
from qalora.testing import assert_same_model, byte_tokenizer, tiny_model

GRAPHS = ("", "portable")

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


def longrope(original: int, share: float = 1.0) -> dict[str, Any]:
    """Heads of 32, of which a share is rotated, each pair with factors of its own."""
    pairs = int(16 * share)
    short, long = ([round(1 + step * n, 4) for n in range(pairs)] for step in (0.05, 0.7))
    return {
        "sliding_window": None,
        "original_max_position_embeddings": original,
        **rope("longrope", short_factor=short, long_factor=long, partial_rotary_factor=share),
    }


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with linear scaling, head size 32": ("llama", {"head_dim": 32, **rope("linear", factor=4.0)}),
    "llama with llama3 scaling": ("llama", rope("llama3", factor=8.0, **LLAMA3)),
    "llama with yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama with yarn and a factor of its own": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.9, beta_fast=16, beta_slow=2),
    ),
    "qwen2 with yarn": ("qwen2", rope("yarn", factor=2.0, original_max_position_embeddings=16)),
    "qwen2": ("qwen2", {}),
    "qwen2 untied, a window in its last layers": (
        "qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases, one head of keys": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma2 with a scale of its own": ("gemma2", {"query_pre_attn_scalar": 24, "num_hidden_layers": 3}),
    "gemma2 with an output layer": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text with an output layer": ("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3_text with linear scaling and caps": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "final_logit_softcapping": 8.0,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3 with longrope, beyond the original context": ("phi3", longrope(16)),
    "phi3 with longrope, within it": ("phi3", longrope(256)),
    "phi3 with longrope and three quarters of a head": ("phi3", longrope(16, 0.75)),
    "smollm3": ("smollm3", {}),
    "smollm3 with a window where it does not rotate": ("smollm3", {"use_sliding_window": True, "sliding_window": 12}),
    "smollm3 with yarn": ("smollm3", rope("yarn", factor=2.0, original_max_position_embeddings=16)),
    "smollm3 that never rotates": ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
    "smollm3 with biases": ("smollm3", {"attention_bias": True}),
    "mistral without a window": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", {}),
    "olmo2 whose output layer is the embedding": ("olmo2", {"tie_word_embeddings": True}),
    "olmo3": ("olmo3", {}),
    "olmo3 with yarn where it has no window": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }
        },
    ),
    "granite": ("granite", {}),
    "granite with biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "seed_oss": ("seed_oss", {}),
    "seed_oss with a bias at the output of attention": ("seed_oss", {"attention_out_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_dense with alpha": ("hunyuan_v1_dense", rope("dynamic", alpha=1000.0, factor=1.0)),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5 with biases": ("ernie4_5", {"use_bias": True}),
    "glm4": ("glm4", {}),
    "glm4 whose output layer is the embedding": ("glm4", {"tie_word_embeddings": True}),
    "ministral3": ("ministral3", {}),
    "exaone4": ("exaone4", {}),
    "exaone4 with llama3 scaling": ("exaone4", rope("llama3", factor=8.0, **LLAMA3)),
}

MAIN = [form for form, (family, config) in FORMS.items() if form == family]
"""One form of each family, for what takes seconds."""

NOT_IN_GGUF = {
    "qwen3 with biases, one head of keys": "llama.cpp reads no such bias of a qwen3",
    "gemma2 with an output layer": "llama.cpp ties the output layer of a gemma2",
    "smollm3 that never rotates": "no_rope_layers: expected layers without rotary positions at every 4th",
    "smollm3 with biases": "llama.cpp reads no such bias of a smollm3",
    "gemma2 with a scale of its own": "query_pre_attn_scalar: expected 32, which gemma2 has, got 24",
    "olmo2 whose output layer is the embedding": "llama.cpp wants an output layer in a olmo2",
    "seed_oss with a bias at the output of attention": "llama.cpp reads no such bias of a seed_oss",
    "ernie4_5 with biases": "llama.cpp reads no such bias of a ernie4_5",
}
"""Forms that llama.cpp does not do, and what their refusal says."""

NOT_IN_MLX = {
    "qwen3 with biases, one head of keys": "mlx: attention_bias: expected a qwen3 without",
    "gemma2 with an output layer": "mlx: lm_head: expected a gemma2 whose output layer is the embedding",
    "gemma3_text with linear scaling and caps": "mlx: final_logit_softcapping: expected a gemma3_text without",
    "glm4 whose output layer is the embedding": "mlx: lm_head: expected a glm4 with an output layer of its own",
}
"""Forms that mlx-lm does not do, and what their refusal says."""

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Tiny:
    """A tiny float model: its folder, it, and what transformers' own loader computes of TOKENS in float64."""

    folder: Path
    model: Checkpoint
    logits: torch.Tensor
    noise: float


def transformers_logits(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Float64 logits of transformers' own model, and the largest error of its float32 ones."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        single = module(input_ids=tokens).logits
        double = module.double()(input_ids=tokens).logits
    return double, float((single.double() - double).abs().max())


class GeluTable(torch.nn.Module):
    """ggml's gelu on a CPU: a table of float16 from -10 to 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y))


def gelu_by_table(folder: Path) -> torch.Tensor:
    """Logits of TOKENS by transformers' model with ggml's table."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for layer in module.model.layers:
        layer.mlp.act_fn = GeluTable()
    with torch.no_grad():
        return module(input_ids=TOKENS).logits.double()


def llama_cpp_of(tiny: Tiny) -> tuple[torch.Tensor, float]:
    """What llama.cpp should compute of TOKENS with F32 weights, and within what.

    ggml sums in blocks and looks exp up: 16 times torch's noise was never reached. Its gelu is a table of float16, and
    inputs that differ by float32's noise can fall to two entries: what the table itself changes is the bound then.
    """
    if decoder_of(tiny.model.config, "tiny").family.activation == "silu":
        return tiny.logits, 16 * tiny.noise
    wanted = gelu_by_table(tiny.folder)
    return wanted, float((wanted - tiny.logits).abs().max())


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory):
    """Gives the tiny model of a form, made once."""
    made: dict[str, Tiny] = {}

    def get(form: str) -> Tiny:
        if form not in made:
            family, config = FORMS[form]
            folder = tiny_model(
                tmp_path_factory.mktemp("form") / "model", family, tokenizer=byte_tokenizer(), config=config
            )
            made[form] = Tiny(folder, load(folder), *transformers_logits(folder, TOKENS))
        return made[form]

    return get


@pytest.fixture(scope="module")
def exported(tiny_of: Any, tmp_path_factory: pytest.TempPathFactory):
    """Gives the file or folder of a form in a target, written once: it is for reading only."""
    made: dict[tuple[str, str], Path] = {}

    def get(form: str, target: str) -> Path:
        if (form, target) not in made:
            made[form, target] = written(tiny_of(form).model, target, tmp_path_factory.mktemp("exported"))
        return made[form, target]

    return get


def assert_close(got: Any, wanted: torch.Tensor, noise: float) -> None:
    """Within 8 times torch's own float32 error: a runtime sums as many terms, in another order."""
    error = float((torch.as_tensor(np.asarray(got)).double() - wanted).abs().max())
    assert error <= 8 * noise, f"{error:.2g} with torch at {noise:.2g}"


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def feed(path: Path, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """Inputs with an empty cache, in the shapes that the graph asks for."""
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    inputs = {node.name: [size.dim_value for size in node.type.tensor_type.shape.dim] for node in graph.input}
    past = {
        name: np.zeros((tokens.shape[0], shape[1], 0, shape[3]), dtype=np.float32)
        for name, shape in inputs.items()
        if name.startswith("past")
    }
    mask = torch.ones_like(tokens) if mask is None else mask
    return {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), **past}


def steps(opened: onnxruntime.InferenceSession, path: Path, tokens: torch.Tensor) -> np.ndarray:
    """Five tokens at once, then one by one with the cache."""
    empty = feed(path, tokens)
    names = [output.name for output in opened.get_outputs()]
    past = {name: value for name, value in empty.items() if name.startswith("past")}
    made, at = [], 0
    for stop in (5, *range(6, tokens.shape[1] + 1)):
        mask = np.ones((tokens.shape[0], stop), dtype=np.int64)
        step = {"input_ids": tokens[:, at:stop].numpy(), "attention_mask": mask, **past}
        found = dict(zip(names, opened.run(names, step), strict=True))
        made.append(found.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        at = stop
    return np.concatenate(made, axis=1)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Row 0 is whole, row 1 has its first 25 tokens and 15 of padding; gives where those are."""
    rows = slice(0, 25) if side == "right" else slice(15, 40)
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    tokens[1], mask[1] = 0, 0
    tokens[1, rows], mask[1, rows] = TOKENS[1, :25], 1
    return tokens, mask, rows


def written(model: Checkpoint, target: str, folder: Path, **options: Any) -> Path:
    """The file or folder of an export."""
    export(model, target, folder, **options)
    return next((folder / target).glob("*.gguf")) if target == "gguf" else folder / target


def transformers_steps(tiny: Tiny, form: str) -> torch.Tensor:
    """What `steps` should give. A longrope that crosses its original context keeps the keys that it has."""
    from transformers import AutoModelForCausalLM

    if "longrope" not in form:
        return tiny.logits
    module = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float64, attn_implementation="eager").eval()
    past, made, at = None, [], 0
    with torch.no_grad():
        for stop in (5, *range(6, TOKENS.shape[1] + 1)):
            found = module(input_ids=TOKENS[:, at:stop], past_key_values=past, use_cache=True)
            past, at = found.past_key_values, stop
            made.append(found.logits)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_our_torch_module_is_transformers(form: str, tiny_of: Any) -> None:
    tiny = tiny_of(form)
    with torch.no_grad():
        assert_close(build(tiny.model)(input_ids=TOKENS).logits, tiny.logits, tiny.noise)


@pytest.mark.parametrize("form", FORMS)
def test_both_graphs_compute_the_same(form: str, tiny_of: Any, exported: Any) -> None:
    """At once, step by step with the cache beyond the window, and in padded batches."""
    tiny, folder = tiny_of(form), exported(form, "onnx")
    stepped = transformers_steps(tiny, form)
    for graph, sides in (("", ["right"]), ("portable", ["right", "left"])):
        place = folder / graph
        assert_same_model(read_onnx(place), tiny.model)
        opened = session(place)
        assert_close(opened.run(["logits"], feed(place, TOKENS))[0], tiny.logits, tiny.noise)
        for side in sides:
            tokens, mask, rows = padded(side)
            found = opened.run(["logits"], feed(place, tokens, mask))[0]
            assert_close(found[0], tiny.logits[0], tiny.noise)
            assert_close(found[1, rows], tiny.logits[1, :25], tiny.noise)
        assert_close(steps(opened, place, TOKENS), stepped, tiny.noise)


@pytest.mark.parametrize("form", FORMS)
def test_an_openvino_graph_computes_the_same(form: str, tiny_of: Any, exported: Any) -> None:
    """At once, in batches padded on either side, and step by step with the cache beyond the window."""
    tiny, folder = tiny_of(form), exported(form, "openvino")
    assert_same_model(load(folder), tiny.model)
    opened, whole = InOpenvino(folder), torch.ones_like(TOKENS)
    assert_close(opened.logits(TOKENS, whole), tiny.logits, tiny.noise)
    for side in ("right", "left"):
        tokens, mask, rows = padded(side)
        found = opened.logits(tokens, mask)
        assert_close(found[0], tiny.logits[0], tiny.noise)
        assert_close(found[1, rows], tiny.logits[1, :25], tiny.noise)
    stops = [5, *range(6, TOKENS.shape[1] + 1)]
    pairs = zip([0, *stops], stops, strict=False)
    stepped = [opened.logits(TOKENS[:, at:stop], whole[:, :stop], longer=at > 0) for at, stop in pairs]
    assert_close(np.concatenate(stepped, axis=1), transformers_steps(tiny, form), tiny.noise)


@pytest.mark.parametrize("form", MAIN)
def test_the_portable_graph_is_standard(form: str, tiny_of: Any, exported: Any) -> None:
    """Checked in full, and run by onnx.reference, which knows no operator of a vendor's."""
    from onnx.reference import ReferenceEvaluator

    tiny = tiny_of(form)
    path = exported(form, "onnx") / "portable"
    onnx.checker.check_model(path / "model.onnx", full_check=True)
    tokens = TOKENS[:1, :20]
    found = ReferenceEvaluator(onnx.load(path / "model.onnx")).run(["logits"], feed(path, tokens))[0]
    assert_close(found, tiny.logits[:1, :20], tiny.noise)


@pytest.mark.parametrize("form", NOT_IN_GGUF)
def test_what_llama_cpp_does_not_do_is_refused(form: str, tiny_of: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=NOT_IN_GGUF[form]):
        written(tiny_of(form).model, "gguf", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [form for form in FORMS if form not in NOT_IN_GGUF])
def test_a_float_file_in_llama_cpp(form: str, tiny_of: Any, exported: Any, tmp_path: Path) -> None:
    """F32 tensors: what is left is float32's own noise; up to where the file's context goes."""
    tiny, path = tiny_of(form), exported(form, "gguf")
    again = load(path)
    assert_same_model(again, tiny.model)
    assert again.config["model_type"] == tiny.model.config["model_type"]
    assert essentials(again.config) == essentials(tiny.model.config)
    with torch.no_grad():
        assert_close(build(again)(input_ids=TOKENS).logits, tiny.logits, tiny.noise)
    assert written(again, "gguf", tmp_path / "again").read_bytes() == path.read_bytes()
    architecture = FAMILIES[FORMS[form][0]].gguf.architecture
    length = min(TOKENS.shape[1], again.gguf.get(f"{architecture}.context_length"))  # type: ignore[union-attr]
    runtime = open_runtime("llama.cpp", path, threads=1)
    found = runtime.logits(TOKENS[0, :length].tolist())
    stepped = runtime.steps(TOKENS[0, :length].tolist())
    runtime.close()
    wanted, bound = llama_cpp_of(tiny)
    for got in (found, stepped):
        error = float((got.double() - wanted[0, :length]).abs().max())
        assert error <= bound, f"{error:.2g} with a bound of {bound:.2g}"


YARN = rope("yarn", factor=2.0, original_max_position_embeddings=16)
LINEAR = rope("linear", factor=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_scales_positions_as_its_loaders_say(family: str, kind: str, tmp_path: Path) -> None:
    """Every kind that a family's record names for llama.cpp; each other one is refused."""
    numbers = {"linear": LINEAR, "yarn": YARN, "llama3": rope("llama3", factor=8.0, **LLAMA3)}[kind]
    numbers = copy.deepcopy(numbers)  # classes of transformers write into it
    if FAMILIES[family].local_rope:
        local = {"rope_type": "default", "rope_theta": 10000.0}
        numbers = {"rope_parameters": {"full_attention": numbers["rope_parameters"], "sliding_attention": local}}
    config = {**numbers, **({"sliding_window": None} if family == "mistral" else {})}
    if FAMILIES[family].ropes:
        return  # its config class takes those only
    folder = tiny_model(tmp_path / "model", family, tokenizer=byte_tokenizer(), config=config)
    model = load(folder)
    if kind not in FAMILIES[family].gguf.ropes:
        with pytest.raises(InputError, match=f"rope_type: expected .*, got '{kind}'"):
            written(model, "gguf", tmp_path / "out")
        return
    wanted, bound = llama_cpp_of(Tiny(folder, model, *transformers_logits(folder, TOKENS)))
    runtime = open_runtime("llama.cpp", written(model, "gguf", tmp_path / "out"), threads=1)
    error = float((runtime.logits(TOKENS[0].tolist()).double() - wanted[0]).abs().max())
    runtime.close()
    assert error <= bound, f"{error:.2g} with a bound of {bound:.2g}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [form for form in FORMS if form not in NOT_IN_MLX])
def test_a_float_folder_in_mlx_lm(form: str, tiny_of: Any, tmp_path: Path) -> None:
    """As far as the plan says that mlx-lm computes the same: within the window, or the original context."""
    tiny = tiny_of(form)
    (plan,) = export(tiny.model, "mlx", tmp_path)
    tokens = TOKENS[:1, : plan.longest or 40]
    whole = tokens.shape[1] == TOKENS.shape[1]
    wanted, noise = (tiny.logits, tiny.noise) if whole else transformers_logits(tiny.folder, tokens)
    runtime = open_runtime("mlx", tmp_path / "mlx")
    assert_close(runtime.logits(tokens[0].tolist()), wanted[0], max(noise, tiny.noise))
    assert_close(runtime.steps(tokens[0].tolist()), wanted[0], max(noise, tiny.noise))


@pytest.mark.parametrize("form", NOT_IN_MLX)
def test_what_mlx_lm_does_not_do_is_refused(form: str, tiny_of: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=NOT_IN_MLX[form]):
        export(tiny_of(form).model, "mlx", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_27b_gemmas_have_a_scale_of_their_own(family: str, layers: int, tmp_path: Path) -> None:
    """llama.cpp tells them by their layers. The other scale changes the logits by more than 200 times this bound.

    Norms after a layer of 1 - 0.9 keep the error of ggml's table from growing over that many.
    """
    from safetensors.torch import load_file, save_file

    config = {"num_hidden_layers": layers, "query_pre_attn_scalar": 16, "intermediate_size": 64}
    folder = tiny_model(tmp_path / "model", family, tokenizer=byte_tokenizer(), config=config)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layernorm" in name and ".post_" in name:
            tensors[name].fill_(-0.9)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = written(load(folder), "gguf", tmp_path)
    assert essentials(load(path).config) == essentials(load(folder).config)
    wanted, _ = transformers_logits(folder, TOKENS)
    rounded = gelu_by_table(folder)
    runtime = open_runtime("llama.cpp", path, threads=1)
    error = float((runtime.logits(TOKENS[0].tolist()).double() - rounded[0]).abs().max())
    runtime.close()
    assert error <= float((rounded - wanted).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("form", MAIN)
@pytest.mark.parametrize("graph", GRAPHS)
def test_genai_generates_the_same(form: str, graph: str, tiny_of: Any, exported: Any) -> None:
    tiny, folder = tiny_of(form), exported(form, "onnx")
    prompt = TOKENS[0, 30:].tolist()  # after this one no family says its end token, at which genai stops
    runtime, oracle = open_runtime("onnxruntime-genai", folder / graph), open_runtime("torch", tiny.model)
    wanted = oracle.generate(prompt, 20)
    top = oracle.logits([*prompt, *wanted])[9:-1].topk(2).values
    assert float((top[:, 0] - top[:, 1]).min()) > 100 * tiny.noise, "a near tie would make this test a coin toss"
    assert runtime.generate(prompt, 20) == wanted


@pytest.mark.parametrize(("form", "noted"), [("mistral", True), ("mistral without a window", False)])
def test_a_window_that_llama_cpp_has_not_bounds_the_context(
    form: str, noted: bool, tiny_of: Any, tmp_path: Path
) -> None:
    (plan,) = export(tiny_of(form).model, "gguf", tmp_path)
    assert any("context_length is the window, 12" in note for note in plan.notes) == noted
    reader = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf")))
    assert reader.fields["llama.context_length"].contents() == (12 if noted else 512)
    again = load(next((tmp_path / "gguf").glob("*.gguf")))
    assert again.config["max_position_embeddings"] == 512
