"""A Ray cluster over emulated hosts, each with one place for a stage: the head on the first."""

import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts_network import Cables, Host, Network, machines

PORT = 6379
START_SECONDS = 120.0

RAY = Network("ray", "10.88.0", 0.0005, 1e9)
"""Of Ray, as a cluster's management network: calls and their results."""

DATA = Network("data", "10.77.0", 0.01, 100e6)
"""Of hidden states: two sites that are 1000 km apart, over 100 Mbit/s."""


@dataclass
class Cluster:
    hosts: list[Host]
    ray: Cables
    data: Cables
    address: str

    def start(self, host: int, command: Sequence[str], **more: Any) -> "subprocess.Popen[Any]":
        return self.hosts[host].start(command, **more)

    def cut_off(self, host: int) -> None:
        """Lose all between one host and the others."""
        for other in range(len(self.hosts)):
            if other != host:
                self.ray.cut(host, other)
                self.data.cut(host, other)

    def await_nodes(self) -> None:
        """Return when all hosts are nodes that live. TimeoutError when they are not."""
        ray = shutil.which("ray")
        assert ray is not None
        await_nodes(self.hosts[0], ray, self.address, len(self.hosts))

    def heal(self) -> None:
        self.ray.heal()
        self.data.heal()


@contextmanager
def cluster(folder: Path, drives: Sequence[float | None]) -> Iterator[Cluster]:
    """With a token. Its worker nodes are started again 5 s after they end, as by systemd."""
    ray = shutil.which("ray")
    assert ray is not None, "no ray on the PATH"
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    with machines(folder, [RAY, DATA], drives) as (hosts, (ray_cables, data)):
        address = f"{RAY.address(0)}:{PORT}"
        for host in hosts:
            host.environment = {
                **host.environment,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_niceness": "0",
            }
            head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
            where = head if host.index == 0 else [f"--address={address}"]
            words = [
                ray, "start", *where, f"--node-ip-address={RAY.address(host.index)}", "--block",
                "--num-cpus=1", "--disable-usage-stats",
                f"--object-store-memory={100 << 20}",
            ]  # fmt: skip
            log = (host.folder / "ray.log").open("wb")
            again = 'while :; do "$@"; echo "ended with $?"; sleep 5; done'
            host.start(["sh", "-c", again, "sh", *words], log, subprocess.STDOUT)
        await_nodes(hosts[0], ray, address, len(hosts))
        yield Cluster(hosts, ray_cables, data, address)


def await_nodes(head: Host, ray: str, address: str, count: int) -> None:
    """Return when so many nodes are there. TimeoutError when they are not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        asked = head.start(
            [ray, "status", f"--address={address}"], subprocess.PIPE, subprocess.DEVNULL
        )
        said = asked.communicate()[0].decode()
        if said.partition("Pending:")[0].count("node_") >= count:
            return
        time.sleep(1.0)
    raise TimeoutError(f"no {count} nodes within {START_SECONDS:.0f} s:\n{said}")
