"""A Ray cluster: each node by itself, what has to be alike on all of them, and the ways between them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.cluster.bench.hops import HopActor
from headrace.cluster.doctor.finding import (
    Finding,
    NodeReport,
    NotChecked,
    Subject,
    ok,
    problem,
    run_checks,
    unchecked,
    warn,
)
from headrace.cluster.doctor.hop import ROWS, described
from headrace.cluster.doctor.network import reach, refuses
from headrace.cluster.doctor.node import look
from headrace.cluster.edges import meeting_host
from headrace.cluster.pipeline import gather
from headrace.cluster.processes import ray_cluster
from headrace.cluster.wire import decode, encode
from headrace.runtime.interfaces import bind_nccl, find_interface
from headrace.runtime.rendezvous import RendezvousServer

AREA = "cluster"
NODE_SECONDS = 240.0
PAIR_SECONDS = 90.0
SLOW_MIB = 1e-3
"""Seconds of a MiB: slower than 1 GB/s, a pass of a few thousand tokens waits for its hops."""

CLOCK_SECONDS = 0.5
PINGS = 5


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    name: str
    address: str
    ports: tuple[int, ...]
    has_gpu: bool


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """Findings of nodes by their names, and those that are of all of them."""

    nodes: dict[str, tuple[Finding, ...]]
    findings: tuple[Finding, ...]


class LinkActor(HopActor):
    """One end of links to other nodes, over the interface that stages would take if they were told `interface`."""

    def __init__(self, device: str, interface: str | None) -> None:
        super().__init__(device)
        self._interface = find_interface(interface or ray.util.get_node_ip_address())
        if interface is not None:
            bind_nccl(self._interface)

    def interface(self) -> str:
        return f"{self._interface.name} ({self._interface.address})"

    def meet(self, stage: int, host: str, port: int, epoch: int) -> None:
        """As `connect`, over that interface."""
        self.connect(stage, host, port, self._interface.name, epoch)


def nodes() -> list[Node]:
    """Those that are alive, by name."""
    alive = [one for one in ray.nodes() if one["Alive"]]
    names = [one["NodeManagerHostname"] for one in alive]
    found = [
        Node(
            id=one["NodeID"],
            # Several nodes of one machine, or containers of one image, may share a name.
            name=f"{one['NodeManagerHostname']}"
            if names.count(one["NodeManagerHostname"]) == 1
            else f"{one['NodeManagerHostname']} {one['NodeID'][:8]}",
            address=one["NodeManagerAddress"],
            ports=(one["NodeManagerPort"], one["ObjectManagerPort"]),
            has_gpu=one["Resources"].get("GPU", 0) > 0,
        )
        for one in alive
    ]
    return sorted(found, key=lambda node: node.name)


def look_at_cluster(subject: Subject, address: str, interface: str | None = None) -> ClusterReport:
    """Minutes on a large one. Links are those over the network `interface` of that name or network. Raises
    HeadraceError when it cannot be joined, or this machine has no such interface."""
    if interface is not None:
        find_interface(interface)
    with ray_cluster(1, address):
        found = nodes()
        answers = _ask_each(found, subject)
        reports = {name: answer for name, answer in answers.items() if not isinstance(answer, str)}
        findings = [*_absent(answers), *_alike(reports)]
        checks = [
            ("token", partial(_token, ray.get_runtime_context().gcs_address)),
            ("ports", partial(_ports, found)),
            ("clocks", partial(_clocks, found)),
        ]
        findings += run_checks(AREA, checks)
        findings += _links(found, interface)
    return ClusterReport({name: one.findings for name, one in reports.items()}, tuple(findings))


def on_node(node: Node, work: Any, **options: Any) -> Any:
    """A remote function or class on that node and no other."""
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(work).options(scheduling_strategy=strategy, **{"num_cpus": 0, **options})


def _look(store: str | None, kv_directory: str | None, temporary: str | None) -> bytes:
    paths = (None if path is None else Path(path) for path in (store, kv_directory, temporary))
    return encode(look(Subject(*paths), in_cluster=True))


def _ask_each(found: Sequence[Node], subject: Subject) -> dict[str, NodeReport | str]:
    """What each node's task answered, or why it did not."""
    paths = subject.store, subject.kv_directory, subject.temporary
    texts = [None if path is None else str(path) for path in paths]
    refs = {node.name: on_node(node, _look, max_retries=0).remote(*texts) for node in found}
    deadline = time.monotonic() + NODE_SECONDS
    answers: dict[str, NodeReport | str] = {}
    for name, ref in refs.items():
        try:
            payload = ray.get(ref, timeout=max(1.0, deadline - time.monotonic()))
            answers[name] = decode(payload, NodeReport)
        except ray.exceptions.GetTimeoutError:
            answers[name] = f"no answer within {NODE_SECONDS:.0f} s"
        except ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            answers[name] = lines[-1] if lines else type(error).__name__
    return answers


def _absent(answers: dict[str, NodeReport | str]) -> Iterator[Finding]:
    for name, answer in answers.items():
        if isinstance(answer, str):
            yield problem(
                AREA,
                f"node {name}",
                f"could not be looked at: {answer}",
                "install the same Headrace there (pip install headrace), in the environment of ray start",
            )


def _alike(reports: dict[str, NodeReport]) -> Iterator[Finding]:
    """Versions of all nodes, and the digest of the store that each finds under the same path."""
    if not reports:
        return
    names = next(iter(reports.values())).facts.versions
    for what in names:
        by_value: dict[str, list[str]] = {}
        for name, report in reports.items():
            by_value.setdefault(report.facts.versions.get(what, "absent"), []).append(name)
        text = _by(by_value)
        if len(by_value) == 1:
            yield ok(AREA, what, f"{text} on all {len(reports)} nodes")
        else:
            yield problem(AREA, what, text, f"install the same version of {what} on all nodes")
    digests: dict[str, list[str]] = {}
    for name, report in reports.items():
        if report.facts.digest is not None:
            digests.setdefault(report.facts.digest[:16], []).append(name)
    if len(digests) == 1:
        yield ok(
            AREA, "store", f"digest {_by(digests)} on {len(next(iter(digests.values())))} nodes"
        )
    elif digests:
        yield problem(
            AREA,
            "store",
            f"not the same: {_by(digests)}",
            "copy one store to the same path on all nodes",
        )


def _by(values: dict[str, list[str]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in values.items())


def _token(address: str) -> Iterator[Finding]:
    """Ray lets whoever reaches its ports run code, unless it asks for a token."""
    host, _, port = address.rpartition(":")
    answer = refuses(host, int(port))
    if answer is None:
        raise NotChecked(f"the GCS at {address} does not answer a plain call (TLS?)")
    if answer:
        yield ok(AREA, "token", f"the GCS at {address} asks for one")
    else:
        yield warn(
            AREA,
            "token",
            f"the GCS at {address} takes calls without one",
            "export RAY_AUTH_MODE=token on every node before ray start (ray get-auth-token --generate makes one)",
        )


def _reach(places: list[tuple[str, str, int]]) -> list[str]:
    """Of (name, address, port) those at which nothing answers, with the reason."""
    tried = ((name, address, port, reach(address, port)) for name, address, port in places)
    return [f"{name} at {address}:{port} ({why})" for name, address, port, why in tried if why]


def _ports(found: Sequence[Node]) -> Iterator[Finding]:
    """From each node to each other's, and to the GCS."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    gcs = ("the GCS", host, int(port))
    refs = []
    for node in found:
        others = [(one.name, one.address, p) for one in found if one is not node for p in one.ports]
        refs.append(on_node(node, _reach).remote([gcs, *others]))
    wrong = [
        f"from {node.name}: {', '.join(bad)}"
        for node, bad in zip(found, ray.get(refs, timeout=NODE_SECONDS), strict=True)
        if bad
    ]
    if wrong:
        yield problem(
            AREA,
            "ports",
            f"not reached: {'; '.join(wrong)}",
            "open these ports between the nodes, and 10000-65535 for links and workers (or "
            "ray start --min-worker-port, --max-worker-port)",
        )
    else:
        yield ok(
            AREA, "ports", f"the GCS and Ray's ports of all {len(found)} nodes reach each other"
        )


def _clock() -> int:
    return time.time_ns()


def _clocks(found: Sequence[Node]) -> Iterator[Finding]:
    ahead = {node.name: _ahead(node) for node in found}
    widest = max(ahead.values()) - min(ahead.values())
    text = f"{widest * 1e3:.1f} ms apart at most, as far as a call can tell"
    if widest > CLOCK_SECONDS:
        worst = max(ahead, key=lambda name: abs(ahead[name]))
        yield warn(
            AREA, "clocks", f"{text}: {worst} is off", f"run chrony or systemd-timesyncd on {worst}"
        )
    else:
        yield ok(AREA, "clocks", text)


def _ahead(node: Node) -> float:
    """Seconds that a node's clock is ahead of this one's, by the fastest of a few calls."""
    task, best = on_node(node, _clock), (float("inf"), 0.0)
    for _ in range(PINGS):
        asked = time.time_ns()
        there = ray.get(task.remote(), timeout=PAIR_SECONDS)
        half = (time.time_ns() - asked) / 2
        best = min(best, (half, there - asked - half))
    return best[1] / 1e9


def _links(found: Sequence[Node], interface: str | None) -> Iterator[Finding]:
    """Each pair of nodes, by Gloo, and by NCCL between those with GPUs."""
    if len(found) < 2:
        yield unchecked("links", "between nodes", "there is one node only")
        return
    yield from run_checks("links", [("Gloo", partial(_pairs, found, "Gloo", "cpu", interface))])
    with_gpu = [node for node in found if node.has_gpu]
    if len(with_gpu) > 1:
        nccl = partial(_pairs, with_gpu, "NCCL", "cuda:0", interface)
        yield from run_checks("links", [("NCCL", nccl)])


def _pairs(
    found: Sequence[Node], kind: str, device: str, interface: str | None
) -> Iterator[Finding]:
    gpus = 1 if device.startswith("cuda") else 0
    with ExitStack() as stack:
        actors = []
        for node in found:
            actor = on_node(node, LinkActor, num_gpus=gpus).remote(device, interface)
            stack.callback(ray.kill, actor)
            actors.append(actor)
        interfaces = gather(
            [one.interface.remote() for one in actors], PAIR_SECONDS, doing="starting"
        )
        server = RendezvousServer(meeting_host(interface))
        stack.callback(server.close)
        for epoch, (a, b) in enumerate(combinations(range(len(found)), 2)):
            names = f"{found[a].name} - {found[b].name}"
            how = f"{interfaces[a]} - {interfaces[b]}"
            pair = [actors[a], actors[b]]
            yield from run_checks(
                "links",
                [(f"{kind} {names}", partial(_pair, pair, server, epoch, f"{kind} {names}", how))],
            )


def _pair(
    pair: Sequence[Any], server: RendezvousServer, epoch: int, name: str, how: str
) -> Iterator[Finding]:
    try:
        place = server.host, server.port, epoch
        ends = [actor.meet.remote(stage, *place) for stage, actor in enumerate(pair)]
        gather(ends, PAIR_SECONDS, doing="connecting")
        seconds = []
        for rows in (1, ROWS):
            ways = [actor.exchange.remote(rows) for actor in pair]
            seconds.append(max(gather(ways, PAIR_SECONDS, doing="measuring a link")))
    except Exception as error:  # noqa: BLE001 - whatever it is, stages there would not connect
        yield problem(
            "links",
            name,
            f"{how}: {str(error).splitlines()[0]}",
            "open the nodes' ports to each other, and have host names lead to the addresses of the "
            "network between them (/etc/hosts)",
        )
        return
    gather([actor.disconnect.remote() for actor in pair], PAIR_SECONDS, doing="disconnecting")
    text = f"{how}: {described(*seconds)}"
    if seconds[1] > SLOW_MIB:
        yield warn(
            "links",
            name,
            text,
            "look again when the nodes are idle, and connect them by 10 Gbit/s or more",
        )
    else:
        yield ok("links", name, text)
