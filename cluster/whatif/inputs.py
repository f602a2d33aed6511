"""What a planner is told of hardware that is only written down."""

from collections.abc import Iterator
from itertools import product

from headrace.cluster.whatif.devices import (
    GPUS,
    REACHED_HBM,
    REACHED_PCIE,
    REACHED_TFLOPS,
    Gpu,
)
from headrace.cluster.whatif.hardware import Node, Pool
from headrace.runtime.probe import GRAPH_LAYER_SECONDS, HOPS
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.links import Hop, Links
from headrace.scheduler.plan_inputs import PlanInputs


def gpu_of(node: Node) -> Gpu:
    """What is reached of its figures, or all of them where they were measured."""
    known = GPUS[node.gpu] if node.gpu else Gpu(0, 0.0, 0.0, 0.0)
    hbm, tflops, pcie = (1.0, 1.0, 1.0) if node.measured else (
        REACHED_HBM,
        REACHED_TFLOPS,
        REACHED_PCIE,
    )  # fmt: skip
    return Gpu(
        node.gpu_memory or known.memory,
        (node.hbm_gbps or known.hbm_gbps) * hbm,
        (node.tflops or known.tflops) * tflops,
        (node.pcie_gbps or known.pcie_gbps) * pcie,
    )


def _machines(pool: Pool) -> Iterator[tuple[str, Node]]:
    """Each machine with a name of its own."""
    number = 0
    for node in pool.nodes:
        for _ in range(node.count):
            yield str(number), node
            number += 1


def plan_inputs(
    pool: Pool,
    shape: ModelShape,
    workload: Workload,
    choices: Choices,
    *,
    device_memory: int | None = None,
    host_memory: int | None = None,
    kv_host_memory: int = 0,
) -> PlanInputs:
    """Each GPU a stage, the drive of a node shared by its GPUs.

    Memory is shared as in a run: nine tenths of the GPU's, half of the host's, unless given for each stage.
    """
    profiles, budgets, nodes, network = [], [], [], []
    for name, node in _machines(pool):
        gpu = gpu_of(node)
        profile = DeviceProfile(
            kind="cuda",
            nvme_gbps=node.drive_gbps,
            host_gbps=gpu.pcie_gbps,
            tflops=gpu.tflops,
            hbm_gbps=gpu.hbm_gbps,
            hop_seconds=HOPS["cuda"],
            link_gbps=gpu.pcie_gbps,
            layer_seconds=GRAPH_LAYER_SECONDS,
        ).shared_by(node.gpus)
        host = node.host_memory // 2 // node.gpus if host_memory is None else host_memory
        device = gpu.memory * 9 // 10 if device_memory is None else device_memory
        for _ in range(node.gpus):
            profiles.append(profile)
            budgets.append(Budget(device, host, kv_host_memory=kv_host_memory))
            nodes.append(name)
            network.append(Hop(node.network_latency_ms / 1e3, node.network_gbps))
    return PlanInputs(
        shape,
        tuple(profiles),
        tuple(budgets),
        workload,
        choices,
        _links(pool, profiles, nodes, network),
        tuple(nodes),
    )


def _links(
    pool: Pool, profiles: list[DeviceProfile], nodes: list[str], network: list[Hop]
) -> Links:
    links = Links.of(profiles, nodes, network)
    for link in pool.links:
        ends = [
            [stage for stage, node in enumerate(nodes) if node == str(end)] for end in link.between
        ]
        for a, b in product(*ends):
            links = links.with_pair(a, b, Hop(link.latency_ms / 1e3, link.gbps))
    return links
