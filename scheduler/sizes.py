"""Bytes as people write them."""

import math

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_size(size: int, *, up: bool = False) -> str:
    """`size` bytes in three digits, as in "5.21 MiB"; `up` never shows less than there is."""
    power = min(max(size.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    if power == 0:
        return f"{size} B"
    value = size / 1024**power
    digits = 2 if value < 10 else 1 if value < 100 else 0
    if up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {UNITS[power]}"
