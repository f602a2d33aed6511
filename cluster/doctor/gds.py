"""GPUDirect Storage: whether a drive can be read straight to a GPU. Nothing depends on it."""

import os
from collections.abc import Iterator
from pathlib import Path

from headrace.cluster.doctor.drives import mount_of
from headrace.cluster.doctor.finding import Finding, NotChecked, ok, run_checks, unchecked, warn
from headrace.cluster.doctor.software import version_of
from headrace.runtime.streaming.kvikio_storage import gds_available

AREA = "GPUDirect Storage"
MODULE = Path("/proc/driver/nvidia-fs")
FILESYSTEMS = ("ext4", "xfs", "lustre", "gpfs", "beegfs", "wekafs", "nfs", "nfs4")
"""What NVIDIA's cuFile reads from directly, with its module or the filesystem's own part."""

KVIKIO = ("kvikio-cu13", "kvikio-cu12")


def gds(store: Path | None) -> Iterator[Finding]:
    checks = [
        ("kvikio", _kvikio),
        ("nvidia-fs", _module),
        ("filesystem", lambda: _filesystem(store)),
    ]
    yield from run_checks(AREA, checks)


def _kvikio() -> Iterator[Finding]:
    found = next((f"{name} {version}" for name in KVIKIO if (version := version_of(name))), None)
    if found is None:
        raise NotChecked("kvikio is not installed (pip install 'headrace[gpu]'); O_DIRECT is used")
    mode = os.environ.get("KVIKIO_COMPAT_MODE", "AUTO")
    if gds_available():
        if mode.upper() in ("ON", "TRUE", "1", "YES"):
            yield warn(
                AREA,
                "kvikio",
                f"{found} could read directly, but KVIKIO_COMPAT_MODE={mode}",
                "unset KVIKIO_COMPAT_MODE",
            )
        else:
            yield ok(AREA, "kvikio", f"{found}, reads directly")
    else:
        yield ok(AREA, "kvikio", f"{found}, in its compatibility mode: reads go through host RAM")


def _module() -> Iterator[Finding]:
    if not MODULE.exists():
        yield unchecked(AREA, "nvidia-fs", "the kernel module is not loaded; O_DIRECT is used")
        return
    version = MODULE / "version"
    text = version.read_text().strip().splitlines()[0] if version.exists() else "loaded"
    yield ok(AREA, "nvidia-fs", text)


def _filesystem(store: Path | None) -> Iterator[Finding]:
    if store is None:
        raise NotChecked("no store was given")
    kind = mount_of(store).kind
    fits = kind in FILESYSTEMS
    yield ok(AREA, "filesystem", f"{kind}, which {'can' if fits else 'cannot'} be read directly")
