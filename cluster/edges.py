"""The edges of a ring, seen from the driver: all of them at once, again whenever a stage was replaced."""

import socket
from collections.abc import Sequence
from typing import Any

import ray

from headrace.cluster.pipeline import gather
from headrace.cluster.processes import START_SECONDS
from headrace.cluster.stage_actor import Connection
from headrace.cluster.wire import encode
from headrace.runtime.interfaces import find_interface
from headrace.runtime.rendezvous import RendezvousServer


class Edges:
    """Has stages find each other. `local`: all are on this machine, to which their traffic keeps.

    Else it goes over the `interface` of each machine, that of its address in the Ray cluster if none is
    named; this process listens at its own, on `port` (0: a free one). HeadraceError when it cannot.
    """

    def __init__(self, *, local: bool, interface: str | None = None, port: int = 0) -> None:
        if local:
            host = "127.0.0.1"
        elif interface is None:
            host = ray.util.get_node_ip_address()
        else:
            host = find_interface(interface).address
        self._server = RendezvousServer(host, port)
        self._interface = loopback() if local else interface or ""
        self._pinned = interface is not None
        self._epoch = 0

    def connect(self, actors: Sequence[Any]) -> None:
        """Open every edge, in place of those that stages have; no pass is under way.

        All are new, and of another epoch: an end that is left over can be mistaken for none of them.
        StageError when a stage dies or does not answer.
        """
        connection = Connection(self._server.rendezvous(self._epoch), self._interface, self._pinned)
        self._epoch += 1
        refs = [actor.connect.remote(encode(connection)) for actor in actors]
        gather(refs, START_SECONDS, doing="connecting the stages")

    def close(self) -> None:
        self._server.close()


def loopback() -> str:
    """The name of the loopback interface, to which an engine on one machine keeps its traffic."""
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else names[0]
