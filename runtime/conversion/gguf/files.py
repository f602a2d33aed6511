"""Which files are one model: large GGUF files come in parts, NAME-00001-of-00003.gguf and so on."""

import re
from collections.abc import Iterable
from pathlib import Path

from headrace.scheduler.errors import StoreError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def parts_of(file: Path) -> tuple[Path, ...]:
    """All parts, in order, of the file that `file` is a part of; itself, where it is none.

    StoreError where some are missing."""
    found = _PART.fullmatch(file.name)
    if found is None:
        return (file,)
    stem, _, count = found.groups()
    parts = [file.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        raise StoreError(
            f"{file} is one of {int(count)} parts, and {some} of them "
            f"{'is' if len(missing) == 1 else 'are'} not beside it: download what is missing"
        )
    return tuple(parts)


def pattern_of(name: str) -> str:
    """What the names of all parts match of the file of which that is one."""
    found = _PART.fullmatch(name)
    return name if found is None else f"{found[1]}-?????-of-{found[3]}.gguf"


def first_parts(files: Iterable[Path]) -> list[Path]:
    """One file of each model among these."""
    firsts: dict[str, Path] = {}
    for file in sorted(files):
        found = _PART.fullmatch(file.name)
        firsts.setdefault(file.name if found is None else f"{found[1]} {found[3]}", file)
    return list(firsts.values())
