"""How the two ends of an edge find each other: a key-value store, and a process group of the two.

torch is imported when it is needed: a driver knows the names here before it has the time for that.
"""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from headrace.scheduler.errors import HeadraceError, StageLostError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


MEET_SECONDS = 120.0
"""How long an end may take to be there at all."""

EDGE_SECONDS = 15.0
"""How long the two ends of a Gloo edge may take to reach each other once both are there: where nothing comes
through, TCP asks ever less often, and a link that is back is found sooner by those who ask anew."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the two ends of every edge find each other; `epoch` separates generations of a ring."""

    host: str
    port: int
    epoch: int

    def client(self, timeout: timedelta) -> "dist.Store":
        """A connection to the store. RuntimeError when there is none, then and whenever it ends."""
        import torch.distributed as dist

        # A store that is closed already, TCPStore would ask for the better part of a minute.
        try:
            socket.create_connection((self.host, self.port), EDGE_SECONDS).close()
        except OSError as error:
            raise RuntimeError(
                f"nobody meets at {self.host}:{self.port} ({error.strerror or error})"
            ) from error
        return dist.TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout
        )

    def store(self, edge: tuple[int, int], timeout: timedelta) -> "dist.Store":
        """Where the ends of an edge find each other."""
        import torch.distributed as dist

        return dist.PrefixStore(f"{self.epoch}/{edge[0]}-{edge[1]}", self.client(timeout))


class RendezvousServer:
    """The key-value store behind a Rendezvous. It lives with the scheduler and binds one address."""

    def __init__(self, host: str, port: int = 0) -> None:
        """`port` 0 takes a free one. HeadraceError when the address cannot be had."""
        import torch.distributed as dist

        # Bound here because TCPStore by itself listens on every interface.
        listener = listen(host, port)
        self.host, self.port = host, int(listener.getsockname()[1])
        self._store: dist.Store | None = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def rendezvous(self, epoch: int) -> Rendezvous:
        return Rendezvous(self.host, self.port, epoch)

    def close(self) -> None:
        """Stop serving: edges that are open stay open, and whoever waits for another end fails at once."""
        self._store = None


def listen(host: str, port: int) -> socket.socket:
    """Where stages reach the driver. HeadraceError when the address cannot be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise HeadraceError(
            f"stages cannot reach the driver at {host}:{port}: {error.strerror or error}. Choose another"
            " --rendezvous-port (that and the next one are taken), or leave it out for free ones"
        ) from error


def edge_group(
    rendezvous: Rendezvous, edge: tuple[int, int], rank: int, device: "torch.device", interface: str
) -> Any:
    """The edge's own process group: rank 0 sends, rank 1 receives. Blocks until both ends exist.

    StageLostError when the other one does not come, or cannot be reached.
    """
    try:
        return _edge_group(rendezvous, edge, rank, device, interface)
    except RuntimeError as error:
        # Gloo begins with where in its source that was.
        said = str(error).splitlines()[0].rpartition("] ")[2].removesuffix("$1")
        over = f" over {interface}" if interface else ""
        raise StageLostError(
            f"stage {edge[rank]} on {socket.gethostname()} did not reach stage {edge[1 - rank]}{over}: {said}"
        ) from error


def _edge_group(
    rendezvous: Rendezvous, edge: tuple[int, int], rank: int, device: "torch.device", interface: str
) -> Any:
    import torch.distributed as dist

    store = rendezvous.store(edge, timedelta(seconds=MEET_SECONDS))
    if device.type == "cuda":
        # A dead peer must be an error of ours, not torch's watchdog ending this process.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", "120")
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking = 0
        group = dist.ProcessGroupNCCL(store, rank, 2, options)
        group.eager_connect_single_device(device)
        return group
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._timeout = timedelta(seconds=EDGE_SECONDS)
    gloo._devices = [
        dist.ProcessGroupGloo.create_device(interface=interface)
        if interface
        else dist.ProcessGroupGloo.create_default_device()
    ]
    store.set(f"here {rank}", "")
    store.wait([f"here {1 - rank}"])
    return _within(EDGE_SECONDS, lambda: dist.ProcessGroupGloo(store, rank, 2, gloo))


def _within(seconds: float, make: Callable[[], Any]) -> Any:
    """What `make` returns. RuntimeError when it takes longer: Gloo's end that is to be reached waits for five times
    as long as it is told, and is left to."""
    made: Future[Any] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except RuntimeError as error:
            made.set_exception(error)

    threading.Thread(target=work, name="headrace-edge", daemon=True).start()
    try:
        return made.result(seconds)
    except TimeoutError as error:
        raise RuntimeError(f"nothing came within {seconds:.0f} s") from error
