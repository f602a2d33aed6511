"""What a user may say of the network between stages, and what is wrong with it."""

import socket

from headrace.cluster.engine_options import EngineOptions
from headrace.runtime.interfaces import find_interface
from headrace.scheduler.errors import HeadraceError


def check_network(options: EngineOptions) -> None:
    """HeadraceError for what cannot be, before anything starts: loading a model takes long."""
    if options.from_peers and options.cold is not None:
        raise HeadraceError(
            "--from-peers and --cold both say where nodes fetch what they lack: give one of them"
        )
    if options.address is None:
        _check_absent(options)
        return
    host = "" if options.interface is None else find_interface(options.interface).address
    if options.rendezvous_port:
        for port in (options.rendezvous_port, options.rendezvous_port + 1):
            _check_free(host, port)


def _check_absent(options: EngineOptions) -> None:
    for name, given in (
        ("--interface", options.interface is not None),
        ("--rendezvous-port", options.rendezvous_port != 0),
        ("--from-peers", options.from_peers),
    ):
        if given:
            raise HeadraceError(
                f"{name} is of a cluster: give its --address, too, or leave it out: without one all"
                " stages are on this machine and speak over its loopback interface"
            )


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise HeadraceError(
            f"port {port}{host and f' of {host}'}: {error.strerror or error}. Choose another --rendezvous-port"
            " (that and the next one are taken), or leave it out for free ones"
        ) from error
