"""The tool that kills commands finds nothing wrong; a few kills here, hundreds by hand."""

import subprocess
import sys
from pathlib import Path


def test_a_few_kills() -> None:
    tool = Path(__file__).parents[2] / "tools" / "kill.py"
    words = ["--times", "8", "--only", "quantize gptq", "train", "export onnx", "delta apply"]
    done = subprocess.run([sys.executable, tool, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, total = done.stdout.splitlines()
    assert total.startswith("| all |") and total.endswith("| 0 |")
    assert int(total.split("|")[2]) >= 4, done.stdout
