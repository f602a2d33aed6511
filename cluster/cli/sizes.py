"""Sizes and durations on the command line: "4MiB", "600 MB", "0"; "90min", "12h"."""

import re
from decimal import Decimal

from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

__all__ = ["format_size", "parse_duration", "parse_size"]

UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}

SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}

PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes. MB is 1000 x 1000, MiB 1024 x 1024, a bare number bytes. Raises HeadraceError."""
    match = PATTERN.fullmatch(text)
    unit = match[2].lower() if match else None
    if match is None or unit not in UNITS:
        raise HeadraceError(f"{text!r} is not a size: write 600MB, 4MiB, 1.5GiB or 0")
    return int(Decimal(match[1]) * UNITS[unit])


def parse_duration(text: str) -> float:
    """Seconds. A bare number is seconds, too. Raises HeadraceError."""
    match = PATTERN.fullmatch(text)
    unit = match[2].lower() if match else None
    if match is None or unit not in SECONDS:
        raise HeadraceError(f"{text!r} is not a duration: write 30s, 90min, 12h or 7d")
    return float(Decimal(match[1]) * SECONDS[unit])
