"""A Hub on this machine: the few endpoints that huggingface_hub uses to upload, list and download, over HTTP.

Large files (LFS) are those of the suffixes in LARGE; blobs are kept in memory. No Xet: HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".gguf", ".onnx", ".data")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name: files by path; `ignored`: paths that a .gitignore names; `status`: what each POST gets."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.ignored: set[str] = set()
        self.spoiled: set[str] = set()
        self.status = 0
        self.token = "hf_" + "a" * 34
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, content: object = None, *, status: int = 200, raw: bytes | None = None, **more: str) -> None:
            body = json.dumps(content).encode() if raw is None else raw
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_PUT(self) -> None:
            oid = self.path.rsplit("/", 1)[1]
            content = self.body()
            assert hashlib.sha256(content).hexdigest() == oid
            hub.blobs[oid] = content
            self.answer(raw=b"")

        def do_POST(self) -> None:
            path, data = unquote(urlsplit(self.path).path), self.body()
            if hub.status or self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer({"error": "no"}, status=hub.status or 401)
            elif path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked['organization']}/{asked['name']}"
                hub.created.append(asked)
                known = name in hub.repos
                hub.repos.setdefault(name, {".gitattributes": b"*.gguf filter=lfs\n"})
                self.answer({"url": f"{hub.url}/{name}"}, status=409 if known else 200)
            elif path == "/api/validate-yaml":
                self.answer({})
            elif "/preupload/" in path:
                files = [entry["path"] for entry in json.loads(data)["files"]]
                modes = [
                    {"path": name, "uploadMode": mode(name), "shouldIgnore": name in hub.ignored} for name in files
                ]
                self.answer({"files": modes})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(data)["objects"]
                for entry in objects:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/blob/{entry['oid']}"}}
                self.answer({"objects": objects, "transfer": "basic"})
            elif "/branch/" in path:
                hub.branches.append(path.rsplit("/", 1)[1])
                self.answer({})
            elif "/commit/" in path:
                repo = path.removeprefix("/api/models/").split("/commit/")[0]
                commit(hub, hub.repos[repo], data)
                self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.answer({"error": path}, status=404)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if "/tree/" in path:
                repo = path.removeprefix("/api/models/").split("/tree/")[0]
                self.answer([entry(name, content) for name, content in sorted(hub.repos[repo].items())])
            elif "/resolve/" in path:
                self.resolve(path)
            elif (repo := path.removeprefix("/api/models/").split("/revision/")[0]) in hub.repos:
                files = [{"rfilename": name} for name in sorted(hub.repos[repo])]
                self.answer({"_id": "0", "id": repo, "sha": COMMIT, "siblings": files, "tags": [], "private": False})
            else:
                self.answer({"error": path}, status=404, X_Error_Code="RepoNotFound")

        def resolve(self, path: str) -> None:
            repo, _, rest = path[1:].partition("/resolve/")
            name = rest.partition("/")[2]
            content = hub.repos[repo].get(name)
            if content is None:
                self.answer({}, status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            etag = f'"{entry(name, content)["oid"]}"'
            self.answer(
                raw=content, ETag=etag, X_Linked_Etag=etag, X_Linked_Size=str(len(content)), X_Repo_Commit=COMMIT
            )

        do_HEAD = do_GET

    return Handler


def mode(name: str) -> str:
    return "lfs" if name.endswith(LARGE) else "regular"


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if mode(name) == "lfs" and content:
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


def commit(hub: Hub, files: dict[str, bytes], data: bytes) -> None:
    for line in data.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
    for name in hub.spoiled & set(files):
        files[name] = files[name][:-1] + b"?"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub that answers at `hub.url` to `hub.token`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
