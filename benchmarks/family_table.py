"""Each family in each format: how far the logits are from the reference's in the format's own runtime.

    python benchmarks/family_table.py [--write docs/families.md]

For each family a tiny random model is quantized, an adapter folded in, exported to every format, and verified: weights
read back, logits in each runtime. A cell is the largest logit difference over the largest logit, and whether every gate
passed; where a format refuses, the refusal. With --write the table goes between the markers of that page.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from marked_page import put

from qalora.converters import load
from qalora.converters.exports import export
from qalora.errors import QaloraError
from qalora.folding import fold
from qalora.parity import verify
from qalora.quantization import quantize
from qalora.testing import TINY, byte_tokenizer, random_adapter, tiny_model

FORMATS = ("gptq", "onnx", "openvino", "transformersjs", "gguf", "mlx", "hqq", "torchao", "mnn")
COLUMNS = {
    ("gptq", "gptqmodel"): "GPTQ, transformers + GPTQModel",
    ("onnx", "onnxruntime"): "ONNX, ONNX Runtime",
    ("onnx/portable", "onnxruntime"): "portable ONNX, ONNX Runtime",
    ("onnx/portable", "onnx.reference"): "portable ONNX, onnx.reference",
    ("openvino", "openvino"): "OpenVINO",
    ("transformersjs", "transformers.js"): "transformers.js, onnxruntime-node",
    ("transformersjs", "onnxruntime-web"): "transformers.js folder, onnxruntime-web",
    ("gguf", "llama.cpp"): "GGUF, llama.cpp",
    ("mlx", "mlx"): "MLX, mlx-lm",
    ("hqq", "hqq"): "HQQ, hqq",
    ("torchao", "torchao"): "torchao, transformers",
    ("mnn", "mnn"): "MNN",
}
TOKENS = 96
"""Longer than the windows that some families have; fewer where the plan says that a runtime has no such window."""

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def cells(family: str, folder: Path) -> dict[tuple[str, str], str]:
    """The row of one family, by format and runtime."""
    base = quantize(load(tiny_model(folder / "float", family, tokenizer=byte_tokenizer())), group_size=32)
    adapter = random_adapter(base, seed=1, a_size=0.05, scaling=2.0)  # of a size that moves the logits
    folded = fold(base, adapter)
    found: dict[tuple[str, str], str] = {}
    for target in FORMATS:
        try:
            (plan,) = export(folded, [target], folder)
        except QaloraError as refusal:
            found |= {column: f"refused: {refusal}" for column in COLUMNS if column[0].split("/")[0] == target}
            continue
        tokens = min(TOKENS, plan.longest or TOKENS)
        report = verify(base, [folder / target], adapter=adapter, level="logits", max_tokens=tokens, relative_to=folder)
        for artifact in report.artifacts:
            place = artifact.name if target == "onnx" else target
            for run in artifact.runs:
                statuses = {result.status for result in (*artifact.gates, *run.gates)}
                worst = next((status for status in ("fail", "not proven") if status in statuses), "pass")
                size = "" if run.logits is None else f"{run.logits.max / largest(report.noise):.1e}, "
                found[place, run.kind] = f"{size}{worst}" + (f", up to {tokens} tokens" if tokens < TOKENS else "")
    return found


def largest(noise: object) -> float:
    """The largest logit, from the floor of float32's noise, which is 8 * 2^-24 of it."""
    return float(getattr(noise, "floor", 0.0)) * 2.0**21


def table() -> str:
    """The table as Markdown."""
    lines = ["| family | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in TINY:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign loaders' own
            row = cells(family, Path(folder))
        lines.append(f"| {family} | " + " | ".join(row.get(column, "not run") for column in COLUMNS) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table, and put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    made = table()
    if arguments.write is not None:
        put(arguments.write, made, BEGIN, END)


if __name__ == "__main__":
    main()
