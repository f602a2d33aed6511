"""Checkpoints of the Hugging Face Hub by their names, fetched into its cache."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headrace.cluster.offline import is_by_user
from headrace.runtime.conversion.gguf.files import pattern_of
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

_PART = r"[\w-][\w.-]*"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART}?)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./-]+\.gguf))?"
)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
BESIDE = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "LICENSE*")


def local_checkpoint(given: Path) -> Path:
    """Where the checkpoint is: `given` as it is where there is such a path; else, if that can be a name of the Hub
    (ORG/NAME, ORG/NAME@REVISION, a GGUF file behind either), the directory or file that it is fetched to.

    What was fetched before is not fetched again, and does where the Hub cannot be reached. Raises HeadraceError, saying
    why, where nothing can be had.
    """
    match = _NAME.fullmatch(str(given))
    if given.exists() or match is None or match["repo"].endswith(".gguf"):
        return given
    file = match["file"]
    patterns = (*BESIDE, *(WEIGHTS if file is None else (pattern_of(file),)))
    asked: dict[str, Any] = {"repo_id": match["repo"], "revision": match["revision"]}
    with _online():
        return _fetched(given, asked, file, patterns)


def _fetched(
    given: Path, asked: Mapping[str, Any], file: str | None, patterns: Sequence[str]
) -> Path:
    try:
        listed = snapshot_download(**asked, dry_run=True)
    except DryRunError as error:
        _refuse(given, error.__cause__)
    except RevisionNotFoundError as error:
        _refuse(given, error)
    else:
        assert isinstance(listed, list)
        _refuse_others(given, file, [each.filename for each in listed])
        wanted = [each for each in listed if any(fnmatch(each.filename, p) for p in patterns)]
        _refuse_small_disk(given, sum(each.file_size or 0 for each in wanted if each.will_download))
    try:
        folder = Path(snapshot_download(**asked, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        raise HeadraceError(
            f"{given}: there is no such path here, and the Hub ({constants.ENDPOINT}), which may have a model of that name,"
            f" {'is not asked, since HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else 'cannot be reached'}"
        ) from error
    return folder if file is None else folder / file


@contextmanager
def _online() -> Iterator[None]:
    """The network is used, which nothing else may, unless it is the user who said so."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before and is_by_user()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _refuse(given: Path, error: BaseException | None) -> None:
    """Raises HeadraceError for what the Hub has said; where it said nothing, something may be here."""
    if isinstance(error, GatedRepoError):
        raise HeadraceError(
            f"{given}: whoever wants this model has to accept its conditions at {constants.ENDPOINT}/{given}; then say who you"
            " are with `hf auth login` or HF_TOKEN"
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise HeadraceError(f"{given}: the Hub has the model, but not this revision") from error
    if isinstance(error, RepositoryNotFoundError):
        raise HeadraceError(
            f"{given}: there is no such path here and no such model on the Hub ({constants.ENDPOINT}); if it is a private one, say"
            " who you are with `hf auth login` or HF_TOKEN"
        ) from error


def _refuse_others(given: Path, file: str | None, names: Sequence[str]) -> None:
    """Raises HeadraceError where a repository has not what is asked for."""
    if file is not None:
        if not any(fnmatch(name, pattern_of(file)) for name in names):
            raise HeadraceError(f"{given}: the model on the Hub has no file {file}")
        return
    if any(name.endswith(".safetensors") for name in names):
        return
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files:
        raise HeadraceError(
            f"{given} holds GGUF files, of which you have to name one: {given}/{files[0]}, or"
            f" {', '.join(files[1:8])}{', ...' if len(files) > 8 else ''}"
        )
    raise HeadraceError(
        f"{given} on the Hub has neither safetensors nor GGUF files, and nothing else is read"
    )


def _refuse_small_disk(given: Path, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise HeadraceError(
            f"{given} takes {format_size(needed, up=True)} more in {cache}, where {format_size(free)} are free: set HF_HOME to a"
            " directory on another disk"
        )
