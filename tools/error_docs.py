#!/usr/bin/env python
"""Write docs/errors.md anew: run the tests of bad input, and list every sentence that they see.

python tools/error_docs.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from error_page import COLLECTED, PAGE, SECTIONS, page  # noqa: E402


def main() -> int:
    """Run, collect, write; the exit status of the tests."""
    files = [str(ROOT / "tests" / "cli" / name) for name in SECTIONS]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, COLLECTED: folder}
        status = subprocess.call([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, env=environment)
        sentences = [json.loads(one.read_text("utf-8")) for one in Path(folder).iterdir()]
    if status == 0:
        PAGE.write_text(page(sentences), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
