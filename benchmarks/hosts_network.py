"""Machines that are not there: hosts of their own names, networks, processes and drives' speeds, on this one.

A host is a set of Linux namespaces (net, uts, mount, pid) held by its first process: with that all of its processes
end. Its networks are TAP devices on switches in user space (hosts_switch.py), its drive is this machine's at the rate
that a cgroup lets it read (blkio, cgroup v1). Only root can make any of that. Hosts share this machine's processors, memory and files, but for
/tmp/ray and the probe's cache, which each has to itself.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

BLKIO = Path("/sys/fs/cgroup/blkio")
END_SECONDS = 20.0
NAMESPACES = ["-n", "-u", "-m", "-p"]


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    absent = [name for name in ("ip", "ss", "unshare", "nsenter") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} is not installed (apt-get install iproute2 util-linux)"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    trial = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, check=False
    )
    return f"unshare: {trial.stderr.decode().strip()}" if trial.returncode else None


def can_slow() -> bool:
    return (BLKIO / "cgroup.procs").exists()


@dataclass(frozen=True)
class Network:
    """Addresses are `prefix`.1 and so on. `delay` is one way, in seconds; `rate` in bit/s."""

    name: str
    prefix: str
    delay: float
    rate: float

    @property
    def cidr(self) -> str:
        return f"{self.prefix}.0/24"

    def address(self, host: int) -> str:
        return f"{self.prefix}.{host + 1}"


@dataclass
class Cables:
    """A network's switch, which runs in a process of its own."""

    network: Network
    process: "subprocess.Popen[str]"

    def cut(self, a: int, b: int) -> None:
        """Lose all between hosts `a` and `b`."""
        self._tell(f"cut {a} {b}")

    def heal(self) -> None:
        self._tell("heal")

    def _tell(self, line: str) -> None:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(line + "\n")
        stdin.flush()
        stdout.readline()


@dataclass
class Host:
    """`group` is its cgroup, where its drive is slow."""

    index: int
    name: str
    folder: Path
    init: "subprocess.Popen[bytes]"
    group: Path | None
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(
        self, command: Sequence[str], out: IO[Any] | int | None = None, err: Any = None, **env: str
    ) -> "subprocess.Popen[Any]":
        """A process on this host."""
        enter = ["nsenter", "-t", str(self.init_pid), *NAMESPACES, f"--wd={Path.cwd()}", "--"]
        words = [*enter, *command]
        if self.group is not None:
            script = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
            words = ["sh", "-c", script, str(self.group), *words]
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **self.environment, **env},
        )

    def output(self, *command: str) -> str:
        """What a command prints. CalledProcessError when it fails."""
        done = self.start(command, subprocess.PIPE, subprocess.PIPE)
        out, err = done.communicate()
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, out, err)
        return str(out.decode())

    @property
    def init_pid(self) -> int:
        """The first process in the host's namespaces: unshare's child."""
        pid = self.init.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def received(self) -> dict[str, tuple[int, int]]:
        """Bytes received and sent by each interface."""
        found = {}
        for line in self.output("cat", "/proc/net/dev").splitlines()[2:]:
            name, _, counts = line.partition(":")
            words = counts.split()
            found[name.strip()] = int(words[0]), int(words[8])
        return found


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def cables(network: Network, hosts: Sequence[Host]) -> Iterator[Cables]:
    """Have all hosts on the network, by an interface of its name."""
    ports = [f"hr{os.getpid() % 100000}{network.name[:2]}{host.index}" for host in hosts]
    script = Path(__file__).with_name("hosts_switch.py")
    settings = ["--delay", str(network.delay), "--rate", str(network.rate)]
    process = subprocess.Popen(
        [sys.executable, str(script), "--ports", *ports, *settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise OSError("no TAP devices can be made here")
        for host, port in zip(hosts, ports, strict=True):
            _run("ip", "link", "set", port, "netns", str(host.init_pid))
            place = f"{network.address(host.index)}/24"
            for words in (
                ("link", "set", port, "name", network.name),
                ("addr", "add", place, "dev", network.name),
                ("link", "set", network.name, "up"),
            ):
                host.output("ip", *words)
        yield Cables(network, process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@contextmanager
def host(
    index: int, folder: Path, names: Mapping[str, str], drive: float | None, device: int
) -> Iterator[Host]:
    """A machine without networks. It reads at most `drive` bytes a second from the block device of that number;
    `names` are addresses by name."""
    name, own = f"host{index + 1}", folder / f"host{index + 1}"
    (own / "ray").mkdir(parents=True)
    Path("/tmp/ray").mkdir(exist_ok=True)
    (own / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items())
    )
    script = (
        'set -e; hostname "$1"; mount --bind "$2/ray" /tmp/ray; mount --bind "$2/hosts" /etc/hosts;'
        " ip link set lo up; touch $2/ready; while :; do sleep 5; done"
    )
    namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    init = subprocess.Popen(["unshare", *namespaces, "sh", "-c", script, "sh", name, str(own)])
    group = None
    try:
        while not (own / "ready").exists():
            if init.poll() is not None:
                raise OSError(f"unshare ended with {init.returncode}")
        if drive is not None:
            group = BLKIO / f"headrace-{os.getpid()}-{name}"
            group.mkdir()
            limit = f"{os.major(device)}:{os.minor(device) & ~15} {round(drive)}"
            (group / "blkio.throttle.read_bps_device").write_text(limit)
        environment = {"XDG_CACHE_HOME": str(own / "cache")}
        yield Host(index, name, own, init, group, environment)
    finally:
        init.kill()  # and with it, by --kill-child, the first process and all others
        init.wait()
        if group is not None:
            _remove(group)


def _remove(group: Path) -> None:
    """When its processes, which were killed, have ended."""
    end = time.monotonic() + END_SECONDS
    while (group / "cgroup.procs").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    group.rmdir()


@contextmanager
def machines(
    folder: Path, networks: Sequence[Network], drives: Sequence[float | None]
) -> Iterator[tuple[list[Host], list[Cables]]]:
    """One host for each of `drives`, on all networks; their names lead to their addresses on the first."""
    names = {f"host{i + 1}": networks[0].address(i) for i in range(len(drives))}
    for network in networks[1:]:
        names |= {f"host{i + 1}-{network.name}": network.address(i) for i in range(len(drives))}
    device = os.stat(folder).st_dev
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(host(i, folder, names, drive, device))
            for i, drive in enumerate(drives)
        ]
        yield hosts, [stack.enter_context(cables(network, hosts)) for network in networks]
