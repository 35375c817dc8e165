"""Write the page: its own files, what it runs of transformers.js, and where the model is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qalora.errors import MissingLibraryError
from qalora.formats.output import new_folder, write_json
from qalora.node_packages import installing, package_folder

__all__ = ["LIBRARY", "write_page"]

LIBRARY = "@huggingface/transformers"

SETTINGS = "page.json"

OWN = {"chat.html": "index.html", **{name: name for name in ("page.js", "worker.js", "serve.py")}}
"""The files beside this module, and what they are called beside the page."""

WEB = ("ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
"""What transformers.js 4 loads of ONNX Runtime, on the processor and on the GPU."""


def write_page(folder: Path, model: Path, name: str, *, force: bool = False) -> None:
    """Write a page into a new folder: a chat with the model of a folder for transformers.js.

    `serve.py` in it gives both to a browser; nothing is fetched from elsewhere. `name` is the page's title.

    `force` replaces an earlier page. MissingLibraryError where NODE_PATH has no transformers.js, OutputError for a
    folder that is there; nothing is written then.
    """
    files = _library()
    place = Path(os.path.relpath(model.resolve(), folder.resolve()))
    with new_folder(folder, force=force, names=[SETTINGS]) as work:
        for source, target in OWN.items():
            shutil.copyfile(Path(__file__).with_name(source), work / target)
        (work / "lib").mkdir()
        for path in files:
            shutil.copyfile(path, work / "lib" / path.name)
        write_json(work / SETTINGS, {"name": name, "model": f"{place.as_posix()}/"})


def _library() -> list[Path]:
    """transformers.js as one file, and the files of ONNX Runtime that it brings, or that are installed beside it."""
    library = package_folder(LIBRARY)
    web = package_folder(f"{LIBRARY}/node_modules/onnxruntime-web") or package_folder("onnxruntime-web")
    files = [] if library is None or web is None else [library / "dist" / "transformers.min.js"]
    files += [] if web is None else [web / "dist" / name for name in WEB]
    if len(files) <= len(WEB) or not all(path.is_file() for path in files):
        raise MissingLibraryError(f"{LIBRARY} 4", "a page that chats", "", todo=installing(LIBRARY))
    return files
