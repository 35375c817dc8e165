"""Write the folder; the data as the ONNX target does, some rows at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qalora.checkpoint import Checkpoint
from qalora.converters.ends import write_generation
from qalora.converters.huggingface import companion_files
from qalora.converters.onnx.writer import write_weights
from qalora.converters.plan import Plan, Progress
from qalora.converters.tokenizer import chat_templates, has_tokenizer, read_json, write_tokenizer
from qalora.converters.transformersjs.files import GRAPH
from qalora.converters.transformersjs.planner import DATA, LONGEST, SETTINGS, TOKENIZER, BrowserPlan, rule_of
from qalora.formats.json_text import read_json_object
from qalora.formats.output import ordered_json_bytes, write_json
from qalora.formats.share import Share

__all__ = ["write"]


def write(plan: Plan, model: Checkpoint, folder: Path, progress: Progress, share: Share) -> None:
    """Write the planned files."""
    if not isinstance(plan, BrowserPlan):
        raise TypeError(f"expected BrowserPlan, got {type(plan).__name__}")
    if share.frame:
        write_tokenizer(model, folder)
        if has_tokenizer(model):
            _put_rule(folder / TOKENIZER)
            _put_templates(replace(model, gguf=None, files=companion_files(folder)), folder / SETTINGS)
        write_generation(model, folder)
        write_json(folder / "config.json", plan.config)
        (folder / GRAPH).parent.mkdir()
        (folder / GRAPH).write_bytes(plan.graph)
    write_weights(plan.weights, model, folder / DATA, progress, share)


def _put_rule(path: Path) -> None:
    """The rule for cutting text in words that mean the same to transformers.js."""
    content = read_json_object(path, LONGEST) if path.exists() else {}
    rule = rule_of(content)
    if rule is not None:
        path.write_bytes(ordered_json_bytes({**content, "pre_tokenizer": rule}))


def _put_templates(model: Checkpoint, path: Path) -> None:
    """The chat templates into tokenizer_config.json: transformers.js looks for them nowhere else."""
    settings = read_json(model, SETTINGS) if SETTINGS in model.files else None
    templates = chat_templates(model)
    several = [{"name": name, "template": text} for name, text in templates.items()]
    own = {"chat_template": templates["default"] if [*templates] == ["default"] else several} if templates else {}
    if settings is None or {**settings, **own} != settings:
        write_json(path, {**(settings or {}), **own})
