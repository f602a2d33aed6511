"""The processor: what stages on CPUs compute with, and whether it may run as fast as it can."""

import os
from collections.abc import Iterator
from pathlib import Path

from headrace.cluster.doctor.finding import Finding, NotChecked, ok, run_checks, warn

AREA = "CPU"
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
GOVERNORS = Path("/sys/devices/system/cpu")


def cpu(*, has_gpu: bool) -> Iterator[Finding]:
    checks = [
        ("cores", _cores),
        ("instructions", lambda: _flags(has_gpu=has_gpu)),
        ("governor", _governor),
    ]
    yield from run_checks(AREA, checks)


def _cores() -> Iterator[Finding]:
    usable, machine = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    load = os.getloadavg()[0]
    text = f"{usable} of {machine} may be used, load {load:.1f}"
    if load > usable:
        yield warn(
            AREA,
            "cores",
            f"{text}: others work here, and what is measured now is too slow",
            "end other programs, and run headrace doctor again",
        )
    else:
        yield ok(AREA, "cores", text)


def flags(cpuinfo: str) -> frozenset[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _flags(*, has_gpu: bool) -> Iterator[Finding]:
    found = flags(Path("/proc/cpuinfo").read_text())
    if not found:
        raise NotChecked("/proc/cpuinfo has no flags")
    has = [flag for flag in ("avx2", "avx512f", *BF16_FLAGS) if flag in found]
    text = ", ".join(has) or "none of those that count"
    if has_gpu or found.intersection(BF16_FLAGS):
        yield ok(AREA, "instructions", text)
    else:
        yield warn(
            AREA,
            "instructions",
            f"{text}; no AVX-512 bf16, which fast decodes of 4-bit weights on CPUs need",
            "compute in --dtype float32 here, or use a CPU with AVX-512 bf16 (Zen 4, Cooper Lake or later)",
        )


def _governor() -> Iterator[Finding]:
    files = sorted(GOVERNORS.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    if not files:
        raise NotChecked("the kernel shows none, as in most virtual machines")
    kinds = {file.read_text().strip() for file in files}
    text = ", ".join(sorted(kinds))
    if kinds & {"powersave", "ondemand", "conservative"} and not _driver_is_own(files[0]):
        yield warn(AREA, "governor", text, "sudo cpupower frequency-set -g performance")
    else:
        yield ok(AREA, "governor", text)


def _driver_is_own(file: Path) -> bool:
    """The processors' own drivers are as fast as they can under load with "powersave", too."""
    driver = file.with_name("scaling_driver")
    return driver.exists() and driver.read_text().strip() in ("intel_pstate", "amd-pstate-epp")
