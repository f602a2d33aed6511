"""Layers as users write them: "0-3,7"."""

from collections.abc import Collection

from headrace.scheduler.errors import HeadraceError


def ranges(layers: Collection[int]) -> str:
    """(0, 1, 2, 7) -> "0-2,7"."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_ranges(text: str, count: int) -> tuple[int, ...]:
    """ "0-2,7" -> (0, 1, 2, 7), of a model with `count` layers. HeadraceError for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise HeadraceError(f"layers are written as in 0-3,7, not {text!r}")
        if int(last) >= count:
            raise HeadraceError(f"there is no layer {last}: the model has layers 0 to {count - 1}")
        found.update(range(int(first), int(last) + 1))
    return tuple(sorted(found))
