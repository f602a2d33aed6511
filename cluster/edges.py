"""The edges of a ring, seen from the driver: all of them at once, again whenever a stage was replaced."""

import socket
from collections.abc import Callable, Sequence
from typing import Any

import ray

from headrace.cluster.pipeline import gather
from headrace.cluster.processes import START_SECONDS
from headrace.cluster.stage_actor import Connection
from headrace.cluster.wire import encode
from headrace.runtime.interfaces import find_interface
from headrace.runtime.rendezvous import EDGE_SECONDS, RendezvousServer
from headrace.scheduler.errors import StageError

GIVE_UP_SECONDS = EDGE_SECONDS + 5.0
"""How long stages may take to stop waiting for another end when there is no store any more: those that know where
it is go on trying to reach it. A stage that still does when edges form anew would be taken for silent."""


class Edges:
    """Has stages find each other. `local`: all are on this machine, to which their
    traffic keeps.

    Else it goes over the `interface` of each machine, that of its address in the Ray cluster if none is
    named; this process listens at its own, on `port` (0: a free one). HeadraceError when it cannot.
    `check` is called while stages connect, and may raise StageLostError.
    """

    def __init__(
        self,
        *,
        local: bool,
        interface: str | None = None,
        port: int = 0,
        check: Callable[[], None],
    ) -> None:
        self._host = meeting_host(interface, local=local)
        self._server: RendezvousServer | None = None
        self._port, self._pinned = port, interface is not None
        self._interface = loopback() if local else interface or ""
        self._epoch = 0
        self._check = check

    def connect(self, actors: Sequence[Any]) -> None:
        """Open every edge, in place of those that stages have; no pass is under way.

        All are new, and of another epoch: an end that is left over can be mistaken for none of them.
        StageError when a stage dies or does not answer; then none waits for another any more.
        """
        self.close()
        self._server = RendezvousServer(self._host, self._port)
        connection = Connection(self._server.rendezvous(self._epoch), self._interface, self._pinned)
        self._epoch += 1
        refs = [actor.connect.remote(encode(connection)) for actor in actors]
        try:
            gather(refs, START_SECONDS, doing="connecting the stages", check=self._check)
        except StageError:
            self.close()
            ray.wait(refs, num_returns=len(refs), timeout=GIVE_UP_SECONDS)
            raise

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def meeting_host(interface: str | None, *, local: bool = False) -> str:
    """This machine's address at which stages find each other."""
    if local:
        return "127.0.0.1"
    if interface is None:
        return str(ray.util.get_node_ip_address())
    return find_interface(interface).address


def loopback() -> str:
    """The name of the loopback interface, to which an engine on one machine keeps its traffic."""
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else names[0]
