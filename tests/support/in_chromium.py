"""A page in a headless Chromium, steered by its debugging protocol over a pipe; and the server of the page.

Protocol: https://chromedevtools.github.io/devtools-protocol/, with --remote-debugging-pipe: JSON that ends with a zero
byte, on the descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

__all__ = ["Chromium", "served", "skip_without_chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 240


def skip_without_chromium() -> str:
    """The browser's path; skips a test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no {NAMES[0]}")
    return found


@contextmanager
def served(page: Path) -> Iterator[str]:
    """The address of a page that the server beside it gives."""
    words = [sys.executable, "-u", str(page / "serve.py"), "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1]
        finally:
            process.terminate()


class Chromium:
    """A browser with one page; `requests` are the addresses that the page and its workers have asked for."""

    def __init__(self, profile: Path, *options: str) -> None:
        path = skip_without_chromium()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._count, self._rest = 0, b""
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        words = [path, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        words += ["--disable-background-networking", "--no-first-run", "--disable-dev-shm-usage"]
        words += ["--window-size=900,900", *options, "about:blank"]
        shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        self._session: str | None = None
        targets = self._ask("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")
        self._ask("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _send(self, method: str, session: str | None, parameters: dict[str, Any]) -> int:
        self._count += 1
        order = {"id": self._count, "method": method, "params": parameters}
        os.write(self._out, json.dumps(order | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self._count

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a method answers; what happens in the meantime is noted."""
        number = self._send(method, self._session, parameters)
        while (message := self._next()).get("id") != number:
            self._note(message)
        assert "error" not in message, f"{method}: {message['error']}"
        result: dict[str, Any] = message["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], SECONDS)[0], f"the browser says nothing for {SECONDS} seconds"
            data = os.read(self._in, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, told = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Target.attachedToTarget":
            self._send("Network.enable", told["sessionId"], {})
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])

    def open(self, address: str) -> None:
        """Open an address."""
        self._ask("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        return self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)[
            "result"
        ].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> Any:
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression}: not in {seconds} seconds; errors: {self.errors}"
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG file."""
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))
