"""Network interfaces of this machine, by name or by the network that they are in."""

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True, slots=True)
class Interface:
    """One of this machine's, with one of its IPv4 addresses."""

    name: str
    address: str


def find_interface(wanted: str) -> Interface:
    """The interface of that name ("eth1"), with that address, or in that network ("10.0.0.0/24").

    A network is the same on machines whose interfaces have different names. IPv4 only. HeadraceError
    when there is none here.
    """
    return choose(wanted, _interfaces())


def choose(wanted: str, interfaces: Mapping[str, Sequence[str]]) -> Interface:
    """As `find_interface`, of `interfaces`: IPv4 addresses by name."""
    if wanted in interfaces:
        return Interface(wanted, interfaces[wanted][0])
    network = _network(wanted)
    for name, addresses in interfaces.items():
        for address in addresses:
            if network is not None and ipaddress.ip_address(address) in network:
                return Interface(name, address)
    there = ", ".join(f"{name} ({', '.join(known)})" for name, known in interfaces.items())
    raise HeadraceError(
        f"--interface {wanted}: {socket.gethostname()} has no such interface, and none in such a"
        f" network. It has {there}"
    )


def bind_nccl(interface: Interface) -> None:
    """Have NCCL keep to the interface: for this process, before its first communicator."""
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface.name}"  # "=": this name, not a prefix


def _interfaces() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [a.address for a in addresses if a.family == socket.AF_INET]
        if own:
            found[name] = own
    return found


def _network(wanted: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        return None
