"""The blocks of a model card that try each artefact, and what stands beside them.

A block runs in the release's folder as it is; `tests/release/test_card.py` runs them. Of the lines for a shell, those
of llama-cli and ollama are not run there, as no package index has these programs: the test holds their files and flags
only, and the block of Python beside them loads the same file in llama.cpp.
"""

from __future__ import annotations

from qalora.converters import TARGETS, target
from qalora.converters.format import Released
from qalora.errors import FormatError, shown
from qalora.releasing.records import ArtifactEntry, Manifest

__all__ = ["adapter_usage", "check_usage", "usage"]

TOKENIZERS = ("tokenizer.json", "tokenizer.model")

_CONVENTIONS = {
    "paper": "inputs are summed over a group, as in the paper",
    "official": "inputs are averaged over a group, as in the authors' code",
    "peft": "inputs are averaged over a group, and multiplied by the count of groups, as PEFT's `use_qalora` does",
}


def usage(artifact: ArtifactEntry, model: str) -> str:
    """The section of one artefact of a model."""
    name, files = artifact.target, sorted(file.partition("/")[2] for file in artifact.files)
    if name not in TARGETS:
        raise FormatError("manifest.json: target", expected=", ".join(TARGETS), got=shown(name))
    form = target(name)
    carriers = tuple(row.carrier for row in artifact.tensors)
    body = form.usage(Released(model=model, files=tuple(files), carriers=carriers))
    if not form.tokenizer and not any(file.rpartition("/")[2] in TOKENIZERS for file in files):
        body += "\n\nThe base model has no tokenizer in a form that could be written here: take its own instead."
    return f"### {form.kind}: {form.runs}\n\n{body}"


def adapter_usage(manifest: Manifest) -> str:
    """The section about the adapter's folder; empty where there is none."""
    adapter = manifest.adapter
    if adapter is None or not manifest.options.with_adapter:
        return ""
    meaning = _CONVENTIONS[adapter.convention]
    return f"""## The adapter alone

`adapter/` holds the QA-LoRA adapter that was folded, in PEFT's layout with qalora's keys beside PEFT's. Its scaling is
of the convention `{adapter.convention}`: {meaning}. As an ordinary LoRA it gives another model.

```sh
qalora inspect adapter
```"""


def check_usage() -> str:
    """How a stranger checks the folder."""
    return """```sh
sha256sum --check --quiet SHA256SUMS
qalora check .
```

The first compares every file with its digest. The second reads `manifest.json`, opens every artefact and renders this
card again from `manifest.json` and `report.json`; with `--base` and `--adapter` it computes every byte anew. What is in
the folder, and what it was made with, is also in `sbom.cdx.json` (CycloneDX 1.6)."""
