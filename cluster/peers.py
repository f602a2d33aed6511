"""Nodes of the cluster that give their store's files to those that lack them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.runtime.cold.receive import PeerLostError, files_of

READERS = 8
"""Reads of a node's store at once: several nodes may ask."""

ANSWER_SECONDS = 120.0


class StorePeer:
    """Reads a node's store for others."""

    def __init__(self, path: str, digest: str) -> None:
        self._path, self._digest = Path(path), digest

    def files(self) -> dict[str, int]:
        return files_of(self._path, self._digest)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        with (self._path / Path(name).name).open("rb", buffering=0) as stream:
            return os.pread(stream.fileno(), nbytes, offset)


class Peers:
    """A StorePeer on every node that lives, until it is closed."""

    def __init__(self, path: Path, digest: str) -> None:
        peer = ray.remote(num_cpus=0, max_concurrency=READERS)(StorePeer)
        self.actors: list[Any] = [
            peer.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                name=f"store of {node['NodeManagerHostname']} ({node['NodeID'][:12]}), {path.name}",
                namespace=f"headrace-peers-{os.getpid()}-{id(self)}",
            ).remote(str(path), digest)
            for node in ray.nodes()
            if node["Alive"]
        ]

    def close(self) -> None:
        while self.actors:
            ray.kill(self.actors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RayPeer:
    """A StorePeer as a stage sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def files(self) -> Mapping[str, int]:
        found: Mapping[str, int] = self._get(self._actor.files.remote())
        return found

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        piece: bytes = self._get(self._actor.read.remote(name, offset, nbytes))
        return piece

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=ANSWER_SECONDS)
        except (RayError, TimeoutError) as error:
            raise PeerLostError(str(error)) from error


def ray_peers(actors: Sequence[Any]) -> list[RayPeer]:
    return [RayPeer(actor) for actor in actors]
