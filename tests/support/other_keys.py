"""Artefacts that were edited after they were written: a rope key more, beside the one that is there."""

import json
import shutil
from pathlib import Path

import gguf

from gguf_files import rewritten


def with_another_rope_key(source: Path, place: Path) -> Path:
    """A copy of a folder, or of a GGUF file or the folder of one, whose positions its runtime divides by 4.

    config.json gets a rope_scaling beside its rope_parameters, as model cards tell; a GGUF file a factor and no type.
    """
    file = source if source.suffix == ".gguf" else next(source.glob("*.gguf"), None)
    if file is not None:
        place.mkdir()
        return rewritten(file, place / file.name, {"rope.scaling.factor": (4.0, gguf.GGUFValueType.FLOAT32)}, ours=True)
    shutil.copytree(source, place)
    for path in place.rglob("config.json"):
        config = json.loads(path.read_text("utf-8"))
        scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        path.write_text(json.dumps({**config, "rope_scaling": scaling}), encoding="utf-8")
    return place
