"""How much a layer's error becomes at the model's end."""

import math
import re

Kind = frozenset[str]
"""Matrices that do the same in different layers: names with * for numbers."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kind_of(names: tuple[str, ...]) -> Kind:
    return frozenset(_NUMBER.sub("*", name) for name in names)


class Factors:
    """c = D / e by layer and kind: D a divergence in nats, e the squared relative error that it came from."""

    def __init__(self) -> None:
        self._found: dict[Kind, dict[int, float]] = {}

    def add(self, layer: int, kind: Kind, kld: float, error: float) -> None:
        """What makes no difference says nothing."""
        if kld > 0 and error > 0:
            self._found.setdefault(kind, {})[layer] = kld / error

    def at(self, layer: int, kind: Kind) -> float:
        """Between layers that are known the logarithm is interpolated; outside, the nearest one counts. 0 where nothing
        of that kind made a difference."""
        known = self._found.get(kind, {})
        below = max((at for at in known if at <= layer), default=None)
        above = min((at for at in known if at >= layer), default=None)
        if below is None or above is None:
            nearest = above if below is None else below
            return 0.0 if nearest is None else known[nearest]
        if below == above:
            return known[below]
        share = (layer - below) / (above - below)
        return math.exp((1 - share) * math.log(known[below]) + share * math.log(known[above]))
