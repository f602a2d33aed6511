"""What cannot be of the network between stages is said before anything starts."""

import socket
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


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for given in (port, port - 1):  # pulses take the next one
            with pytest.raises(HeadraceError, match=f"port {port} of 127.0.0.1: Address"):
                check(address="auto", interface="127.0.0.1", rendezvous_port=given)
    check(address="auto", interface="127.0.0.1", rendezvous_port=port)
    check(address="auto")
