"""Serve a chat with a model to a browser on this machine: python chat/serve.py [PORT]

The page may use several threads only where a server says that nothing comes from elsewhere; file:// never may.
"""

import contextlib
import http.server
import json
import os
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, for one origin alone."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | TYPES

    def end_headers(self) -> None:
        """The headers that isolate the page, too."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()


def server(port: int = 0) -> tuple[http.server.ThreadingHTTPServer, str]:
    """A server of the folder that holds page and model, on this machine alone; and the page's address."""
    model = HERE / json.loads((HERE / "page.json").read_text("utf-8"))["model"]
    root = Path(os.path.commonpath([HERE, model.resolve()]))
    made = http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(root)))
    return made, f"http://127.0.0.1:{made.server_port}/{HERE.relative_to(root).as_posix()}/"


if __name__ == "__main__":
    serving, address = server(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
    print(f"open {address} and press Ctrl-C to end")  # noqa: T201  # it is a program of its own
    with contextlib.suppress(KeyboardInterrupt):
        serving.serve_forever()
