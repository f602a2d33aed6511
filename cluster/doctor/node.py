"""All that is checked on one machine. It needs no Ray: a cluster runs it as a task on each node."""

import os
from collections.abc import Iterator

from headrace.cluster.doctor.cpu import cpu
from headrace.cluster.doctor.drives import drives, store_digest
from headrace.cluster.doctor.finding import Facts, Finding, NodeReport, Subject
from headrace.cluster.doctor.gds import gds
from headrace.cluster.doctor.gpus import gpus
from headrace.cluster.doctor.hop import links
from headrace.cluster.doctor.memory import memory
from headrace.cluster.doctor.network import network
from headrace.cluster.doctor.pinned import pinned
from headrace.cluster.doctor.software import software, versions
from headrace.runtime.nvml import Library, read_gpus
from headrace.scheduler.errors import HeadraceError


def look(
    subject: Subject, *, in_cluster: bool = False, library: Library | None = None
) -> NodeReport:
    """Half a minute at most, most of it imports and reads. `library` stands in for nvidia-ml-py."""
    digest = store_digest(subject.store)
    facts = Facts(os.uname().nodename, versions(), digest)
    readable = digest is not None
    return NodeReport(
        facts, tuple(_findings(subject, library, in_cluster=in_cluster, readable=readable))
    )


def _findings(
    subject: Subject, library: Library | None, *, in_cluster: bool, readable: bool
) -> Iterator[Finding]:
    buses = _buses(library)
    store = subject.store if readable else None
    yield from software()
    yield from gpus(library)
    yield from gds(store)
    yield from cpu(has_gpu=bool(buses))
    yield from memory(store, has_gpu=bool(buses), gpu_buses=buses)
    if buses:
        yield from pinned()
    yield from drives(subject)
    yield from network(in_cluster=in_cluster)
    yield from links()


def _buses(library: Library | None) -> tuple[str, ...]:
    """Where GPUs are on the machine's PCIe; none without NVML."""
    try:
        return tuple(gpu.bus for gpu in read_gpus(library).devices)
    except HeadraceError:
        return ()
