"""An engine inside this process: one stage, no Ray. For profiles and to see what Ray adds."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from headrace.cluster.adapters import adapter_host_bytes, check_adapter_options
from headrace.cluster.discovery import discover
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.kv_options import check_kv_options, log_config, log_kv
from headrace.cluster.pipeline import LocalPipeline, Pending, Pipeline
from headrace.cluster.ring import Ring
from headrace.cluster.run_plan import (
    inputs_of_run,
    resolve_device,
    resolve_dtype,
    shape_in,
    stage_device,
)
from headrace.cluster.stage_logs import LocalLogs
from headrace.cluster.tokenizer import load_tokenizer, stop_ids
from headrace.runtime.kv.stage_window import open_window
from headrace.runtime.kv_log.stage_log import StageLog
from headrace.runtime.stage import Stage
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.plan import Adapter, Pass, PassResult


class _Done:
    def __init__(self, results: list[PassResult]) -> None:
        self._results = results

    def result(self) -> list[PassResult]:
        return self._results


class InlinePipeline:
    """One stage in the caller's thread, where a profiler sees its operators."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def submit(self, a_pass: Pass) -> Pending:
        return _Done([self._stage.run(self._stage.prepare(a_pass))])

    def wait_host_tier(self) -> None:
        self._stage.wait_host_tier()

    def check_adapter(self, adapter: Adapter) -> None:
        self._stage.check_adapter(adapter)

    def close(self) -> None:
        self._stage.close()


def threaded(stage: Stage) -> Pipeline:
    return LocalPipeline([stage])


@contextmanager
def local_engine(
    options: EngineOptions, make_pipeline: Callable[[Stage], Pipeline] = threaded
) -> Iterator[Engine]:
    """What running_engine gives, with its one stage in this process."""
    assert options.stages == 1, "several stages need processes of their own"
    check_kv_options(options)
    check_adapter_options(options)
    store = Store.open(options.store)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, store)
    found = discover(stage_device(device), str(store.path.resolve()))
    shape = shape_in(store, dtype, options.kv_format)
    inputs = inputs_of_run(options, device, [found], shape)
    plan = inputs.plan()
    log_kv(plan, options.kv_hot_window)
    config = StageConfig(
        store=str(store.path),
        stage=0,
        plan=plan,
        device=stage_device(device),
        device_memory=options.device_memory or found.device_free,
        dtype=dtype,
        storage=options.storage,
        deadline=options.pass_timeout,
        threads=torch.get_num_threads(),
        kv_log=log_config(options),
        adapter_host_memory=adapter_host_bytes(options),
        fp8_products=options.fp8_products,
    )
    tokenizer = load_tokenizer(store.path)
    with ExitStack() as opened:
        log = None if config.kv_log is None else opened.enter_context(StageLog(config))
        window = None if log is None else open_window(config, log)
        if window is not None:
            opened.enter_context(window)
        stage = Stage(config, pages=log, window=window)
        pipeline = make_pipeline(stage)
        engine = Engine(
            Ring(
                plan,
                pipeline,
                None if log is None else LocalLogs([stage], [log]),
                inputs=inputs,
                traces=pipeline if isinstance(pipeline, LocalPipeline) else None,
            ),
            tokenizer,
            stop_ids=stop_ids(store, tokenizer),
            digest=store.digest,
            dtype=dtype,
            tenant=options.kv_tenant,
            vocabulary=shape.vocab_size,
        )
        opened.enter_context(engine).load_adapters(options.adapters)
        yield engine
        if options.kv_keep:
            engine.save()
