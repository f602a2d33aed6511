"""What a check says, and how checks are run so that one which fails is said, too."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class Status(str, Enum):
    """UNCHECKED is for what could not be looked at; it is no problem."""

    OK = "ok"
    WARN = "warn"
    PROBLEM = "problem"
    UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` is what was seen, `fix` a command or a sentence where the status asks for one."""

    area: str
    check: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run would use: a store, a directory for KV pages, and one for temporary files."""

    store: Path | None = None
    kv_directory: Path | None = None
    temporary: Path | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What has to be the same on all nodes, or is needed to compare them."""

    node: str
    versions: dict[str, str]
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class NodeReport:
    facts: Facts
    findings: tuple[Finding, ...] = field(default=())


Check = Callable[[], Iterable[Finding]]


class NotChecked(Exception):
    """Raised by a check that cannot be made here, with the reason."""


def ok(area: str, check: str, found: str) -> Finding:
    return Finding(area, check, Status.OK, found)


def warn(area: str, check: str, found: str, fix: str) -> Finding:
    return Finding(area, check, Status.WARN, found, fix)


def problem(area: str, check: str, found: str, fix: str) -> Finding:
    return Finding(area, check, Status.PROBLEM, found, fix)


def unchecked(area: str, check: str, why: str) -> Finding:
    return Finding(area, check, Status.UNCHECKED, f"not checked: {why}")


def run_checks(area: str, checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """The findings of all checks in order. A check that fails is a finding itself: what breaks may be just
    what is wrong with the machine."""
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001
            why = str(error) or type(error).__name__
            if not isinstance(error, NotChecked):
                why = f"{type(error).__name__}: {why}"
            yield unchecked(area, name, why.splitlines()[0])
