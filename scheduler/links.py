"""How stages reach each other: within a node one way, between nodes often a slower one."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.scheduler.inputs import DeviceProfile


@dataclass(frozen=True, slots=True)
class Hop:
    """One way between two stages: seconds until a small message is there, and GB/s after that."""

    seconds: float
    gbps: float


@dataclass(frozen=True, slots=True)
class Links:
    """`hops[a][b]` is the way from stage a to stage b."""

    hops: tuple[tuple[Hop, ...], ...]

    @classmethod
    def of(
        cls,
        profiles: Sequence[DeviceProfile],
        nodes: Sequence[str] | None = None,
        network: Sequence[Hop] = (),
    ) -> "Links":
        """By the profiles of both ends, the weaker of which decides.

        With `nodes`, the node of each stage, and what `network` says of each stage's node, the way
        between stages of different nodes is the slower one of both networks'.
        """
        own = [Hop(profile.hop_seconds, profile.link_gbps) for profile in profiles]
        stages = range(len(own))

        def between(a: int, b: int) -> Hop:
            apart = nodes is not None and nodes[a] != nodes[b]
            ends = network if apart and network else own
            return _weaker(ends[a], ends[b])

        return cls(tuple(tuple(between(a, b) for b in stages) for a in stages))

    def between(self, source: int, target: int) -> Hop:
        return self.hops[source][target]

    def with_pair(self, a: int, b: int, hop: Hop) -> "Links":
        """The same but for the two stages' ways to each other."""
        rows = [list(row) for row in self.hops]
        rows[a][b] = rows[b][a] = hop
        return Links(tuple(tuple(row) for row in rows))


def _weaker(a: Hop, b: Hop) -> Hop:
    return Hop(max(a.seconds, b.seconds), min(a.gbps, b.gbps))
