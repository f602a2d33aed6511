"""Hidden states between two stages: the product's own links, inside one machine and between nodes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from headrace.cluster.doctor.finding import Finding, NotChecked, ok, run_checks

AREA = "links"
ROW_BYTES, ROWS = 16384, 64
"""64 rows are a MiB."""

ROUNDS = 20


def links() -> Iterator[Finding]:
    """Inside this machine."""
    yield from run_checks(AREA, [("Gloo", _gloo), ("NCCL", _nccl)])


def _nccl() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        raise NotChecked("this torch sees no GPU")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield ok(AREA, "NCCL", f"version {version}")


def _gloo() -> Iterator[Finding]:
    seconds = {rows: loopback_hop(rows) for rows in (1, ROWS)}
    yield ok(AREA, "Gloo", "over the loopback " + described(seconds[1], seconds[ROWS]))


def described(small: float, large: float) -> str:
    """Of the seconds of a row, and of a MiB."""
    gbps = ROW_BYTES * ROWS / large / 1e9
    return f"{small * 1e6:.0f} us for 16 KiB, {large * 1e6:.0f} us for 1 MiB ({gbps:.2f} GB/s), one way"


def loopback_hop(rows: int) -> float:
    """Seconds of one way between two threads. Raises StageError."""
    from headrace.cluster.edges import loopback
    from headrace.runtime.rendezvous import RendezvousServer

    server = RendezvousServer("127.0.0.1")
    try:
        with ThreadPoolExecutor(2) as threads:
            place = server.rendezvous(0), loopback()
            ends = [threads.submit(_volley, stage, rows, *place) for stage in range(2)]
            return max(end.result() for end in ends)
    finally:
        server.close()


def _volley(stage: int, rows: int, rendezvous: object, interface: str) -> float:
    import torch

    from headrace.runtime.link_speed import LinkEnd
    from headrace.runtime.rendezvous import Rendezvous

    assert isinstance(rendezvous, Rendezvous)
    width = ROW_BYTES // torch.bfloat16.itemsize
    place = rendezvous, torch.device("cpu"), interface
    with LinkEnd(stage, *place, rows=rows, width=width) as link:
        link.volley(rows, 3)
        return link.volley(rows, ROUNDS)[0]
