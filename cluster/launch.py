"""Starts an engine: processes first, then what they measure, then the plan, then the weights.

Nothing here imports torch before Ray is starting: both take seconds, and need not take them in turn.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.cluster.discovery import Discovery, discover
from headrace.cluster.edges import Edges
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.hydration import cold_model, hydrate_stages, open_store
from headrace.cluster.kv_options import check_kv_options, log_config, log_keys, log_kv
from headrace.cluster.members import Members
from headrace.cluster.network_options import check_network
from headrace.cluster.pipeline import Pipeline, RayPipeline, gather
from headrace.cluster.processes import START_SECONDS, StageProcesses, ray_cluster
from headrace.cluster.recovery import RingRecovery
from headrace.cluster.replacement import StageReplacer
from headrace.cluster.stage_logs import ActorLogs
from headrace.cluster.start_times import StartTimes, read_at_start
from headrace.cluster.telemetry.engine_metrics import EngineMetrics
from headrace.cluster.tokenizer import check_tokenizer, load_tokenizer, stop_ids
from headrace.cluster.wire import decode, encode
from headrace.runtime.cold.source import ColdModel, Hydration
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.runtime.streaming.page_cache import ReadAhead, available_memory
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import Budget, Choices, ModelShape, Workload
from headrace.scheduler.kv_format import check_kv_format, resolve_kv_format
from headrace.scheduler.links import Hop, Links
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 64 << 20
"""What a stage process takes besides what is counted: allocator arenas, buffers of Ray and links."""


def resolve_device(device: str, address: str | None = None) -> str:
    """ "auto" is CUDA where there is any. HeadraceError when CUDA is asked for and absent here.

    With the `address` of a cluster, CUDA only has to be there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise HeadraceError(f"--device must be auto, cpu or cuda, not {device!r}")
    if device == "cuda" and address is None and not torch.cuda.is_available():
        raise HeadraceError(
            "--device cuda: PyTorch sees no CUDA device on this machine. Check nvidia-smi and that "
            f"this PyTorch ({torch.__version__}) was built for CUDA, or use --device cpu"
        )
    return device


def resolve_dtype(dtype: str, device: str, store: Store) -> str:
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
    stages of a node. Stages on CPUs compute in it, and nothing but KV pages moves out of their way.
    """
    shared = Counter(discovery.node for discovery in found)
    result, kv = [], options.kv_host_bytes
    for discovery in found:
        host = discovery.host_free // 2 // shared[discovery.node]
        free = max(host - kv, 0) if device == "cpu" else discovery.device_free * 9 // 10
        spare = min(kv, host) if device == "cpu" else host
        result.append(
            Budget(
                device_memory=free if options.device_memory is None else options.device_memory,
                host_memory=spare if options.host_memory is None else options.host_memory,
                process_bytes=discovery.process + OVERHEAD_BYTES,
                kv_host_memory=options.kv_host_memory,
                kv_disk=options.kv_disk,
            )
        )
    return result


def choices_of(options: EngineOptions) -> Choices:
    """What the user settles of a plan."""
    return Choices(
        placement=options.placement,
        token_budget=options.token_budget,
        max_sequences=options.max_sequences,
        micro_batches=options.micro_batches,
        resident_layers=options.resident_layers,
        graphs=options.graphs,
        kv_hot_window=options.kv_hot_window,
        drafts=options.ngram_speculation,
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
    nodes = tuple(discovery.node for discovery in found)
    profiles = tuple(one.profile.shared_by(shared[one.node]) for one in found)
    network = []
    if options.network_gbps is not None:
        network = [Hop(options.network_latency, options.network_gbps)] * len(found)
    return PlanInputs(
        shape,
        profiles,
        tuple(budgets(options, device, found)),
        Workload(context=options.context, min_sequences=options.min_sequences),
        choices_of(options),
        Links.of(profiles, nodes, network),
        nodes,
    )


def local_plan(options: EngineOptions, store: Store) -> Plan:
    """The plan of stages that are all on this machine. HeadraceError when there is none."""
    check_kv_options(options)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, store)
    # First: what it imports is counted by what follows.
    shape = shape_in(store, dtype, options.kv_format)
    found = discover(stage_device(device), str(store.path.resolve()))
    return plan_run(options, device, [found] * options.stages, shape)


def shape_in(store: Store, dtype: str, kv_format: str) -> ModelShape:
    """The model's sizes when it computes in the type of that name. Takes seconds, to import.

    HeadraceError for a KV format that there is not, or not for this model.
    """
    fmt = resolve_kv_format(kv_format, dtype)
    import torch

    from headrace.runtime.shape import model_shape

    return model_shape(store, getattr(torch, dtype), fmt)


def kv_alternatives(options: EngineOptions, store: Store) -> dict[str, ModelShape]:
    """The model's sizes in the other KV formats that it can have, by name."""
    _, dtype = _resolve(options, store)
    found = {}
    for name in ("int8", "int4"):
        if name == options.kv_format:
            continue
        try:
            found[name] = shape_in(store, dtype, name)
        except HeadraceError:  # its heads are not made for it
            continue
    return found


def stage_device(device: str) -> str:
    """The device as a stage process sees it: Ray shows each actor its own GPU as the first one."""
    return "cuda:0" if device == "cuda" else "cpu"


def _wanted_soon(options: EngineOptions, store: Store) -> list[Path]:
    """What to read into the page cache while processes start, which takes as long as reading 10 GB.

    Nothing where the stages are elsewhere or won't read through the cache, and nothing of a store for
    which memory has no room twice: in the cache, and pinned.
    """
    through_cache = options.storage in ("auto", "buffered")
    if options.address is not None or not through_cache or 2 * store.nbytes > available_memory():
        return []
    return [block.file for block in store.present]


def _discover(
    actors: Sequence[Any], store: Store, device: str, ahead: ReadAhead, cold: ColdModel | None
) -> list[Discovery]:
    """One after the other, when all are there: stages of one machine would measure each other."""
    opening = [actor.open.remote(stage_device(device)) for actor in actors]
    gather(opening, START_SECONDS, doing="starting")
    path = str(store.path.resolve())
    if cold is not None:
        hydrate_stages(actors, store, [Hydration(path, cold)] * len(actors))
    arguments = (stage_device(device), path)
    found = []
    with ahead.paused():
        for i, actor in enumerate(actors):
            ref = actor.discover.remote(*arguments)
            payload = gather([ref], START_SECONDS, doing="measuring the machine", first=i)[0]
            found.append(decode(payload, Discovery))
    return found


def _stage_configs(
    plan: Plan,
    options: EngineOptions,
    device: str,
    dtype: str,
    found: Sequence[Discovery],
) -> list[StageConfig]:
    shared = Counter(discovery.node for discovery in found)
    memory = [budget.device_memory for budget in budgets(options, device, found)]
    return [
        StageConfig(
            store=str(options.store.resolve()),
            stage=i,
            plan=plan,
            device=stage_device(device),
            device_memory=memory[i],
            dtype=dtype,
            storage=options.storage,
            deadline=options.pass_timeout,
            threads=max(1, discovery.cores // shared[discovery.node]),
            trace=options.trace is not None,
            kv_log=log_config(options),
            cold=cold_model(options.store, options.cold),
        )
        for i, discovery in enumerate(found)
    ]


def _load(
    actors: Sequence[Any], configs: Sequence[StageConfig], store: Store, keys: Mapping[str, bytes]
) -> None:
    wanted = [config.hydration for config in configs if config.hydration is not None]
    if wanted:
        hydrate_stages(actors, store, wanted)
    refs = [
        actor.load.remote(encode(config), keys=dict(keys))
        for actor, config in zip(actors, configs, strict=True)
    ]
    deadline = configs[0].deadline
    names = gather(refs, max(deadline, START_SECONDS), doing="loading weights")
    log.info("storage: %s", names)


def _resolve(options: EngineOptions, store: Store) -> tuple[str, str]:
    device = resolve_device(options.device, options.address)
    return device, resolve_dtype(options.dtype, device, store)


@contextmanager
def _beside() -> Iterator[ThreadPoolExecutor]:
    """A thread for what takes seconds while Ray does; what it has not begun is not done at the end."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-start")
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


@contextmanager
def running_engine(
    options: EngineOptions, watch: Callable[[Sequence[Any]], None] | None = None
) -> Iterator[Engine]:
    """An engine ready for requests. Everything it started is gone when the block ends.

    `watch` is given the stages' actors before they load anything, and returns before they do.
    """
    with ExitStack() as stack:
        cold = cold_model(options.store, options.cold)
        store = open_store(options.store, cold)
        _check(options)
        times = StartTimes()
        ahead = stack.enter_context(ReadAhead(_wanted_soon(options, store)))
        beside = stack.enter_context(_beside())
        resolving = beside.submit(_resolve, options, store)
        measuring = beside.submit(lambda: shape_in(store, resolving.result()[1], options.kv_format))
        loading = beside.submit(load_tokenizer, store.path)
        stack.enter_context(ray_cluster(options.stages, options.address, options.metrics_port))
        times.ended("Ray")
        device, dtype = resolving.result()
        processes = StageProcesses(options.stages, device, store.path.name)
        actors = stack.enter_context(processes).actors
        found = _discover(actors, store, device, ahead, cold)
        times.ended("stages")
        tokenizer = loading.result()
        shape = measuring.result()
        inputs = inputs_of_run(options, device, found, shape)
        plan = inputs.plan()
        times.ended("tokenizer and plan")
        logs = None
        if plan.nvme_pages:
            logs = ActorLogs(actors)
            stack.callback(logs.close)
        log_kv(plan, options.kv_hot_window)
        if watch is not None:
            watch(actors)
        configs = _stage_configs(plan, options, device, dtype, found)
        keys = log_keys(configs[0].kv_log)
        _load(actors, configs, store, keys)
        ahead.close()
        times.ended(f"loading {read_at_start(plan)} and models' code")
        edges = Edges(
            options.stages,
            local=options.address is None,
            interface=options.interface,
            port=options.rendezvous_port,
            patience=options.heartbeat_timeout,
        )
        stack.callback(edges.close)
        edges.connect(actors)
        times.ended("connecting")
        log.info("%s", times)
        ring = RayPipeline(actors, plan, options.pass_timeout, edges.check)
        members = Members(processes, configs, ring, logs, edges, keys)
        words = shape.vocab_size
        engine = _engine(ring, plan, options, store, dtype, tokenizer, logs, members, words)
        engine.inputs = inputs
        stack.enter_context(engine)
        if processes.ring:
            stack.enter_context(EngineMetrics(engine, processes.ring))
        yield engine
        if options.kv_keep:  # not after an error
            engine.save()


def _check(options: EngineOptions) -> None:
    """HeadraceError for what a run would miss, could not write or does not know; takes no time."""
    check_tokenizer(options.store)
    check_kv_format(options.kv_format)
    check_kv_options(options)
    if options.metrics_port is not None and options.address is not None:
        raise HeadraceError(
            "--metrics-port is for a cluster of the run's own; on the cluster at --address it is `ray"
            " start --metrics-export-port` that says where each node shows metrics"
        )
    check_network(options)
    if options.trace is not None:
        from headrace.cluster.trace_file import check_writable

        check_writable(options.trace)


def _engine(
    ring: RayPipeline,
    plan: Plan,
    options: EngineOptions,
    store: Store,
    dtype: str,
    tokenizer: Any,
    logs: ActorLogs | None,
    members: Members,
    vocabulary: int,
) -> Engine:
    pipeline: Pipeline = ring
    trace = None
    if options.trace is not None:
        from headrace.cluster.trace_file import RunTrace, TracedPipeline

        trace = RunTrace(options.trace, ring)
        pipeline = TracedPipeline(ring, trace.driver)
    return Engine(
        plan,
        pipeline,
        tokenizer,
        stop_ids=stop_ids(store, tokenizer),
        digest=store.digest,
        dtype=dtype,
        tenant=options.kv_tenant,
        trace=trace,
        logs=logs,
        replacer=StageReplacer(members),
        recovery=RingRecovery(members),
        write_through=options.kv_write_through,
        vocabulary=vocabulary,
    )
