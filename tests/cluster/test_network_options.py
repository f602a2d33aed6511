"""What cannot be of the network between stages is said before anything starts."""

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.network_options import check_network
from headrace.scheduler.errors import HeadraceError


def check(**given: Any) -> None:
    check_network(EngineOptions(Path(), **given))


@pytest.mark.parametrize("given", [{"interface": "eth0"}, {"rendezvous_port": 29500}])
def test_options_of_a_cluster_need_one(given: dict[str, Any]) -> None:
    with pytest.raises(HeadraceError, match="is of a cluster: give its --address"):
        check(**given)


def test_an_interface_that_this_machine_does_not_have() -> None:
    with pytest.raises(HeadraceError, match=r"no such interface.* lo \(127"):
        check(address="auto", interface="nowhere9")


def three_free_ports() -> int:
    """The middle one of three, below those that the kernel gives to whoever asks for any."""
    for port in random.sample(range(20_000, 32_000, 3), 100):
        with suppress(OSError), ExitStack() as held:
            for each in (port - 1, port, port + 1):
                held.enter_context(socket.create_server(("127.0.0.1", each)))
            return port
    raise AssertionError("no three free ports in a hundred tries")


def test_a_port_that_is_taken() -> None:
    port = three_free_ports()
    with socket.create_server(("127.0.0.1", port)):
        for given in (port, port - 1):  # pulses take the next one
            with pytest.raises(HeadraceError, match=f"port {port} of 127.0.0.1: Address"):
                check(address="auto", interface="127.0.0.1", rendezvous_port=given)
    check(address="auto", interface="127.0.0.1", rendezvous_port=port)
    check(address="auto")
