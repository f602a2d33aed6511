"""Python, Headrace and what it stands on: importable, and as new as it has to be."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from headrace import __version__
from headrace.cluster.doctor.finding import Check, Finding, NotChecked, ok, problem, run_checks

AREA = "software"
IMPORTED = ("torch", "transformers", "bitsandbytes", "ray")
OPTIONAL = ("triton",)
"""Kernels for CUDA are written in it."""

IMPORT_SECONDS = 120.0
_NUMBER = re.compile(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?")
_NEED = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*(?:([<>=!~].*?))?\s*(?:;.*)?")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What has to be alike on all nodes of a cluster."""
    found = {"Python": platform.python_version(), "Headrace": __version__}
    found |= {name: version_of(name) or "absent" for name in IMPORTED}
    return found


def software() -> Iterator[Finding]:
    checks: list[tuple[str, Check]] = [
        ("Python", _python),
        ("requirements", _requirements),
        ("imports", _imports),
    ]
    yield from run_checks(AREA, checks)


def _python() -> Iterator[Finding]:
    yield ok(AREA, "Python", f"{platform.python_version()} at {sys.executable}")


def number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, such as (2, 13, 0) of "2.13.0+cpu"."""
    match = _NUMBER.match(version)
    return tuple(int(part or 0) for part in match.groups()) if match else (0, 0, 0)


def _requirements() -> Iterator[Finding]:
    """What the package itself says that it needs."""
    needs = importlib.metadata.requires("headrace")
    if needs is None:
        raise NotChecked("the package has no metadata; install it with pip")
    wrong = [*filter(None, map(_unmet, (need for need in needs if "extra ==" not in need)))]
    if wrong:
        yield problem(AREA, "requirements", "; ".join(wrong), "pip install --upgrade headrace")
    else:
        yield ok(AREA, "requirements", f"Headrace {__version__} and all that it needs")


def _unmet(need: str) -> str | None:
    match = _NEED.fullmatch(need.strip())
    if match is None or "platform_system" in need:
        return None
    found = version_of(match[1])
    if found is None:
        return f"{match[1]} is not installed"
    for bound in (match[2] or "").split(","):
        if bound.startswith(">=") and number(found) < number(bound[2:]):
            return f"{match[1]} is {found} and has to be {bound}"
        if bound.startswith("<") and number(found) >= number(bound.lstrip("<=")):
            return f"{match[1]} is {found} and has to be {bound}"
    return None


def _imports() -> Iterator[Finding]:
    """Of all at once, and one by one where that fails: what breaks in a process of its own breaks nothing here."""
    found = {name: version for name in OPTIONAL if (version := version_of(name))}
    found |= {name: version for name in IMPORTED if (version := version_of(name))}
    together = _failure(found)
    for name in (*IMPORTED, *OPTIONAL):
        version = found.get(name)
        if version is None:
            yield _missing(name)
        elif together is not None and (why := _failure([name])) is not None:
            fix = f"pip install --force-reinstall {name}"
            yield problem(AREA, name, f"{version}, but importing it fails: {why}", fix)
        else:
            yield ok(AREA, name, version)


def _failure(names: Iterable[str]) -> str | None:
    """Why these cannot be imported together; None if they can."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {', '.join(names)}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "BITSANDBYTES_NOWELCOME": "1"},
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {IMPORT_SECONDS:.0f} s"
    if not done.returncode:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _missing(name: str) -> Finding:
    if name in OPTIONAL and not _built_for_cuda():
        return ok(AREA, name, "not installed; only CUDA needs it")
    return problem(AREA, name, "not installed", f"pip install {name}")


def _built_for_cuda() -> bool:
    import torch

    return torch.version.cuda is not None
