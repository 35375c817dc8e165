"""GGUF files as other programs write them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf

Keys = Mapping[str, Any]
NONE: Keys = MappingProxyType({})


def rewritten(
    source: Path, path: Path, keys: Keys = NONE, gone: Iterable[str] = (), more: Keys = NONE, *, ours: bool = False
) -> Path:
    """A copy by gguf-py: without keys of ours unless they stay, keys of the architecture set, (value, type), or left
    out, and with more tensors.
    """
    reader = gguf.GGUFReader(source)
    prefix = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, prefix)
    changes = {f"{prefix}.{key}": value for key, value in keys.items()}
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")) or key in changes:
            continue
        if key.startswith("qalora.") and not ours:
            continue
        if key.removeprefix(f"{prefix}.") not in gone:
            element = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    for key, (value, kind) in changes.items():
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in more.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
