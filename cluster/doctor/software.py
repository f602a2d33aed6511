"""Python, Headrace and what it stands on: importable, and as new as it has to be."""

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

from headrace import __version__
from headrace.cluster.doctor.finding import Finding, NotChecked, ok, problem, run_checks, warn

AREA = "software"
IMPORTED = ("torch", "transformers", "bitsandbytes", "ray")
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
    checks = [
        ("Python", _python),
        ("requirements", _requirements),
        *((name, lambda name=name: _import(name)) for name in IMPORTED),
        ("triton", _triton),
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


def _import(name: str) -> Iterator[Finding]:
    """In a process of its own: what breaks there breaks nothing here."""
    version = version_of(name)
    if version is None:
        yield problem(AREA, name, "not installed", f"pip install {name}")
        return
    code = f"import {name}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "BITSANDBYTES_NOWELCOME": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=IMPORT_SECONDS,
        check=False,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield problem(
            AREA,
            name,
            f"{version}, but importing it fails: {last}",
            f"pip install --force-reinstall {name}",
        )
    else:
        yield ok(AREA, name, version)


def _triton() -> Iterator[Finding]:
    version = version_of("triton")
    if version is not None:
        yield from _import("triton")
        return
    import torch

    if torch.version.cuda:
        yield problem(
            AREA, "triton", "not installed, and CUDA kernels need it", "pip install triton"
        )
    else:
        yield ok(AREA, "triton", "not installed; only CUDA needs it")


def compute() -> Iterator[Finding]:
    """torch's threads and what they are told."""
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    told = os.environ.get("OMP_NUM_THREADS")
    if told is not None and threads < cores:
        yield warn(
            AREA,
            "threads",
            f"OMP_NUM_THREADS={told} on {cores} cores",
            "unset OMP_NUM_THREADS: each stage then takes its share of the cores",
        )
    else:
        yield ok(AREA, "threads", f"{threads} of torch's on {cores} cores")
