"""Ports, interfaces and who listens: of this machine, whether or not Ray runs on it."""

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from headrace.cluster.doctor.finding import (
    Finding,
    NotChecked,
    ok,
    problem,
    run_checks,
    unchecked,
    warn,
)

AREA = "network"
PORTS = {8000: "headrace serve", 6379: "Ray's GCS", 8265: "Ray's dashboard", 10001: "Ray's clients"}
RAY_PROGRAMS = ("gcs_server", "raylet", "dashboard", "ray::")
CONNECT_SECONDS = 5.0
_HARMLESS = "/ray.rpc.NodeInfoGcsService/CheckAlive"


@dataclass(frozen=True, slots=True)
class Listener:
    """Who listens at which address. `program` is "" for another user's process."""

    address: str
    port: int
    program: str

    @property
    def is_ray(self) -> bool:
        return self.program.startswith(RAY_PROGRAMS)


def listeners() -> list[Listener]:
    """All TCP listeners of this machine. Raises NotChecked where they cannot be seen."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied as error:
        raise NotChecked("this user may not see connections") from error
    return [
        Listener(one.laddr.ip, one.laddr.port, _program(one.pid))
        for one in connections
        if one.status == psutil.CONN_LISTEN
    ]


def _program(pid: int | None) -> str:
    if pid is None:
        return ""
    try:
        process = psutil.Process(pid)
        words = process.cmdline()
    except psutil.Error:
        return ""
    script = next((Path(word).stem for word in words if word.endswith("dashboard.py")), "")
    return script or Path(words[0]).name if words else str(process.name())


def network(*, in_cluster: bool) -> Iterator[Finding]:
    checks = [("interface", lambda: _interface(in_cluster=in_cluster))]
    if not in_cluster:
        checks.append(("ports", _ports))
    checks.append(("listening", _listening))
    yield from run_checks(AREA, checks)


def _ports() -> Iterator[Finding]:
    """What the product and Ray take by default; another one can be chosen for each."""
    taken = {one.port: one for one in listeners()}
    used = [
        f"{port} ({what}) by {taken[port].program or 'another user'}"
        for port, what in PORTS.items()
        if port in taken and not taken[port].is_ray
    ]
    names = ", ".join(f"{port} ({what})" for port, what in PORTS.items())
    if used:
        yield warn(
            AREA,
            "ports",
            f"taken: {', '.join(used)}",
            "choose others: headrace serve --port, ray start --port and --dashboard-port",
        )
    else:
        yield ok(AREA, "ports", f"free or Ray's: {names}")


@dataclass(frozen=True, slots=True)
class Interface:
    """The one of this host's name, over which Gloo connects to other nodes. `mbps` 0 is unknown."""

    name: str
    address: str
    mbps: int
    mtu: int


def own_interface() -> Interface:
    """Raises NotChecked where the host's name leads to no address of its own."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise NotChecked(f"the host name {name} has no address ({error})") from error
    stats = psutil.net_if_stats()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses) or (
            interface == "lo" and address.startswith("127.")
        ):
            found = stats.get(interface)
            return Interface(
                interface, address, found.speed if found else 0, found.mtu if found else 0
            )
    raise NotChecked(f"the host name {name} leads to {address}, which no interface here has")


def _interface(*, in_cluster: bool) -> Iterator[Finding]:
    found = own_interface()
    speed = f", {found.mbps / 1000:.0f} Gbit/s" if found.mbps > 0 else ""
    text = f"{found.name} ({found.address}), MTU {found.mtu}{speed}"
    if in_cluster and ipaddress.ip_address(found.address).is_loopback:
        yield warn(
            AREA,
            "interface",
            f"{text}: this host's name leads to the loopback, where other nodes cannot reach it",
            "have the host's name lead to its address on the cluster's network (/etc/hosts)",
        )
    elif in_cluster and 0 < found.mbps < 10_000:
        yield warn(
            AREA,
            "interface",
            f"{text}: hidden states of large passes wait for it",
            "connect the nodes by 10 Gbit/s or more",
        )
    else:
        yield ok(AREA, "interface", text)


def _listening() -> Iterator[Finding]:
    """Whoever reaches Ray's ports without a token runs code here."""
    found = [one for one in listeners() if one.is_ray]
    if not found:
        yield ok(AREA, "listening", "no Ray process listens on this machine")
        return
    yield from judged(found, token=asks_for_token(found))


def judged(found: Sequence[Listener], *, token: bool | None) -> Iterator[Finding]:
    """What Ray's listeners are open to; `token` says whether they ask for one, None that nobody knows."""
    reachable = [one for one in found if not ipaddress.ip_address(one.address).is_loopback]
    places = sorted({f"{one.program} at {one.address}" for one in reachable})
    text = ", ".join(places) or "Ray listens on the loopback only"
    public = [*filter(None, map(_public, reachable))]
    fix = (
        "export RAY_AUTH_MODE=token on every node before ray start (ray get-auth-token --generate makes one),"
        " and let only the cluster's network in"
    )
    if not reachable or token:
        yield ok(AREA, "listening", f"{text}; a token is asked for" if token else text)
    elif token is None:
        yield unchecked(
            AREA, "listening", f"{text}; whether it asks for a token cannot be seen here"
        )
    elif public:
        yield problem(
            AREA,
            "listening",
            f"{text}, open to {', '.join(sorted(set(public)))} without a token",
            fix,
        )
    else:
        yield warn(AREA, "listening", f"{text}, without a token", fix)


def _public(listener: Listener) -> str | None:
    """The address that others on the internet may reach it at; None if there is none."""
    address = ipaddress.ip_address(listener.address)
    if address.is_global:
        return listener.address
    if not address.is_unspecified:
        return None
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                found = ipaddress.ip_address(one.address.partition("%")[0])
                if found.is_global:
                    return str(found)
    return None


def asks_for_token(found: Sequence[Listener]) -> bool | None:
    """Whether all of Ray's GCS that listen here refuse a call without a token; where there is none, whether
    Ray's processes were started so. None where nobody can tell."""
    servers = [one for one in found if one.program == "gcs_server"]
    answers = {
        refuses(_reachable(one.address), one.port) for one in servers
    } or _started_with_token()
    if False in answers:
        return False
    return True if answers == {True} else None


def _reachable(address: str) -> str:
    """An address at which this machine itself reaches who listens there."""
    return {"::": "[::1]", "0.0.0.0": "127.0.0.1"}.get(address, address)


def refuses(host: str, port: int) -> bool | None:
    """Whether a GCS refuses a harmless call that brings no token; None if nothing there understands it."""
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            channel.unary_unary(_HARMLESS)(b"", timeout=CONNECT_SECONDS)
        except grpc.RpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            return True if refused else None
    return False


def _started_with_token() -> set[bool]:
    modes = set()
    for process in psutil.process_iter():
        try:
            if process.name().startswith("raylet"):
                modes.add(process.environ().get("RAY_AUTH_MODE", "").lower() == "token")
        except (psutil.Error, OSError):  # another user's
            continue
    return modes


def reach(address: str, port: int) -> str | None:
    """Why nothing answers there; None if something does."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
