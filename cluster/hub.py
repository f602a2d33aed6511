"""Checkpoints of the Hugging Face Hub by their names, fetched into its cache."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import DryRunFileInfo, constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headrace.cluster.offline import is_by_user
from headrace.runtime.conversion.checkpoint import INDEX, SINGLE, weight_files
from headrace.runtime.conversion.gguf.files import pattern_of
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

_PART = r"[\w-][\w.-]*"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART}?)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./-]+\.gguf))?"
)

BESIDE = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "LICENSE*")
"""Small files: the configuration, the tokenizer, which file has which weight."""


@dataclass(frozen=True, slots=True)
class _Named:
    """What was `given`, in its parts."""

    given: Path
    repo: str
    revision: str | None
    file: str | None

    def snapshot(self, patterns: Sequence[str]) -> Path:
        """Fetches what is not in the cache of files that match."""
        allowed = list(patterns)
        return Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=allowed))

    def listing(self) -> list[DryRunFileInfo] | None:
        """All files; None where the Hub cannot be asked."""
        try:
            listed = snapshot_download(self.repo, revision=self.revision, dry_run=True)
        except DryRunError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):  # which a gated one is, too
                raise error.__cause__ from None
            return None
        assert isinstance(listed, list)
        return listed


def local_checkpoint(given: Path) -> Path:
    """Where the checkpoint is: `given` as it is where there is such a path; else, if that can be a name of the Hub
    (ORG/NAME, ORG/NAME@REVISION, a GGUF file behind either), the directory or file that it is fetched to.

    What was fetched before is not fetched again, and does where the Hub cannot be reached. Raises HeadraceError, saying
    why, where nothing can be had.
    """
    match = _NAME.fullmatch(str(given))
    if given.exists() or match is None or match["repo"].endswith(".gguf"):
        return given
    named = _Named(given, match["repo"], match["revision"], match["file"])
    with _online():
        try:
            return _fetched(named)
        except HeadraceError:
            raise
        except Exception as error:  # huggingface_hub's, its HTTP client's, the disk's
            raise HeadraceError(f"{given}: {_reason(named, error)}") from error


def _fetched(named: _Named) -> Path:
    listed = named.listing()
    if listed is not None:
        _refuse_others(named, [each.filename for each in listed])
    folder = named.snapshot(BESIDE)
    patterns = weight_files(folder) if named.file is None else [pattern_of(named.file)]
    if listed is not None:
        _refuse_small_disk(
            named, [e for e in listed if any(fnmatch(e.filename, p) for p in patterns)]
        )
    folder = named.snapshot([*BESIDE, *patterns])
    return folder if named.file is None else folder / named.file


@contextmanager
def _online() -> Iterator[None]:
    """The network is used, which nothing else may, unless it is the user who said so."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before and is_by_user()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reason(named: _Named, error: Exception) -> str:
    """Why it could not be fetched, and what to do."""
    login = "`hf auth login` or HF_TOKEN"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{named.repo}"
        return f"whoever wants this model has to accept its conditions at {page}; then say who you are with {login}"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub has the model, but not this revision"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such path here and no such model on the Hub ({constants.ENDPOINT}); if it is a private one, say"
            f" who you are with {login}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        offline = constants.HF_HUB_OFFLINE
        why = "is not asked, since HF_HUB_OFFLINE is set" if offline else "cannot be reached"
        return f"there is no such path here, and the Hub ({constants.ENDPOINT}), which may have a model of that name, {why}"
    what = (str(error).splitlines() or [type(error).__name__])[0]
    return f"fetching it from the Hub failed: {what}; what has come is kept: run the same command again"


def _refuse_others(named: _Named, names: Sequence[str]) -> None:
    """Raises HeadraceError where a repository has not what is asked for."""
    given = named.given
    if named.file is not None:
        if not any(fnmatch(name, pattern_of(named.file)) for name in names):
            raise HeadraceError(f"{given}: the model on the Hub has no file {named.file}")
        return
    if INDEX in names or SINGLE in names:
        return
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files:
        raise HeadraceError(
            f"{given} holds GGUF files, of which you have to name one: {given}/{files[0]}, or"
            f" {', '.join(files[1:8])}{', ...' if len(files) > 8 else ''}"
        )
    raise HeadraceError(
        f"{given} on the Hub has neither {SINGLE}, nor {INDEX}, nor GGUF files, and nothing else is read"
    )


def _refuse_small_disk(named: _Named, wanted: Sequence[DryRunFileInfo]) -> None:
    needed = sum(each.file_size or 0 for each in wanted if each.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise HeadraceError(
            f"{named.given} takes {format_size(needed, up=True)} more in {cache}, where {format_size(free)} are free: set"
            " HF_HOME to a directory on another disk"
        )
