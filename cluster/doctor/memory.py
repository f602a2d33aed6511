"""RAM, what bounds it, and where it lies: the machine's, a container's, and of this process."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from headrace.cluster.doctor.finding import Finding, NotChecked, ok, problem, run_checks, warn
from headrace.runtime.kv_log.endurance import block_device
from headrace.runtime.store import Store
from headrace.runtime.streaming.page_cache import available_memory
from headrace.scheduler.sizes import format_size

AREA = "memory"
LEAST_SHARED = 1 << 30
"""Of /dev/shm: Ray's object store, and pages of a stage that is replaced."""

LEAST_FREE = 2 << 30
"""What a driver, one stage and Ray's own processes take without any weights: 1.1 GiB, and some more."""

LEAST_FILES = 4096
NO_LIMIT = 1 << 60
CGROUP_V2, CGROUP_V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


def memory(
    store: Path | None, *, has_gpu: bool, gpu_buses: tuple[str, ...] = ()
) -> Iterator[Finding]:
    checks = [
        ("RAM", lambda: _ram(store)),
        ("swap", _swap),
        ("huge pages", _huge_pages),
        ("NUMA", lambda: _numa(store, gpu_buses)),
        ("container limit", _limit),
        ("locked memory", lambda: _locked(has_gpu=has_gpu)),
        ("/dev/shm", _shared),
        ("open files", _files),
    ]
    yield from run_checks(AREA, checks)


def _ram(store: Path | None) -> Iterator[Finding]:
    found = psutil.virtual_memory()
    free = available_memory()
    cached = getattr(found, "cached", 0)
    text = f"{format_size(free)} of {format_size(found.total)} can be had, {format_size(cached)} is page cache"
    if free < LEAST_FREE:
        yield problem(AREA, "RAM", text, "end other programs: processes alone take 1 to 2 GiB")
        return
    if store is not None:
        nbytes = Store.open(store).nbytes
        where = "has room" if nbytes <= free else "has no room"
        text += f"; the page cache {where} for the store's {format_size(nbytes)}"
    yield ok(AREA, "RAM", text)


def _swap() -> Iterator[Finding]:
    found = psutil.swap_memory()
    if not found.total:
        yield ok(AREA, "swap", "none")
    elif found.used > found.total // 10:
        yield warn(
            AREA,
            "swap",
            f"{format_size(found.used)} of {format_size(found.total)} is in use: something is short of RAM",
            "end other programs, or lower --host-memory; then: sudo swapoff -a && sudo swapon -a",
        )
    else:
        yield ok(AREA, "swap", f"{format_size(found.used)} of {format_size(found.total)} in use")


def _huge_pages() -> Iterator[Finding]:
    """Buffers for weights ask for them; fewer page faults, and faster pinning."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.exists():
        raise NotChecked("this kernel has none")
    chosen = file.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        yield warn(AREA, "huge pages", "never given", f"echo madvise | sudo tee {file}")
    else:
        yield ok(AREA, "huge pages", f"{chosen}")


def _numa(store: Path | None, gpu_buses: tuple[str, ...]) -> Iterator[Finding]:
    nodes = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    pci = Path("/sys/bus/pci/devices")
    near = [f"GPU at {bus}: node {_node_of(pci / _sysfs(bus))}" for bus in gpu_buses]
    device = None if store is None else block_device(store, Path("/sys"))
    if device is not None:
        near.append(f"{device.name}: node {_node_of(device / 'device')}")
    text = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    if len(nodes) > 1 and near:
        text += f"; {', '.join(near)}"
    yield ok(AREA, "NUMA", text)


def _sysfs(bus: str) -> str:
    """NVML's eight digits of the domain as the kernel's four."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _node_of(device: Path) -> str:
    for folder in (device, device / "device"):
        file = folder / "numa_node"
        if file.exists():
            number = file.read_text().strip()
            return "unknown" if number == "-1" else number
    return "unknown"


def cgroup_limit() -> tuple[int, int] | None:
    """Bytes that this process's cgroup may have and has, by cgroup v2 or v1; None without a limit."""
    group = _own_groups()
    candidates = [
        (CGROUP_V2 / group.get("", "").lstrip("/"), "memory.max", "memory.current"),
        (CGROUP_V2, "memory.max", "memory.current"),
        (
            CGROUP_V1 / group.get("memory", "").lstrip("/"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
        (CGROUP_V1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ]
    for folder, limit, used in candidates:
        try:
            most = int((folder / limit).read_text())
            if most < NO_LIMIT:
                return most, int((folder / used).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def _own_groups() -> dict[str, str]:
    """The path by controller; that of cgroup v2 has no name."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _limit() -> Iterator[Finding]:
    found = cgroup_limit()
    if found is None:
        yield ok(AREA, "container limit", "none")
        return
    most, used = found
    text = f"{format_size(most)}, {format_size(used)} of it in use, page cache included"
    if most < psutil.virtual_memory().total // 2:
        yield warn(
            AREA,
            "container limit",
            text,
            "give the container more (docker run --memory), and say --host-memory: half of what is free "
            "on the machine would be too much",
        )
    else:
        yield ok(AREA, "container limit", text)


def _locked(*, has_gpu: bool) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
    if has_gpu and soft != resource.RLIM_INFINITY and soft < psutil.virtual_memory().total // 2:
        yield warn(
            AREA,
            "locked memory",
            f"{text}: pinning host memory for the GPU may be refused",
            "ulimit -l unlimited (in /etc/security/limits.conf: * - memlock unlimited)",
        )
    else:
        yield ok(AREA, "locked memory", text if has_gpu else f"{text}; only GPUs need it")


def _shared() -> Iterator[Finding]:
    found = os.statvfs("/dev/shm")
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{format_size(free)} of {format_size(total)} free"
    if free < LEAST_SHARED:
        yield warn(
            AREA,
            "/dev/shm",
            f"{text}: Ray's object store goes to /tmp then, which is slow",
            "docker run --shm-size=8g, or sudo mount -o remount,size=8G /dev/shm",
        )
    else:
        yield ok(AREA, "/dev/shm", text)


def _files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES:
        yield warn(
            AREA, "open files", f"{soft} at once (at most {hard})", f"ulimit -n {min(65536, hard)}"
        )
    else:
        yield ok(AREA, "open files", f"{soft} at once")
