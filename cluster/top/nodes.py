"""Where Ray's nodes show metrics."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from headrace.scheduler.errors import HeadraceError


def nodes_here() -> list[str]:
    """Of all Ray clusters that have a node on this machine, as URLs. It takes no connection to them, and so no
    token. HeadraceError when there is none."""
    found = sorted(set(_here()))
    if not found:
        raise HeadraceError(
            "nothing runs here: there is no Ray node on this machine that shows metrics. Give the URL of a"
            " server, or the --address of a Ray cluster elsewhere"
        )
    return found


def _here() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if not command or Path(command[0]).name != "raylet":
            continue
        given = dict(
            word[2:].split("=", 1) for word in command[1:] if word[:2] == "--" and "=" in word
        )
        try:
            session = Path(given["raylet_socket_name"]).parents[1]
            port = (session / f"metrics_export_port_{given['node_id']}").read_text().strip()
        except (KeyError, IndexError, OSError):
            continue  # one that is starting or ending
        if port.isdecimal():
            yield f"http://{given.get('node_ip_address', '127.0.0.1')}:{port}"


def nodes_of(address: str) -> list[str]:
    """Of all nodes of the Ray cluster at that address, as URLs. HeadraceError when there is no such cluster, or it
    shows none."""
    import ray

    from headrace.cluster.processes import ray_cluster

    with ray_cluster(0, address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
    shown = [node for node in nodes if node.get("MetricsExportPort", -1) > 0]
    if not shown:
        raise HeadraceError(
            f"the nodes of the Ray cluster at {address} show no metrics: start them with `ray start"
            " --metrics-export-port=8080`"
        )
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in shown]
