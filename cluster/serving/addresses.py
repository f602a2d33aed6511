"""Where a server may be reached, and how it is protected there."""

import ipaddress
import socket
import ssl
from pathlib import Path

from headrace.scheduler.errors import HeadraceError

UNREAD_SECONDS = 60
"""After which the kernel cuts off a client that takes nothing of what it was sent, though it may say that
it lives."""


def check_protected(
    host: str, api_keys: Path | None, tls_cert: Path | None, *, insecure: bool
) -> None:
    """HeadraceError when others could reach a server unprotected."""
    if insecure or _is_local(host):
        return
    lacking = [] if api_keys else ["--api-keys FILE (`headrace serve-key` makes one)"]
    if not tls_cert:
        lacking.append("--tls-cert and --tls-key")
    if lacking:
        raise HeadraceError(
            f"--host {host} lets other machines in: give {' and '.join(lacking)}, or"
            " --insecure where something else protects the server"
        )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_tls(cert: Path | None, key: Path | None) -> None:
    """HeadraceError for a certificate and a key that cannot be used together."""
    if (cert is None) != (key is None):
        raise HeadraceError("--tls-cert and --tls-key go together: give both")
    if cert is None or key is None:
        return
    try:
        # With a password, which is wrong: else one would be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise HeadraceError(
            f"cannot use --tls-cert {cert} with --tls-key {key}: {error.strerror or error}"
        ) from error


def address(bound: socket.socket) -> str:
    """HOST:PORT."""
    host, port = bound.getsockname()[:2]
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """Take an address. HeadraceError when it cannot be had."""
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by what it accepts.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        made.bind(address)
        return made
    except OSError as error:
        if made is not None:
            made.close()
        raise HeadraceError(
            f"cannot serve at --host {host} {option} {port}: {error.strerror or error}"
        ) from error
