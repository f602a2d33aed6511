"""Interfaces by name and network, and edges and rendezvous that keep to the one that was chosen."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch

from headrace.runtime.interfaces import Interface, choose, find_interface
from headrace.runtime.link import ReceiveRing, connect
from headrace.runtime.rendezvous import RendezvousServer
from headrace.scheduler.errors import HeadraceError

MACHINE = {"lo": ["127.0.0.1"], "eth0": ["192.0.2.7", "198.51.100.7"], "eth1": ["10.0.0.7"]}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("eth0", Interface("eth0", "192.0.2.7")),
        ("10.0.0.0/24", Interface("eth1", "10.0.0.7")),
        ("198.51.100.0/24", Interface("eth0", "198.51.100.7")),
        ("192.0.2.7", Interface("eth0", "192.0.2.7")),
    ],
)
def test_an_interface_is_found_by_name_network_and_address(wanted: str, found: Interface) -> None:
    assert choose(wanted, MACHINE) == found


@pytest.mark.parametrize("wanted", ["eth", "10.0.1.0/24", "fd00::/64", ""])
def test_what_is_not_there_is_an_error_that_says_what_is(wanted: str) -> None:
    with pytest.raises(HeadraceError, match=r"eth0 \(192.0.2.7, 198.51.100.7\), eth1"):
        choose(wanted, MACHINE)


def test_this_machine_has_its_loopback_interface() -> None:
    assert find_interface("127.0.0.0/8").address == "127.0.0.1"


def test_a_rendezvous_is_at_the_port_that_was_asked_for_or_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        with pytest.raises(
            HeadraceError,
            match=f"127.0.0.1:{port}: Address already in use .*Choose another",
        ):
            RendezvousServer("127.0.0.1", port)
    server = RendezvousServer("127.0.0.1", port)
    try:
        assert server.rendezvous(0).port == port
        assert ("127.0.0.1", port) in listening()
    finally:
        server.close()


def test_a_port_can_be_had_again_at_once() -> None:
    """As when stages are connected anew while ends of theirs still know the store before."""
    first = RendezvousServer("127.0.0.1")
    client = first.rendezvous(0).store((0, 1), timedelta(seconds=5))
    client.set("a", "b")
    port = first.port
    first.close()
    second = RendezvousServer("127.0.0.1", port)
    try:
        assert not second.rendezvous(0).store((0, 1), timedelta(seconds=5)).check(["a"])
    finally:
        second.close()


def test_an_edge_keeps_to_its_interface() -> None:
    """On one that is not the loopback, where there is one: what the ends listen at is its address alone."""
    others = [name for name in psutil.net_if_stats() if name != "lo" and _has_address(name)]
    interface = find_interface(others[0] if others else "lo")
    server = RendezvousServer(interface.address)
    before = listening()

    def open_end(stage: int) -> object:
        ring = ReceiveRing(2, 4, 8, torch.float32, torch.device("cpu"))
        return connect(
            stage,
            [(0, 1)],
            server.rendezvous(epoch=0),
            ring=ring,
            device=torch.device("cpu"),
            deadline=20.0,
            interface=interface.name,
        )

    try:
        with ThreadPoolExecutor(2) as threads:
            (senders, _), (_, receivers) = threads.map(open_end, range(2))  # type: ignore[misc]
        x = torch.arange(32, dtype=torch.float32).view(4, 8)
        senders[1].send(x)
        assert torch.equal(receivers[0].recv(4), x)
        assert {host for host, _ in listening() - before} == {interface.address}
        senders[1].close()
        receivers[0].close()
    finally:
        server.close()


def listening() -> set[tuple[str, int]]:
    """Where this process listens."""
    found = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def _has_address(name: str) -> bool:
    return any(a.family == socket.AF_INET for a in psutil.net_if_addrs()[name])
