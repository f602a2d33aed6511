"""The drives of a store, of KV pages and of temporary files."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.cluster.doctor.finding import (
    Check,
    Finding,
    NotChecked,
    Subject,
    ok,
    problem,
    run_checks,
    warn,
)
from headrace.runtime.kv_log.endurance import block_device, drive_wear
from headrace.runtime.kv_log.segment import Disk
from headrace.runtime.probe import measure_disk
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "glusterfs",
    "lustre",
    "gpfs",
    "beegfs",
    "9p",
    "virtiofs",
)
IN_MEMORY = ("tmpfs", "ramfs")
LAYERED = ("overlay", "aufs")

SLOW_GBPS = 1.0
"""Below it a drive is no NVMe, or something is in its way."""

LEAST_TEMPORARY = 2 << 30
"""Ray's logs and spilled objects need some room in its directory."""

WORN = 80
HOT = 70
SAMPLE_BYTES = 64 << 20
_TRANSLATED = {"\\040": " ", "\\011": "\t", "\\134": "\\"}


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a path is mounted: `kind` of filesystem, its `source` and options."""

    point: str
    kind: str
    source: str
    options: str

    @property
    def is_network(self) -> bool:
        return self.kind in NETWORK or self.kind.startswith("fuse")


def mount_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Mount:
    """The newest mount over the longest part of the path. OSError without /proc."""
    found, best = path.resolve(), Mount("/", "unknown", "unknown", "")
    for line in mounts.read_text().splitlines():
        source, point, kind, options, *_ = line.split()
        for code, character in _TRANSLATED.items():
            point = point.replace(code, character)
        if found.is_relative_to(point) and len(Path(point).parts) >= len(Path(best.point).parts):
            best = Mount(point, kind, source, options)
    return best


def drives(subject: Subject) -> Iterator[Finding]:
    """Of each directory that a run would use."""
    temporary = subject.temporary or Path(tempfile.gettempdir())
    for area, path, least in (
        ("store", subject.store, 0),
        ("KV directory", subject.kv_directory, 0),
        ("temporary files", temporary, LEAST_TEMPORARY),
    ):
        if path is None:
            continue
        yield from _drive(area, path, least)


def _drive(area: str, path: Path, least: int) -> Iterator[Finding]:
    if not path.is_dir():
        yield problem(
            area, "directory", f"{path} is not a directory", f"mkdir -p {path}, or name another"
        )
        return
    checks: list[tuple[str, Check]] = []
    if area == "store":
        checks.append(("contents", lambda: _contents(path)))
    checks += [
        ("filesystem", lambda: _filesystem(area, path)),
        ("device", lambda: _device(area, path)),
        ("free space", lambda: _space(area, path, least)),
    ]
    if area != "temporary files":
        checks += [
            ("O_DIRECT", lambda: _direct(area, path)),
            ("read speed", lambda: _speed(area, path)),
            ("scheduler", lambda: _scheduler(area, path)),
            ("wear", lambda: _wear(area, path)),
            ("temperature", lambda: _temperature(area, path)),
            ("PCIe", lambda: _link(area, path)),
        ]
    yield from run_checks(area, checks)


def _filesystem(area: str, path: Path) -> Iterator[Finding]:
    mount = mount_of(path)
    text = f"{path} on {mount.source}, {mount.kind} ({mount.options})"
    local = "use a directory on a local NVMe drive"
    if mount.is_network and area != "temporary files":
        yield warn(area, "filesystem", f"{text}: over the network", local)
    elif mount.kind in LAYERED and area != "temporary files":
        yield warn(
            area,
            "filesystem",
            f"{text}: a container's own layers",
            "mount a directory of the machine's drive into the container (docker run -v)",
        )
    elif mount.kind in IN_MEMORY and area != "temporary files":
        yield warn(area, "filesystem", f"{text}: in RAM, which weights and pages need", local)
    else:
        yield ok(area, "filesystem", text)


def _is_virtual(device: Path) -> bool:
    """A virtual machine's: what it says of itself, and what lies beneath, are two things."""
    return device.name.startswith(("vd", "xvd"))


def _model(device: Path) -> str:
    for name in ("device/model", "device/name"):
        file = device / name
        if file.exists() and (text := file.read_text().strip()):
            return text
    return "a virtual drive" if _is_virtual(device) else "model unknown"


def _block(path: Path) -> Path:
    device = block_device(path, Path("/sys"))
    if device is None:
        raise NotChecked(f"{path} is on no block device of its own")
    return device


def _device(area: str, path: Path) -> Iterator[Finding]:
    device = _block(path)
    text = f"{device.name}: {_model(device)}"
    rotates = (device / "queue" / "rotational").read_text().strip() == "1"
    if rotates and not _is_virtual(device) and area != "temporary files":
        yield warn(area, "device", f"{text}, which rotates", "use an NVMe drive")
    else:
        yield ok(area, "device", text)


def _space(area: str, path: Path, least: int) -> Iterator[Finding]:
    found = os.statvfs(path)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    text = f"{format_size(free)} of {format_size(total)} free"
    if free < least:
        yield problem(
            area, "free space", text, f"make room in {path}, or set TMPDIR to another drive"
        )
    elif total and free / total < 0.05 and area != "store":
        yield warn(area, "free space", text, f"make room on the drive of {path}")
    else:
        yield ok(area, "free space", text)


def _sample(path: Path) -> Path | None:
    """The largest block file of a store."""
    files = [file for file in path.glob("*.safetensors") if file.stat().st_size]
    return max(files, key=lambda file: file.stat().st_size, default=None)


def _direct(area: str, path: Path) -> Iterator[Finding]:
    file = _sample(path)
    if file is not None:
        try:
            os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
            works = True
        except OSError:
            works = False
    else:
        works = Disk.probe(path).direct
    if works:
        yield ok(area, "O_DIRECT", "works")
    else:
        yield warn(
            area,
            "O_DIRECT",
            "this filesystem refuses it: reads go through the page cache",
            "use a directory on ext4 or xfs",
        )


def _speed(area: str, path: Path) -> Iterator[Finding]:
    """Of a file that is there, or of one that is written for it and removed."""
    file = _sample(path)
    if file is not None:
        reading, what = (
            measure_disk(file),
            f"reading {file.name} ({format_size(file.stat().st_size)})",
        )
    else:
        with tempfile.NamedTemporaryFile(dir=path, prefix="headrace-doctor-") as written:
            written.write(os.urandom(SAMPLE_BYTES))
            os.fsync(written.fileno())
            reading = measure_disk(Path(written.name))
        what = f"reading {format_size(SAMPLE_BYTES)}"
    text = f"{reading.gbps:.2f} GB/s, {reading.method}, {what}"
    if reading.gbps < SLOW_GBPS:
        yield warn(
            area,
            "read speed",
            f"{text}: every streamed byte of a pass waits for it",
            "use a local NVMe drive, or keep more of the model in RAM (--host-memory)",
        )
    else:
        yield ok(area, "read speed", text)


def _scheduler(area: str, path: Path) -> Iterator[Finding]:
    device = _block(path)
    text = (device / "queue" / "scheduler").read_text().strip()
    chosen = text.partition("[")[2].partition("]")[0] or text
    if device.name.startswith("nvme") and chosen not in ("none", "kyber"):
        yield warn(
            area,
            "scheduler",
            f"{chosen}, which orders what an NVMe drive takes side by side",
            f"echo none | sudo tee /sys/block/{device.name}/queue/scheduler",
        )
    else:
        yield ok(area, "scheduler", chosen)


def _wear(area: str, path: Path) -> Iterator[Finding]:
    wear = drive_wear(path)
    if wear.percent_used is None:
        raise NotChecked(wear.note)
    if wear.percent_used >= WORN:
        yield warn(
            area,
            "wear",
            str(wear),
            "plan its replacement, and bound what KV pages write with --kv-daily-writes",
        )
    else:
        yield ok(area, "wear", str(wear))


def _temperature(area: str, path: Path) -> Iterator[Finding]:
    device = _block(path)
    sensors = [
        *device.glob("device/hwmon*/temp1_input"),
        *device.glob("device/device/hwmon/*/temp1_input"),
    ]
    if not sensors:
        raise NotChecked(f"the kernel shows no sensor of {device.name}")
    degrees = int(sensors[0].read_text()) // 1000
    if degrees >= HOT:
        yield warn(area, "temperature", f"{degrees} C: drives slow down", "cool the drive")
    else:
        yield ok(area, "temperature", f"{degrees} C")


def _link(area: str, path: Path) -> Iterator[Finding]:
    """The PCIe lanes that an NVMe drive has, of those that it could have."""
    device = _block(path)
    pcie = device / "device" / "device"
    if not (pcie / "current_link_width").exists():
        raise NotChecked(f"{device.name} shows no PCIe link of its own")
    width, most = ((pcie / f"{n}_link_width").read_text().strip() for n in ("current", "max"))
    speed, top = ((pcie / f"{n}_link_speed").read_text().strip() for n in ("current", "max"))
    text = f"x{width} at {speed}, of x{most} at {top}"
    if (width, speed) != (most, top):
        yield warn(area, "PCIe", text, "put the drive into a slot with all its lanes and speed")
    else:
        yield ok(area, "PCIe", text)


def store_digest(path: Path | None) -> str | None:
    """The digest of the store's manifest; None of what is no store."""
    try:
        return None if path is None else Store.open(path).digest
    except HeadraceError:
        return None


def _contents(path: Path) -> Iterator[Finding]:
    """The manifest and the files' sizes. No weights are read: `headrace inspect --verify` does."""
    try:
        store = Store.open(path)
    except HeadraceError as error:
        fix = "headrace convert CHECKPOINT STORE, or copy the store to this path on every node"
        yield problem("store", "contents", str(error), fix)
    else:
        text = (
            f"{len(store.layers)} layers, {format_size(store.nbytes)}, digest {store.digest[:16]}"
        )
        yield ok("store", "contents", text)
