"""The model card of a release, a pure function of manifest.json and report.json: what each artefact is, how to try it,
and the proof. Every figure is the report's, or a size of the manifest's.

The front matter is what the Hub reads (https://huggingface.co/docs/hub/model-cards), made by huggingface_hub. A model
whose weights a fine-tune changed is a "finetune" of its base whatever it is stored in; without an adapter it is
"quantized". license: a word of the Hub's list, else "other" with license_name and license_link.

The template is Markdown with `{{ name }}` for the parts, see PARTS; nothing in it is executed. Names and sentences of
manifest and report come out of files that others made: they are shortened and escaped, so that they are text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from qalora.converters import TARGETS, target
from qalora.errors import InputError, first_line, shown
from qalora.parity.gates import worst
from qalora.parity.report import ParityReport, RunReport
from qalora.releasing.digests import content_digest
from qalora.releasing.licences import HUB_LICENCES
from qalora.releasing.records import ArtifactEntry, Manifest, TensorEntry
from qalora.releasing.usage import adapter_usage, check_usage, usage

__all__ = ["PARTS", "card_text", "check_template", "default_template"]

PARTS = (
    "card_data",
    "title",
    "summary",
    "artifacts",
    "usage",
    "adapter",
    "proven",
    "proof",
    "check",
)
"""What a template may name: the front matter's YAML; the name; what it is; the table of artefacts; a section to try
each; the adapter's section; a half sentence on what was run; the table of runs; how to check the folder."""

NOT_RUN = RunReport(kind="not run", runtime=None, rounding="")
LONGEST = 200
MARKS = re.compile(r"[\\`*_\[\]<>|&~!#{}$]")


def default_template() -> str:
    """The template that comes with qalora."""
    return files("qalora.releasing").joinpath("card_template.md").read_text(encoding="utf-8")


def check_template(template: str) -> None:
    """InputError for a template that names what is no part, with its line, or that makes no card."""
    _check_front(_filled(template, {**dict.fromkeys(PARTS, ""), "card_data": "pipeline_tag: text-generation"}))


def card_text(manifest: Manifest, report: ParityReport, *, template: str | None = None) -> str:
    """The card of a manifest and a report, as `report_from_json` gives it.

    template is the text of --card-template where the release was made with one. Raises InputError for a template that
    is not the manifest's, names what is no part, or is not a card; FormatError for a target that is none.
    """
    told = manifest.options.template
    if told != (None if template is None else content_digest(template.encode())):
        raise InputError(
            "the card's template",
            expected="the template that the release was made with",
            got="a different template" if template is not None else "no template",
            todo="give it as `card_template`" if told else "leave out `card_template`",
        )
    text = _filled(default_template() if template is None else template, _parts(manifest, report))
    _check_front(text)
    return text


def _parts(manifest: Manifest, report: ParityReport) -> dict[str, str]:
    ran = f" and run in its own runtime over the same {report.tokens} tokens" if report.level != "weights" else ""
    return {
        "card_data": _front(manifest),
        "title": _words(manifest.name) + ("" if manifest.adapter is None else ", fine-tuned"),
        "summary": _summary(manifest),
        "artifacts": _artifacts(manifest, report),
        "usage": "\n\n".join(usage(artifact, manifest.name) for artifact in manifest.artifacts),
        "adapter": adapter_usage(manifest),
        "proven": ran,
        "proof": _proof(report),
        "check": check_usage(),
    }


def _filled(template: str, parts: Mapping[str, str]) -> str:
    def part(found: re.Match[str]) -> str:
        if found[1] not in parts:
            line = template.count("\n", 0, found.start()) + 1
            raise InputError(
                f"the card's template, line {line}", expected=f"one of {', '.join(parts)}", got=shown(found[1])
            )
        return parts[found[1]]

    text = re.sub(r"\{\{ *([A-Za-z_]\w*) *\}\}", part, template.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _check_front(text: str) -> None:
    """InputError where the card begins with no front matter that the Hub reads."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import ModelCard

    if not text.startswith("---\n"):
        raise InputError("the card's template", expected="'---' in its first line, and {{ card_data }} in the next")
    try:
        ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise InputError(f"the card's template: its front matter is not read ({reason})") from error


def _front(manifest: Manifest) -> str:
    """The front matter's YAML: what is None is not in it."""
    from huggingface_hub import ModelCardData

    targets = sorted(artifact.target for artifact in manifest.artifacts)
    base, adapted, card = _base(manifest), manifest.adapter is not None, manifest.options.card
    bits = sorted({bits for bits, _ in manifest.base.grids})
    found: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": ("finetune" if adapted else "quantized") if base else None,
        "language": list(card.language),
        "datasets": list(card.datasets),
        "library_name": _library(targets),
        "pipeline_tag": "text-generation",
        "quantized_by": card.quantized_by,
        "tags": [*(["qa-lora"] if adapted else []), "quantized", *(f"{n}-bit" for n in bits), *targets],
        **_license(manifest),
    }
    return str(ModelCardData(**{key: value for key, value in found.items() if value}).to_yaml(line_break="\n"))


def _library(targets: Iterable[str]) -> str | None:
    """The library that opens the first of the targets: one that opens a folder before one that opens a file."""
    found = [one for name in TARGETS if name in targets and (one := target(name)).library is not None]
    return next((one.library for one in sorted(found, key=lambda one: one.by_config is None)), None)


def _base(manifest: Manifest) -> str | None:
    return manifest.options.card.base_model or manifest.base.source


def _license(manifest: Manifest) -> dict[str, str | None]:
    given, link = manifest.license, manifest.options.card.license_link
    if given is not None and given.lower() in HUB_LICENCES:
        return {"license": given.lower(), "license_link": link}
    held = next((name for name in manifest.licences if name.startswith("LICENSE")), None)
    if given is None and held is None:
        return {}
    return {"license": "other", "license_name": given or "as-in-its-file", "license_link": link or held}


def _summary(manifest: Manifest) -> str:
    held = " and ".join(f"{bits}-bit codes in groups of {size}" for bits, size in manifest.base.grids[:3]) or "floats"
    base = _base(manifest)
    of = f" Its base is {_code(base)}." if base else ""
    name, adapter = _words(manifest.name), manifest.adapter
    if adapter is None:
        return f"{name} in {held}.{of}"
    rank = max((layer.rank for layer in adapter.layers.values()), default=0)
    return (
        f"{name} in {held}, with a QA-LoRA adapter of rank {rank} on {len(adapter.layers)} layers that was folded "
        f"exactly: fine-tuning changed the minima of the groups, and not one integer code.{of}"
    )


def _artifacts(manifest: Manifest, report: ParityReport) -> str:
    lost = [] if manifest.adapter is None else ["adapter lost"]
    head = ["folder", "size", "bits per weight", "weights are in", "exact", "runtime", *lost]
    rows = [_row(head), _row(["---", "---:", "---:", "---", "---", "---", *("---:" for _ in lost)])]
    for artifact in manifest.artifacts:
        runs = _runs(report, artifact.folder)
        cells = [
            _code(f"{artifact.folder}/"),
            _size(artifact.nbytes),
            _bits(artifact),
            _carriers(artifact.tensors),
            _exact(artifact.tensors),
            "<br>".join(_words(kind) for kind in runs) or "not run",
        ]
        rows.append(_row(cells + (["<br>".join(_percent(lost_most) for lost_most in runs.values())] if lost else [])))
    return "\n".join(rows)


def _bits(artifact: ArtifactEntry) -> str:
    """Bits per weight of what a device loads; of all files where the manifest does not say what that is."""
    device_load = artifact.device_load
    if device_load is None:
        return f"{artifact.bits_per_weight:.2f}"
    embedding = device_load.embedding
    return f"{device_load.linear.bits:.2f}, embedding {embedding.bits:.2f} ({_size(embedding.nbytes)})"


def _runs(report: ParityReport, folder: str) -> dict[str, float | None]:
    """Each runtime that ran an artefact of a folder, and the most of the adapter that was lost in it."""
    found: dict[str, float | None] = {}
    for artifact in report.artifacts:
        if artifact.name == folder or artifact.name.startswith(f"{folder}/"):
            for run in artifact.runs:
                if run.runtime is not None:
                    before = found.get(run.kind)
                    found[run.kind] = run.lost if before is None else max(before, run.lost or 0.0)
    return found


def _carriers(tensors: Iterable[TensorEntry]) -> str:
    counts = Counter(row.carrier for row in tensors)
    told = [f"{_words(carrier)} ({count})" for carrier, count in counts.most_common(4)]
    return "<br>".join([*told, *(["others"] if len(counts) > 4 else [])])


def _exact(tensors: Iterable[TensorEntry]) -> str:
    losses = sorted({row.loss.size for row in tensors if row.loss is not None})
    return "<br>".join(_words(loss) for loss in losses) or "yes"


def _proof(report: ParityReport) -> str:
    head = ["artefact", "codes that differ", "runtime", "adapter lost", "largest logit difference", "top-1", "gates"]
    rows = [_row(head), _row(["---", "---:", "---", "---:", "---:", "---:", "---"])]
    for artifact in report.artifacts:
        for run in artifact.runs or (NOT_RUN,):
            runtime, logits = run.runtime, run.logits
            named = run.kind if runtime is None else f"{runtime.name} {runtime.version}"
            figures = ["", ""] if logits is None else [_number(logits.max, ".3g"), _number(logits.top1, ".4f")]
            cells = [_code(artifact.name), str(artifact.weights.total.codes_differ), _words(named)]
            rows.append(_row([*cells, _percent(run.lost), *figures, worst((*artifact.gates, *run.gates))]))
    return "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _size(nbytes: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if nbytes >= 10**power:
            return (
                f"{nbytes / 10**power:.3g} {unit}" if nbytes < 1000 * 10**power else f"{nbytes // 10**power:,} {unit}"
            )
    return f"{nbytes} B"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _one_line(text: str) -> str:
    """Printable, on one line, and not long."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _words(text: str) -> str:
    """Somebody's text as text in Markdown: no marks, no HTML, no links of their own accord."""
    marked = MARKS.sub(lambda found: f"&#{ord(found[0])};", _one_line(text))
    return marked.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def _code(text: str) -> str:
    """Somebody's text as code, in a table too."""
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', '/')}`"
