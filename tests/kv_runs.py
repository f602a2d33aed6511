"""Engines over real stages of this process with real KV logs, and what requests of them answer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from architectures import tiny_model
from rings import local_ring

from headrace.cluster.engine import Engine
from headrace.cluster.ring import Ring
from headrace.cluster.stage_logs import LocalLogs
from headrace.runtime.conversion.convert import convert
from headrace.runtime.kv.stage_window import open_window
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.kv_log.stage_log import StageLog
from headrace.runtime.stage_config import LogConfig, StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import MoveKind
from headrace.scheduler.request import SamplingParams

CAP = 64 << 20


def wide_llama(folder: Path) -> Path:
    """A store of a tiny model whose pages are large enough to be written at once: hundreds of KiB."""
    tiny_model("llama", head_dim=256, num_hidden_layers=4).save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store"


class NoText:
    """A tokenizer where only tokens matter."""

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        return ""


@contextmanager
def paged_engine(
    store: Path, plan: Plan, kv_log: LogConfig | None = None, tenant: str = ""
) -> Iterator[Engine]:
    """As running_engine, with threads for processes."""
    with ExitStack() as stack:
        logs: list[StageLog] = []
        windows: list[PageWindow | None] = []
        for stage in range(plan.placement.num_stages if kv_log else 0):
            config = StageConfig(
                store=str(store),
                stage=stage,
                plan=plan,
                device="cpu",
                device_memory=0,
                dtype="float32",
                storage="auto",
                deadline=60.0,
                threads=torch.get_num_threads(),
                kv_log=kv_log,
            )
            logs.append(stack.enter_context(StageLog(config)))
            windows.append(open_window(config, logs[-1]))
            if windows[-1] is not None:
                stack.enter_context(windows[-1])
        pipeline = stack.enter_context(local_ring(store, plan, logs=logs, windows=windows))
        engine = Engine(
            Ring(plan, pipeline, LocalLogs(pipeline._stages, logs) if logs else None),
            NoText(),
            stop_ids=frozenset(),
            digest=Store.open(store).digest,
            dtype="float32",
            tenant=tenant,
        )
        yield stack.enter_context(engine)
        if kv_log is not None and kv_log.keep:
            engine.save()


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


def answers(
    engine: Engine, prompts: Sequence[list[int]], new: int, *, keep: bool = False
) -> list[list[int]]:
    """Greedy, all at once."""
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    ids = [engine.add(tokens, params, seed=i, keep=keep) for i, tokens in enumerate(prompts)]
    done = {}
    while engine.has_work:
        done |= {completion.request_id: completion.token_ids for completion in engine.step()}
    return [done[request_id] for request_id in ids]


def assert_moved(kv: KVStats, *kinds: MoveKind) -> None:
    assert all(kv.moved[kind] for kind in kinds), kv
