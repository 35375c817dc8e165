"""Take the picture of the page that chats, docs/chat.png, of a demo that has one.

    NODE_PATH=... qalora demo -o demo --to transformersjs && python tools/chat_picture.py [DEMO]

Needs Chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

from in_chromium import Chromium, served  # noqa: E402

QUESTION = "What is Python?"


def main() -> None:
    """Ask one question, stop the answer, and look."""
    demo = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    with tempfile.TemporaryDirectory() as profile, served(demo / "chat") as address, Chromium(Path(profile)) as page:
        page.open(address)
        page.wait("document.getElementById('status').dataset.state === 'ready'")
        page.value(f"document.getElementById('text').value = {QUESTION!r}")
        page.value("document.getElementById('form').requestSubmit()")
        page.wait("document.querySelector('[data-role=model]').textContent.length > 200")
        page.value("document.getElementById('form').requestSubmit()")
        page.wait("document.getElementById('status').dataset.state === 'ready'")
        page.screenshot(ROOT / "docs" / "chat.png")


if __name__ == "__main__":
    main()
