"""What lies between the nodes of a ring: measured before it is planned, and remembered for a day.

Of each pair of nodes two stages send hidden states to and fro, over the interface and by the library that edges
will use. Pairs that have no node in common are measured at the same time.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace.cluster.pipeline import gather
from headrace.cluster.processes import START_SECONDS
from headrace.cluster.stage_actor import Connection
from headrace.cluster.wire import decode, encode
from headrace.runtime.rendezvous import RendezvousServer
from headrace.scheduler.links import Hop, Links

log = logging.getLogger(__name__)

VERSION = 1
FRESH_SECONDS = 86400.0

Pair = tuple[int, int]


def rounds(count: int) -> Iterator[list[Pair]]:
    """All pairs of `count`, each once, in groups in which nobody is twice (as a tournament has them)."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        seats[1:] = [seats[-1], *seats[1:-1]]


class NetworkSpeed:
    """Measures ways between stages that meet at `host` and speak over the `interface` of that name or network,
    which they keep to if it is `pinned`. `check` is called while they do, and may raise StageLostError."""

    def __init__(
        self,
        host: str,
        port: int,
        interface: str,
        *,
        pinned: bool,
        device: str,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._host, self._port, self._check = host, port, check
        self._interface, self._pinned, self._device = interface, pinned, device

    def links(self, links: Links, actors: Sequence[Any], nodes: Sequence[str]) -> Links:
        """`links` with what lies between stages of different `nodes`. StageLostError when two of them do not
        reach each other."""
        names = list(dict.fromkeys(nodes))
        ends = [nodes.index(name) for name in names]
        known: dict[Pair, Hop] = {}
        for group in rounds(len(names)):
            missing = []
            for pair in group:
                hop = self._remembered(*(names[i] for i in pair))
                if hop is None:
                    missing.append(pair)
                else:
                    known[pair] = hop
            if missing:
                pairs = [(actors[ends[a]], actors[ends[b]]) for a, b in missing]
                for (a, b), hop in zip(missing, self._measure(pairs), strict=True):
                    known[a, b] = hop
                    self._remember(names[a], names[b], hop)
        for a, left in enumerate(nodes):
            for b, right in enumerate(nodes[:a]):
                if left != right:
                    one, other = sorted((names.index(left), names.index(right)))
                    links = links.with_pair(a, b, known[one, other])
        return links

    def _measure(self, pairs: Sequence[tuple[Any, Any]]) -> list[Hop]:
        server = RendezvousServer(self._host, self._port)
        try:
            refs = []
            for epoch, pair in enumerate(pairs):
                connection = Connection(server.rendezvous(epoch), self._interface, self._pinned)
                refs += [
                    actor.measure_link.remote(encode(connection), end, self._device)
                    for end, actor in enumerate(pair)
                ]
            doing = "measuring the network between nodes"
            done = gather(refs, START_SECONDS, doing=doing, check=self._check)
            found = [decode(payload, Hop) for payload in done]
        finally:
            server.close()
        return found[::2]

    def _file(self, a: str, b: str) -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        identity = f"{' '.join(sorted((a, b)))} {self._interface} {self._device}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Path(base) / "headrace" / f"link-{digest}.json"

    def _remembered(self, a: str, b: str) -> Hop | None:
        try:
            record = json.loads(self._file(a, b).read_text(encoding="utf-8"))
            is_fresh = 0 <= time.time() - record["measured"] < FRESH_SECONDS
            if record["version"] != VERSION or not is_fresh:
                return None
            return Hop(float(record["hop"]["seconds"]), float(record["hop"]["gbps"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: not usable (%s), measuring again", self._file(a, b), error)
            return None

    def _remember(self, a: str, b: str, hop: Hop) -> None:
        log.info("%s - %s: %.2f ms, %.3f GB/s", a, b, hop.seconds * 1e3, hop.gbps)
        file = self._file(a, b)
        record = {"version": VERSION, "measured": time.time(), "nodes": [a, b], "hop": asdict(hop)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(record), encoding="utf-8")
            temporary.replace(file)
        except OSError as error:
            log.warning("%s: cannot be written (%s), so the next run measures again", file, error)
