"""A recipe: the records of a whole pipeline, one a section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora.options.export import Export
from qalora.options.fields import Options, option
from qalora.options.quantize import Quantize
from qalora.options.release import Package
from qalora.options.train import TrainOptions
from qalora.options.verify import Verify
from qalora.options.words import CheckpointFormat, Convention

__all__ = ["SECTIONS", "Base", "Delta", "GivenAdapter", "Push", "Recipe", "Section", "Top"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Top(Options):
    """Keys of the recipe itself."""

    work: Path = option(
        Path(".qalora"),
        "Folder for the results of steps, made if it is missing. You can remove it at any time.",
        place="output",
        matters=False,
    )
    keep: bool = option(
        False,
        "Keep results that no recipe used in its last run. Otherwise they are removed at the end of a run.",
        matters=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Options):
    """The model that everything starts from."""

    model: str = option(
        help="A model folder (of floats, or of integers in many formats), a GGUF or ONNX file, or a Hub id.",
        place="hub",
        example="base",
    )
    checkpoint_format: CheckpointFormat | None = option(
        None, "How a GPTQ folder stores its zero points, if its label is wrong."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAdapter(Options):
    """An adapter that is there already."""

    path: Path = option(help="The adapter to fold.", place="input", example="adapter")
    convention: Convention | None = option(None, "How the adapter is scaled, if its files do not say.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Options):
    """What makes the release of another one."""

    base: Path = option(help="The earlier release that the delta starts from.", place="input", example="base-dist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Push(Options):
    """The Hub repository that the release goes to."""

    repo: str = option(help="The repository on the Hub.", metavar="OWNER/NAME", example="owner/name")
    upload: bool = option(False, "Upload. Without this, print what would be done and send nothing.")
    private: bool = option(False, "Make the repository private, if it does not exist yet.")
    revision: str | None = option(
        None, "Branch to upload to, made if it is missing. Default: main.", metavar="BRANCH", example="main"
    )
    replace: bool = option(False, "Delete files of the repository that are not in the release.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """acts: whether its being there, even empty, asks for something to be done."""

    name: str
    record: type[Options]
    help: str
    required: bool = False
    acts: bool = False


SECTIONS = (
    Section(name="", record=Top, help=""),
    Section(name="base", record=Base, help="The model that everything starts from.", required=True),
    Section(
        name="quantize",
        record=Quantize,
        help="Quantize a float base. Leave this out if the base holds integers.",
        acts=True,
    ),
    Section(
        name="train",
        record=TrainOptions,
        help="Train an adapter. Leave this out if you have one, or want none.",
        acts=True,
    ),
    Section(name="adapter", record=GivenAdapter, help="An adapter that you have, instead of [train].", acts=True),
    Section(name="export", record=Export, help="The formats, and how the weights are written in them.", required=True),
    Section(name="verify", record=Verify, help="What the artefacts are compared on."),
    Section(name="release", record=Package, help="The release folder.", required=True),
    Section(
        name="delta",
        record=Delta,
        help="Also write DIST.delta, which turns another release into this one.",
        acts=True,
    ),
    Section(name="push", record=Push, help="Show what would be uploaded to the Hub, or upload it.", acts=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole pipeline; see `SECTIONS`. The training's `out` is where its step puts it."""

    base: Base
    export: Export
    release: Package
    quantize: Quantize | None = None
    train: TrainOptions | None = None
    adapter: GivenAdapter | None = None
    verify: Verify = Verify()
    delta: Delta | None = None
    push: Push | None = None
    top: Top = Top()
