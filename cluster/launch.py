"""Starts an engine: processes first, then what they measure, then the plan, then the weights.

Nothing here imports torch before Ray is starting: both take seconds, and need not take them in turn.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cluster.adapters import check_adapter_options
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.hydration import cold_model, open_store
from headrace.cluster.kv_options import check_kv_options
from headrace.cluster.network_options import check_network
from headrace.cluster.processes import ray_cluster
from headrace.cluster.ring_start import RingStarter, RunModel, Watch
from headrace.cluster.run_plan import resolve, shape_in
from headrace.cluster.start_times import StartTimes
from headrace.cluster.telemetry.engine_metrics import EngineMetrics
from headrace.cluster.tokenizer import check_tokenizer, load_tokenizer, stop_ids
from headrace.runtime.store import Store
from headrace.runtime.streaming.page_cache import ReadAhead, available_memory
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.kv_format import check_kv_format

if TYPE_CHECKING:
    from headrace.cluster.trace_file import RunTrace  # imports torch: a driver has no time yet

log = logging.getLogger(__name__)


@contextmanager
def running_engine(options: EngineOptions, watch: Watch | None = None) -> Iterator[Engine]:
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
        resolving = beside.submit(resolve, options, store)
        measuring = beside.submit(lambda: shape_in(store, resolving.result()[1], options.kv_format))
        stack.enter_context(ray_cluster(options.stages, options.address, options.metrics_port))
        times.ended("Ray")
        # Not before: it imports transformers, with a core that Ray's own processes start on.
        loading = beside.submit(load_tokenizer, store.path)
        model = RunModel(store, cold, *resolving.result(), measuring)
        starter = stack.enter_context(RingStarter(options, model, ahead, times, watch))
        ring = starter.start(options.stages)
        tokenizer = loading.result()
        times.ended("tokenizer")
        log.info("%s", times)
        engine = Engine(
            ring,
            tokenizer,
            stop_ids=stop_ids(store, tokenizer),
            digest=store.digest,
            dtype=model.dtype,
            tenant=options.kv_tenant,
            trace=_run_trace(options),
            rebuild=starter.start_smaller,
            write_through=options.kv_write_through,
            vocabulary=measuring.result().vocab_size,
        )
        stack.enter_context(engine)
        engine.load_adapters(options.adapters)
        if starter.name:
            stack.enter_context(EngineMetrics(engine, starter.name))
        yield engine
        if options.kv_keep:  # not after an error
            engine.save()


def _run_trace(options: EngineOptions) -> "RunTrace | None":
    if options.trace is None:
        return None
    from headrace.cluster.trace_file import RunTrace

    return RunTrace(options.trace)


def _check(options: EngineOptions) -> None:
    """HeadraceError for what a run would miss, could not write or does not know; takes no time."""
    check_tokenizer(options.store)
    check_kv_format(options.kv_format)
    check_kv_options(options)
    check_adapter_options(options)
    if options.metrics_port is not None and options.address is not None:
        raise HeadraceError(
            "--metrics-port is for a cluster of the run's own; on the cluster at --address it is `ray"
            " start --metrics-export-port` that says where each node shows metrics"
        )
    check_network(options)
    if options.trace is not None:
        from headrace.cluster.trace_file import check_writable

        check_writable(options.trace)


@contextmanager
def _beside() -> Iterator[ThreadPoolExecutor]:
    """A thread for what takes seconds while Ray does; what it has not begun is not done at the end."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-start")
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


def _wanted_soon(options: EngineOptions, store: Store) -> list[Path]:
    """What to read into the page cache while processes start, which takes as long as reading 10 GB.

    Nothing where the stages are elsewhere or won't read through the cache, and nothing of a store for
    which memory has no room twice: in the cache, and pinned.
    """
    through_cache = options.storage in ("auto", "buffered")
    if options.address is not None or not through_cache or 2 * store.nbytes > available_memory():
        return []
    return [block.file for block in store.present]
