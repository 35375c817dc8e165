"""A finished release on the Hub: one repository with the folder as it is, checked before and after the upload.

The layout of the folder is the layout of the repository, so that SHA256SUMS and model.sig hold there too, and the card
is the repository's. What opens a sub-folder of a repository, and what wants the files on disk first, each format says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qalora.converters import TARGETS, target
from qalora.converters.format import Pushed
from qalora.errors import InputError, ProofError
from qalora.formats.json_text import read_json
from qalora.releasing.checksums import HUBS, check_sums, release_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

__all__ = ["PushPlan", "check_repo", "openings", "plan_push", "push"]

LARGEST_FILE = 50_000_000_000
"""Bytes. huggingface_hub's constants.MAX_HTTP_DOWNLOAD_SIZE: what is larger cannot be fetched by plain HTTP.

The Hub itself recommends less than 200 GB, and takes 500 GB."""

_SPLIT = {".safetensors": "--max-shard-size 5GB", ".gguf": "--split-max-size 20GB"}
_REPORT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What an upload would do. `files`: name in the repository and size in bytes, sorted by name."""

    folder: Path
    repo: str
    revision: str
    private: bool
    replace: bool
    files: tuple[tuple[str, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def plan_push(
    folder: Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    replace: bool = False,
    allow_unproven: bool = False,
) -> PushPlan:
    """Check everything that can be refused without a network.

    repo: OWNER/NAME. revision: a branch, made if it is not there, or refs/pr/N; main by default. replace: whether files
    of the repository that the release has not are deleted. Raises InputError for a name that the Hub does not take, a
    folder that is no release or has changed, a file too large; ProofError for a release whose report did not pass.
    """
    check_repo(repo)
    if not folder.is_dir():
        raise InputError(str(folder), expected="the folder of a release", got="no folder")
    check_sums(folder)
    if not allow_unproven and not _passed(folder):
        raise ProofError(
            f"{folder}: report.json does not say that every gate passed; give `allow_unproven` to upload it"
        )
    files = tuple((name, (folder / name).stat().st_size) for name in release_files(folder))
    for name, size in files:
        _check_file(folder, name, size)
    return PushPlan(
        folder=folder, repo=repo, revision=revision or "main", private=private, replace=replace, files=files
    )


def openings(plan: PushPlan) -> list[tuple[str, str]]:
    """What opens each sub-folder of the repository: pairs of a folder's name and a command or a line of Python."""
    repo, tops = plan.repo, sorted({name.split("/")[0] for name, _ in plan.files if "/" in name})
    local = repo.split("/")[1]
    lines = []
    for top in tops:
        files = tuple(name.removeprefix(f"{top}/") for name, _ in plan.files if name.startswith(f"{top}/"))
        fetch = f"hf download {repo} --include '{top}/*' --local-dir {local}"
        pushed = Pushed(repo=repo, local=local, fetch=fetch, files=files)
        lines += [(top, line) for line in (target(top).openings(pushed) if top in TARGETS else [fetch])]
    return lines


def push(plan: PushPlan) -> str:
    """Upload the planned files in one commit (several for a large folder), and compare what arrived; gives the address.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored. Raises InputError, one sentence, where
    there is no token, no network, no permission, or where the repository holds other files and `replace` is not set.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, and an upload needs the network; unset it")
    if get_token() is None:
        raise InputError("an upload needs a token of the Hub, and there is none; run hf auth login, or set HF_TOKEN")
    api = HfApi(library_name="qalora")
    with _hub_errors(plan, ENDPOINT):
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        if plan.revision != "main" and not plan.revision.startswith("refs/"):
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
        _check_others(plan, _remote(api, plan))
        done = api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            revision=plan.revision,
            commit_message=f"Release {plan.folder.resolve().name}",
            allow_patterns=[_literal(name) for name, _ in plan.files],
            delete_patterns=["*"] if plan.replace else None,
        )
        _check_arrived(plan, _remote(api, plan))
    return str(done.commit_url)


def check_repo(repo: str) -> None:
    """InputError for what is no OWNER/NAME that the Hub takes."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no name of a repository: {' '.join(str(error).split())}") from error
    if "/" not in repo:
        raise InputError(f"{repo!r}", expected="OWNER/NAME", got="a name without an owner")


def _passed(folder: Path) -> bool:
    report = read_json(folder / "report.json", _REPORT_BYTES)
    return isinstance(report, dict) and report.get("passed") is True


def _check_file(folder: Path, name: str, size: int) -> None:
    if {".git", ".cache"} & set(PurePosixPath(name).parts):
        raise InputError(f"{folder / name}: the Hub takes no folder of that name")
    if size > LARGEST_FILE:
        split = _SPLIT.get(PurePosixPath(name).suffix)
        raise InputError(
            str(folder / name),
            expected=f"at most {LARGEST_FILE:,} bytes, which every client can download",
            got=f"{size:,}",
            todo=f"make the release again with {split}" if split else "leave this format out",
        )


def _literal(name: str) -> str:
    """A pattern for fnmatch that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _remote(api: Any, plan: PushPlan) -> dict[str, RepoFile]:
    """The files of the repository, by name, but the Hub's own."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(plan.repo, recursive=True, revision=plan.revision)
    return {item.path: item for item in tree if isinstance(item, RepoFile) and f"{item.path}/" not in HUBS}


def _check_others(plan: PushPlan, remote: dict[str, RepoFile]) -> None:
    others = sorted(set(remote) - {name for name, _ in plan.files})
    if others and not plan.replace:
        raise InputError(
            f"{plan.repo} holds {len(others)} files that the release has not, {others[0]} for one",
            todo="choose another repository or branch, or give `replace` to delete them",
        )


def _check_arrived(plan: PushPlan, remote: dict[str, RepoFile]) -> None:
    """Names, sizes and digests, as the Hub has them: SHA-256 of large files, git's SHA-1 of small ones."""
    for name, size in plan.files:
        there = remote.get(name)
        if there is None:
            raise InputError(f"{plan.repo}: {name} was not taken; does a .gitignore of the repository name it?")
        if there.size != size or not _same(plan.folder / name, size, there):
            raise InputError(f"{plan.repo}: {name} is not what was sent; did someone else push meanwhile?")
    for name in sorted(set(remote) - {name for name, _ in plan.files}):
        raise InputError(f"{plan.repo}: {name} is there, and not in the release; did someone else push meanwhile?")


def _same(path: Path, size: int, there: RepoFile) -> bool:
    with path.open("rb") as file:
        if there.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % size + file.read(), usedforsecurity=False).hexdigest() == there.blob_id


@contextmanager
def _hub_errors(plan: PushPlan, endpoint: str) -> Iterator[None]:
    """One sentence for what the Hub, or the way to it, refuses."""
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    transport: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    try:
        yield
    except RevisionNotFoundError as error:
        raise InputError(f"{plan.repo} has no branch {plan.revision}") from error
    except HfHubHTTPError as error:
        raise InputError(_refusal(plan, error)) from error
    except InputError:
        raise
    except (transport, OSError) as error:
        raise InputError(
            f"{endpoint} cannot be reached: {_line(error)}", todo="the files are as they were; try again"
        ) from error
    except ValueError as error:  # huggingface_hub's for a card's front matter, and for an answer that it cannot read
        raise InputError(f"{plan.repo}: {_line(error)}") from error


def _refusal(plan: PushPlan, error: Any) -> str:
    status = error.response.status_code
    sentences = {
        401: "the Hub does not know the token; run hf auth login, or set HF_TOKEN",
        402: f"{plan.repo}: the Hub asks for a payment plan ({_line(error.server_message or error)})",
        403: f"the token may not write to {plan.repo}; make one with write access, or name another repository",
        404: f"{plan.repo} is not there, or the token may not see it",
        409: f"{plan.repo}: someone else changed it meanwhile; try again",
        413: f"{plan.repo}: the Hub finds a file too large",
    }
    return sentences.get(status) or f"{plan.repo}: the Hub answers {status} ({_line(error.server_message or error)})"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
