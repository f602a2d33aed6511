"""A stage's or the driver's memory as lines that add up: what was planned, what is held, what was measured.

Nothing here is computed from sizes of the model: `held` are bytes of tensors and mappings that their owners handed
out, `measured` are those of their pages that are in RAM, and everything else is what the kernel counts. What is
left is a line of its own, "unexplained".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.runtime.memory.message import DeviceMemory, Measured, Part
from headrace.scheduler.placement import StageMemory

DEVICE_PARTS = {
    "resident": "layers that stay",
    "ring": "ring for streamed layers",
    "experts": "slots for experts",
    "head": "final norm and LM head",
    "kv": "KV pages",
    "kv_ring": "ring for KV pages in host memory",
    "tails": "newest KV pages, as computed",
    "scratch": "one dequantized matrix",
    "graphs": "CUDA graphs of decodes",
    "adapters": "slots for adapters",
}
HOST_PARTS = {
    "host_layers": "layers in host memory",
    "host_experts": "experts in host memory",
    "host_kv": "KV pages in host memory",
    "host_window": "KV pages on their way from NVMe",
    "host_log": "KV pages on their way to NVMe",
    "host_adapters": "adapters in host memory",
    "embed": "embedding in host memory",
}
"""What the plan counts of a stage, by the names of StageMemory."""

MOVING_PARTS = {"received": "buffers to receive", "sent": "hidden states sent"}
"""What the plan counts as activations."""

OWN_PARTS = {"buffers": "buffers of the model", "readers": "buffers of threads that read"}
"""What the plan counts as the process."""

UNEXPLAINED = "unexplained"
ENOUGH = 0.05
"""The share of a total that may be unexplained."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes; None where there is no such figure. `group` is what the plan counts the line in."""

    name: str
    planned: int | None = None
    held: int | None = None
    measured: int | None = None
    group: str = ""


@dataclass(frozen=True, slots=True)
class Account:
    """One memory of one process: `total` is what the kernel, or NVML, counts for it at its most, and the
    measured lines add up to it."""

    title: str
    lines: tuple[Line, ...]
    total: int
    total_is: str

    @property
    def unexplained(self) -> int:
        return sum(line.measured or 0 for line in self.lines if line.name == UNEXPLAINED)

    @property
    def is_explained(self) -> bool:
        return abs(self.unexplained) <= ENOUGH * self.total


@dataclass(frozen=True, slots=True)
class Step:
    """What a process's own memory (Measured.own) grew by when it did something."""

    name: str
    nbytes: int


def steps(marks: Sequence[tuple[str, Measured]]) -> list[Step]:
    """From one mark to the next; the first from nothing."""
    own = [0, *(mark.own for _, mark in marks)]
    return [
        Step(name, after - before)
        for (name, _), before, after in zip(marks, own, own[1:], strict=False)
    ]


def host_account(
    title: str, marks: Sequence[tuple[str, Measured]], last: Measured, planned: StageMemory | None
) -> Account:
    """A process's RAM at its most since peaks began anew; `last` was measured right afterwards, at rest.

    What was in RAM then and is not any more is what passes need while they run: activations.
    """
    process, on_cpu = last.process, last.device is None
    at_rest = process.rss + process.trimmed
    running = max(0, process.peak - at_rest)
    lines: list[Line] = []
    if planned is not None:
        names = (DEVICE_PARTS if on_cpu else {}) | HOST_PARTS
        host = [part for part in last.parts if not part.device]
        lines += _parts(names, host, planned)
        if on_cpu:
            lines += _activations(planned.activations, host, running, on_cpu=True)
            running = 0
        lines += _parts(OWN_PARTS, host, None, "process")
    grown = steps(marks)
    lines += [Line(step.name, None, None, step.nbytes, "process") for step in grown]
    lines += _process(last)
    if running:
        lines.append(Line("what was given back since the peak", measured=running, group="process"))
    unexplained = last.own - sum(step.nbytes for step in grown)
    lines.append(Line(UNEXPLAINED, None, None, unexplained, "process"))
    if planned is not None:
        counted = sum(line.measured or 0 for line in lines if line.group == "process")
        lines.append(Line("the process itself", planned.process, None, counted, "sum"))
    return Account(title, tuple(lines), max(process.peak, at_rest), "most RSS, by the kernel")


def _parts(
    names: dict[str, str], parts: Sequence[Part], planned: StageMemory | None, group: str = ""
) -> Iterator[Line]:
    found = {part.name: part for part in parts}
    for name, what in names.items():
        part = found.get(name)
        plan = None if planned is None else getattr(planned, name)
        if part is None and not plan:
            continue
        held, resident = (0, 0) if part is None else (part.nbytes, part.resident)
        yield Line(what, plan, held, held if part is not None and part.device else resident, group)


def _activations(
    planned: int, parts: Sequence[Part], running: int, *, on_cpu: bool
) -> Iterator[Line]:
    moving = [*_parts(MOVING_PARTS, parts, None, "activations")]
    counted = running + sum(line.measured or 0 for line in moving)
    yield from moving
    if running or on_cpu:
        yield Line("what passes need at their peak", None, None, running, "activations")
    yield Line("activations", planned, None, counted, "sum")


def _process(last: Measured) -> Iterator[Line]:
    process = last.process
    files = sum(one.rss for one in process.files)
    yield Line("code of libraries (mapped files)", None, None, files, "process")
    for one in process.shared:
        if one.rss:
            yield Line(one.kind, None, None, one.rss, "process")
    yield Line(f"stacks of {process.threads} threads", None, None, process.stacks, "process")
    yield Line("free, but kept by malloc", None, None, process.trimmed, "process")


def device_account(title: str, last: Measured, planned: StageMemory) -> Account | None:
    """A stage's memory on its CUDA device; None on a CPU."""
    device = last.device
    if device is None:
        return None
    parts = [part for part in last.parts if part.device]
    lines = [*_parts(DEVICE_PARTS, parts, planned)]
    lines += _activations(
        planned.activations, parts, device.peak_allocated - device.allocated, on_cpu=True
    )
    if device.graphs:
        lines.append(Line("recorded graphs' own memory", None, None, device.graphs, "graphs"))
    lines += _parts({"buffers": OWN_PARTS["buffers"]}, parts, None)
    cached = device.reserved - device.peak_allocated - device.graphs
    lines.append(Line("kept by torch's allocator", None, None, cached))
    lines.append(Line(UNEXPLAINED, None, None, device.allocated - sum(p.nbytes for p in parts)))
    return _closed(title, device, lines)


def _closed(title: str, device: DeviceMemory, lines: list[Line]) -> Account:
    if device.process is None:
        total_is = f"reserved by torch (not compared with NVML: {device.reason})"
        return Account(title, tuple(lines), device.reserved, total_is)
    rest = device.process - device.reserved
    lines.append(Line("CUDA context, kernels and libraries", None, None, rest))
    return Account(title, tuple(lines), device.process, "of this process, by NVML")
