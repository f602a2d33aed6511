"""What a run on Ray is planned from: devices and types by name, budgets of memory, what was measured.

Nothing here imports torch before it is needed: it takes seconds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.cluster.adapters import adapter_host_bytes, adapter_room, check_adapter_options
from headrace.cluster.discovery import Discovery, discover
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.kv_options import check_kv_options
from headrace.runtime.shape import model_shape
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import Budget, Choices, ModelShape, Workload
from headrace.scheduler.kv_format import resolve_kv_format
from headrace.scheduler.links import Hop, Links
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

if TYPE_CHECKING:
    from headrace.runtime.sweep.source import SweptModel

OVERHEAD_BYTES = 64 << 20
"""What a stage process takes besides what is counted: allocator arenas, buffers of Ray and links."""

SEGMENTS_BYTES = 256 << 20
"""Of a CUDA budget, which the allocator enforces, what its segments may leave empty: 243 MiB were seen, of 4 GiB that a
small model's many blocks and its pages were to fill."""


def resolve_device(device: str, address: str | None = None) -> str:
    """ "auto" is CUDA where there is any. HeadraceError when CUDA is asked for and absent here.

    With the `address` of a cluster, CUDA only has to be there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise HeadraceError(f"--device must be auto, cpu or cuda, not {device!r}")
    if device == "cpu" or (device == "cuda" and address is not None):
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        raise HeadraceError(
            "--device cuda: PyTorch sees no CUDA device on this machine. Check nvidia-smi and that "
            f"this PyTorch ({torch.__version__}) was built for CUDA, or use --device cpu"
        )
    return device


def resolve_dtype(dtype: str, device: str, store: "SweptModel") -> str:
    """ "auto" is float32 on CPU, where it is exact and never slow, and the model's own on CUDA."""
    if dtype == "auto":
        own = {"BF16": "bfloat16", "F16": "float16"}.get(store.dtype, "float32")
        return "float32" if device == "cpu" else own
    if dtype not in ("float32", "bfloat16", "float16"):
        raise HeadraceError(f"--dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
    if dtype == "float16" and device == "cpu":
        raise HeadraceError("--dtype float16 is 8 times slower than bfloat16 on CPU: choose that")
    return dtype


def budgets(options: EngineOptions, device: str, found: Sequence[Discovery]) -> list[Budget]:
    """Each stage's memory: what the user said, else a share of what is free on its node.

    Free host memory is halved (the page cache and everybody else live there, too) and shared by the
    stages of a node. Stages on CPUs compute in it, and nothing but KV pages and adapters moves out of their way.
    """
    shared = Counter(discovery.node for discovery in found)
    result, adapters = [], adapter_host_bytes(options)
    kept = options.kv_host_bytes + adapters
    for discovery in found:
        host = discovery.host_free // 2 // shared[discovery.node]
        free = max(host - kept, 0) if device == "cpu" else discovery.device_free * 9 // 10
        spare = min(kept, host) if device == "cpu" else host
        result.append(
            Budget(
                device_memory=free if options.device_memory is None else options.device_memory,
                host_memory=spare if options.host_memory is None else options.host_memory,
                process_bytes=discovery.process + OVERHEAD_BYTES,
                kv_host_memory=options.kv_host_memory,
                kv_disk=options.kv_disk,
                adapter_host_memory=adapters,
            )
        )
    return result


def _plannable(budget: Budget, device: str) -> Budget:
    """The budget less what no tensor will have of it."""
    if device == "cpu":
        return budget
    kept = min(SEGMENTS_BYTES, budget.device_memory // 16)
    return replace(budget, device_memory=budget.device_memory - kept)


def choices_of(options: EngineOptions) -> Choices:
    """What the user settles of a plan."""
    slots, rank = adapter_room(options)
    return Choices(
        placement=options.placement,
        token_budget=options.token_budget,
        max_sequences=options.max_sequences,
        micro_batches=options.micro_batches,
        resident_layers=options.resident_layers,
        graphs=options.graphs,
        kv_hot_window=options.kv_hot_window,
        drafts=options.ngram_speculation,
        stage_layers=options.stage_layers,
        adapter_slots=slots,
        adapter_rank=rank,
    )


def plan_run(
    options: EngineOptions, device: str, found: Sequence[Discovery], shape: ModelShape
) -> Plan:
    """The plan of a run of `shape` on what was found.

    DoesNotFitError when there is none; HeadraceError when CUDA graphs are asked for without CUDA.
    """
    return inputs_of_run(options, device, found, shape).plan()


def inputs_of_run(
    options: EngineOptions, device: str, found: Sequence[Discovery], shape: ModelShape
) -> PlanInputs:
    """What the plan of a run is made from. HeadraceError as for `plan_run`."""
    if options.graphs and device == "cpu":
        raise HeadraceError("--graphs makes CUDA graphs, and the stages are on cpu: leave it out")
    shared = Counter(discovery.node for discovery in found)
    if device != "cpu":  # its embedding stays in host RAM
        shape = replace(shape, tied_bytes=0)
    shape = shape.with_adapters(*adapter_room(options))
    nodes = tuple(discovery.node for discovery in found)
    profiles = tuple(one.profile.shared_by(shared[one.node]) for one in found)
    network = []
    if options.network_gbps is not None:
        network = [Hop(options.network_latency, options.network_gbps)] * len(found)
    return PlanInputs(
        shape,
        profiles,
        tuple(_plannable(budget, device) for budget in budgets(options, device, found)),
        Workload(context=options.context, min_sequences=options.min_sequences),
        choices_of(options),
        Links.of(profiles, nodes, network),
        nodes,
    )


def local_plan(options: EngineOptions, store: Store) -> Plan:
    """The plan of stages that are all on this machine. HeadraceError when there is none."""
    check_kv_options(options)
    check_adapter_options(options)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, store)
    shape = shape_in(store, dtype, options.kv_format)
    found = discover(stage_device(device), str(store.path.resolve()))
    return plan_run(options, device, [found] * options.stages, shape)


def shape_in(store: Store, dtype: str, kv_format: str) -> ModelShape:
    """The model's sizes when it computes in the type of that name.

    HeadraceError for a KV format that there is not, or not for this model.
    """
    fmt = resolve_kv_format(kv_format, dtype)
    return model_shape(store, dtype, fmt)


def kv_alternatives(options: EngineOptions, store: Store) -> dict[str, ModelShape]:
    """The model's sizes in the other KV formats that it can have, by name."""
    _, dtype = resolve(options, store)
    found = {}
    for name in ("int8", "int4"):
        if name == options.kv_format:
            continue
        try:
            shape = shape_in(store, dtype, name)
            found[name] = shape.with_adapters(*adapter_room(options))
        except HeadraceError:  # its heads are not made for it
            continue
    return found


def stage_device(device: str) -> str:
    """The device as a stage process sees it: Ray shows each actor its own GPU as the first one."""
    return "cuda:0" if device == "cuda" else "cpu"


def resolve(options: EngineOptions, store: Store) -> tuple[str, str]:
    """The device and the compute type of a run, by name. HeadraceError as for each of them."""
    device = resolve_device(options.device, options.address)
    return device, resolve_dtype(options.dtype, device, store)
