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
        "The folder for results of steps, made where it is absent. It may be removed at any time.",
        place="output",
        matters=False,
    )
    keep: bool = option(
        False,
        "Keep results that the last run of no recipe used; otherwise they are removed at the end of a run.",
        matters=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Options):
    """The model that everything starts from."""

    model: str = option(
        help="A Hugging Face, GPTQ or qalora folder, a GGUF file, or a Hub id.", place="hub", example="base"
    )
    checkpoint_format: CheckpointFormat | None = option(
        None, "What a GPTQ folder's zeros are stored as, where its label is wrong."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAdapter(Options):
    """An adapter that is there already."""

    path: Path = option(help="The adapter to fold.", place="input", example="adapter")
    convention: Convention | None = option(None, "What the adapter's scaling means, where its file does not say.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Options):
    """What makes the release of another one."""

    base: Path = option(help="The release that is there already.", place="input", example="base-dist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Push(Options):
    """The Hub repository that the release goes to."""

    repo: str = option(help="The repository on the Hub.", metavar="OWNER/NAME", example="owner/name")
    upload: bool = option(False, "Do it. Without this, what would be done is printed, and nothing is sent.")
    private: bool = option(False, "Make the repository a private one, where it is made.")
    revision: str | None = option(
        None, "The branch, made if it is not there; main by default.", metavar="BRANCH", example="main"
    )
    replace: bool = option(False, "Delete files of the repository that the release has not.")


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
        help="Round a float base to integers. Leave it out where the base holds integers.",
        acts=True,
    ),
    Section(
        name="train",
        record=TrainOptions,
        help="Train an adapter. Leave it out where there is one, or none is wanted.",
        acts=True,
    ),
    Section(
        name="adapter", record=GivenAdapter, help="An adapter that is there already, instead of [train].", acts=True
    ),
    Section(name="export", record=Export, help="The formats, and how the weights are written in them.", required=True),
    Section(name="verify", record=Verify, help="What the gates are judged on."),
    Section(name="release", record=Package, help="The folder that is released.", required=True),
    Section(
        name="delta",
        record=Delta,
        help="Write DIST.delta too: what makes this release of another one.",
        acts=True,
    ),
    Section(name="push", record=Push, help="Say what would be uploaded to the Hub, or upload it.", acts=True),
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
