"""How fast, and in how much memory, an adapter is trained; beside PEFT, on one load, in one run.

    python benchmarks/benchmark_training.py [--steps 8] [--rounds 2] [--threads 2] [--only NAME ...] [--json FILE]
                                            [--avx2]

SmolLM2-135M, 4 bits in groups of 32 with integer zeros, is written as GPTQ once: every contender trains on that folder,
or on its weights as floats, with the same blocks in the same order, the same AdamW and the same schedule. Each runs in
a process of its own, `--rounds` times in turn, so that what else the machine does meets all of them:

    qalora-float32, qalora-bfloat16     qalora.train; -checkpointing: with gradient checkpointing; -packed: with weights
                                        unpacked at each use, in float32 the exact forward
    peft-qalora                         PEFT's QA-LoRA over GPTQModel's torch kernel, which dequantizes at every call
    peft-qalora-kept                    the same with GPTQModel's switch that keeps the dequantized weights
    peft-lora-float32, -bfloat16        PEFT's LoRA on float weights

A row: the median over all steps but the first two of tokens a second (wall clock), and its ratio to peft-qalora; the
processor time of 1,000 tokens and its ratio, which other jobs on the machine disturb less, least with --threads 1
(a thread that waits for one that is not running spins in some kernels); peak resident memory of the process, and
what of it was there once the libraries were imported; the loss on the same held-out blocks before and after. At the
end, the matrix products of a step are run alone: what they take is the limit of a machine that does nothing else.
`--avx2` holds torch's libraries to AVX2, on an Intel processor: what one without AVX-512 and AMX does, at its clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = (
    "qalora-float32",
    "qalora-float32-packed",
    "qalora-bfloat16",
    "qalora-bfloat16-checkpointing",
    "qalora-bfloat16-checkpointing-packed",
    "peft-qalora",
    "peft-qalora-kept",
    "peft-lora-float32",
    "peft-lora-bfloat16",
)
BATCH, LENGTH, HELD, RATE, GROUP = 4, 128, 8, 1e-3, 32
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SKIPPED = 2
"""Steps at the start that are not timed."""


def memory(field: str) -> int:
    """Bytes of a field of this process's status, such as VmHWM, the peak of resident memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Clock:
    """Wall and processor seconds of each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.restart()

    def restart(self) -> None:
        """The first step begins."""
        self._last = (time.perf_counter(), time.process_time())

    def tick(self) -> None:
        """A step is over."""
        now = (time.perf_counter(), time.process_time())
        self.wall.append(now[0] - self._last[0])
        self.processor.append(now[1] - self._last[1])
        self._last = now


def prepare(work: Path, steps: int) -> None:
    """Write the GPTQ folder and the text, once."""
    import pydoc_data.topics

    from qalora.converters import load
    from qalora.converters.exports import export
    from qalora.converters.tokenizer import load_tokenizer
    from qalora.demo import smollm2_file
    from qalora.quantization.model import quantize

    if not (work / "gptq").exists():
        model = quantize(load(smollm2_file()), bits=4, group_size=GROUP, zeros="integer", requantize=True)
        export(model, ["gptq"], work)
    tokenizer = load_tokenizer(load(work / "gptq"))
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    blocks = steps * BATCH + HELD
    end = ids[blocks * LENGTH + LENGTH // 2][0]
    (work / "text.txt").write_text(text[:end], encoding="utf-8")


def with_qalora(work: Path, steps: int, rank: int, compute: Any, ways: list[str], device: str) -> dict[str, Any]:
    """Train with qalora's own loop, through its public function."""
    from qalora.converters import load
    from qalora.training import StepReport, TrainOptions, train

    chosen = TrainOptions(
        data=str(work / "text.txt"),
        out=work / "adapter",
        rank=rank,
        max_steps=steps,
        batch_size=BATCH,
        max_length=LENGTH,
        learning_rate=RATE,
        held_out=(HELD + 0.5) / (steps * BATCH + HELD),
        save_every=0,
        force=True,
        device=device,
        dtype=compute,
        weights="packed" if "packed" in ways else "kept",
        gradient_checkpointing="checkpointing" in ways,
    )
    import transformers.models.llama.modeling_llama  # noqa: F401  (part of the imports, not of the training)

    imported = memory("VmRSS")
    clock = Clock()

    def step(report: StepReport) -> None:
        clock.tick() if report.step else clock.restart()

    train(load(work / "gptq"), chosen, step)
    held = json.loads((work / "adapter" / "training.json").read_text("utf-8"))["held_out"]
    return {"clock": clock, "imported": imported, "before": held[0]["loss"], "after": held[-1]["loss"]}


def with_peft(work: Path, steps: int, rank: int, kind: str, device: str) -> dict[str, Any]:
    """Train with PEFT on the same blocks, in a plain loop like qalora's."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from training_peers import loss_of, run_steps, with_lora

    from qalora.converters import load
    from qalora.converters.tokenizer import load_tokenizer
    from qalora.training.data import make_blocks, read_documents

    if kind.startswith("qalora"):
        import gptqmodel  # noqa: F401
    imported = memory("VmRSS")
    tokenizer = load_tokenizer(load(work / "gptq"))
    blocks = make_blocks(read_documents(str(work / "text.txt"), tokenizer), tokenizer, LENGTH)
    kept, held = blocks.split((HELD + 0.5) / (steps * BATCH + HELD))
    torch.manual_seed(0)
    extra = {"use_qalora": True, "qalora_group_size": GROUP} if kind.startswith("qalora") else {}
    model = with_lora(_module(work / "gptq", kind, device), rank, **extra).to(device)

    @torch.no_grad()
    def evaluate() -> float:
        parts = [float(loss_of(model, *held.take(range(at, at + BATCH)))) for at in range(0, len(held), BATCH)]
        return sum(parts) / len(parts)

    before, clock = evaluate(), Clock()
    run_steps(model, kept, rate=RATE, steps=steps, batch=BATCH, tick=clock.tick)
    return {"clock": clock, "imported": imported, "before": before, "after": evaluate()}


def _module(folder: Path, kind: str, device: str) -> Any:
    """The base that PEFT trains on: GPTQModel's layers, or float ones of the same weights."""
    import torch
    from training_peers import in_bfloat16

    if not kind.startswith("qalora"):
        from qalora.converters import load
        from qalora.converters.torch_module import build

        module = build(load(folder))
        return module if kind == "lora-float32" else in_bfloat16(module)
    from transformers import AutoModelForCausalLM, GPTQConfig

    os.environ["GPTQ_TORCH_CACHE_WEIGHTS"] = "1" if kind == "qalora-kept" else "0"
    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=device, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")
    )
    for layer in module.modules():
        vars(layer).pop("dequantize_weight", None)  # the compiled form, which takes a minute
    return module


def limit(work: Path) -> dict[str, float]:
    """What the matrix products of a step take alone, by dtype: tokens a second, processor seconds, GFLOPS."""
    import torch

    from qalora.converters import load

    model = load(work / "gptq")
    shapes = [model.tensors[name].shape for name in model.linears]
    shapes += [model.tensors["model.embed_tokens.weight"].shape]  # the output layer is tied to it
    found, tokens = {}, BATCH * LENGTH
    held = os.environ.get("ONEDNN_MAX_CPU_ISA") == AVX2["ONEDNN_MAX_CPU_ISA"]  # it has no bfloat16
    for dtype in (torch.float32,) if held else (torch.float32, torch.bfloat16):
        wall = processor = operations = 0.0
        for shape in set(shapes):
            (out, columns), count, clock = shape, shapes.count(shape), Clock()
            x, w, g = (torch.ones(*size, dtype=dtype) for size in ((tokens, columns), shape, (tokens, out)))
            for _ in range(6):
                clock.tick()
                _ = x @ w.t(), g @ w
            clock.tick()
            wall += count * min(clock.wall[1:])
            processor += count * min(clock.processor[1:])
            operations += count * 4 * tokens * out * columns
        name = str(dtype).removeprefix("torch.")
        found[f"{name} tokens_per_second"] = tokens / wall
        found[f"{name} processor"] = 1000 * processor / tokens
        found[f"{name} GFLOPS"] = operations / wall / 1e9
    return found


def child(name: str, work: Path, steps: int, rank: int, device: str) -> None:
    """Run one contender and print what it took as JSON."""
    if name == "limit":
        print(json.dumps(limit(work)))
        return
    if name.startswith("qalora-"):
        _, compute, *ways = name.split("-")
        found = with_qalora(work, steps, rank, compute, ways, device)
    else:
        found = with_peft(work, steps, rank, name.removeprefix("peft-"), device)
    clock = found.pop("clock")
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.max_memory_allocated()
    print(json.dumps({**found, "peak": memory("VmHWM"), "wall": clock.wall, "processor": clock.processor}))


def start(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """A contender in a process of its own."""
    threads = str(given.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits for another takes no processor time
    environment |= AVX2 if given.avx2 else {}
    arguments = ["--child", name, "--work", str(given.work), "--steps", str(given.steps), "--rank", str(given.rank)]
    arguments += ["--device", given.device]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # foreign libraries' banners
        env=environment,
        timeout=given.seconds,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """One contender's row."""
    wall = [seconds for run in runs for seconds in run["wall"][SKIPPED:]]
    processor = [seconds for run in runs for seconds in run["processor"][SKIPPED:]]
    return {
        "tokens_per_second": BATCH * LENGTH / statistics.median(wall),
        "processor": 1000 * statistics.median(processor) / (BATCH * LENGTH),
        "peak": max(run["peak"] for run in runs),
        "imported": max(run["imported"] for run in runs),
        "before": runs[0]["before"],
        "after": runs[0]["after"],
    }


def table(rows: dict[str, dict[str, float]], bound: dict[str, float]) -> None:
    """Print what came out, in Markdown."""
    reference = rows.get("peft-qalora")
    print("| contender | tokens/s | ratio | CPU s / 1,000 tokens | ratio | peak MB | imports | held-out loss |")
    print("|---|---|---|---|---|---|---|---|")

    def line(name: str, row: dict[str, float], rest: str) -> None:
        ratios = ("-", "-")
        if reference is not None:
            faster = row["tokens_per_second"] / reference["tokens_per_second"]
            ratios = (f"{faster:.2f}", f"{reference['processor'] / row['processor']:.2f}")
        speed = f"{row['tokens_per_second']:.0f} | {ratios[0]} | {row['processor']:.2f} | {ratios[1]}"
        print(f"| {name} | {speed} | {rest} |")

    for name, row in rows.items():
        memory = f"{row['peak'] / 1e6:.0f} | {row['imported'] / 1e6:.0f}"
        line(name, row, f"{memory} | {row['before']:.3f} -> {row['after']:.3f}")
    for name in ("float32", "bfloat16"):
        row = {key.split()[1]: value for key, value in bound.items() if key.startswith(f"{name} ")}
        if row:
            line(f"products alone, {name}, {row['GFLOPS']:.0f} GFLOPS", row, "- | - | -")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qalora-benchmark-training")
    parser.add_argument("--steps", type=int, default=8, help="more than two")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, help="of one run at most")
    parser.add_argument("--avx2", action="store_true", help="no AVX-512 and no AMX")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--child", choices=[*CONTENDERS, "limit"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.work, given.steps, given.rank, given.device)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    prepare(given.work, given.steps)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    bounds = []
    for _ in range(given.rounds):
        for name in given.only:
            runs[name].append(start(name, given))
            print(f"{name}: {summary(runs[name][-1:])}", file=sys.stderr)
        bounds.append(start("limit", given))
    rows = {name: summary(found) for name, found in runs.items()}
    best = {"processor": min}
    bound = {key: best.get(key.split()[1], max)(found[key] for found in bounds) for key in bounds[0]}
    table(rows, bound)
    if given.json:
        record = {"rows": rows, "limit": bound, "runs": runs, "rank": given.rank, "threads": given.threads}
        given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
