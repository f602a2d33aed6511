"""What a pass of a mixture streams: whole layers, or what its tokens reach of their experts.

    python benchmarks/experts.py --directory /mnt/nvme --slots 0 16 128 --host-experts 256
    python benchmarks/experts.py --shape qwen3-30b --layers 8 --device cuda --dtype bfloat16 --sequences 1 32

Random NF4 weights, one stage, decodes only. Prints one JSON object for each number of device slots
(0: whole layers) and of sequences. Tokens are random, but random weights send most of them to the
same experts: bytes of real models lie between these and E (1 - (1 - k / E)^T) experts a layer.
"""

import argparse
import json
import tempfile
from pathlib import Path
from random import Random
from statistics import median

from headrace.cluster.bench.random_store import write_store
from headrace.cluster.bench.shapes import config_of
from headrace.runtime.expert_extents import SplitBlock, split_block
from headrace.runtime.stage import Stage
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import PLAIN
from headrace.scheduler.placement import (
    Placement,
    Plan,
    Prediction,
    StageMemory,
    Tier,
    contiguous_visits,
)
from headrace.scheduler.plan import MicroBatch, Pass, Sampling, Slice, StageTimes

SMALL = (
    "hidden_size=1024", "num_attention_heads=16", "head_dim=64", "moe_intermediate_size=512",
    "num_experts=64", "num_experts_per_tok=4", "vocab_size=2048",
)  # fmt: skip
"""A Qwen3 MoE whose experts take 0.83 MB: 0.47 GB in 8 layers."""

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())
WARM_UP = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", help="of `headrace bench`; default: a small Qwen3 MoE")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--directory", type=Path, help="where the store goes (default: $TMPDIR)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--storage", default="direct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 16, 128])
    parser.add_argument("--host-experts", type=int, default=0)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--passes", type=int, default=20)
    return parser.parse_args()


def make_plan(store: Store, slots: int, host_experts: int, sequences: int, kv_format: str) -> Plan:
    layers = len(store.layers)
    splits: list[SplitBlock | None] = [split_block(b) if slots else None for b in store.layers]
    sizes = [
        block.nbytes if split is None else split.dense.nbytes
        for block, split in zip(store.layers, splits, strict=True)
    ]
    experts = [extent.nbytes for split in splits if split for extent in split.experts]
    return Plan(
        placement=Placement(1, contiguous_visits(layers, 1, 1), (Tier.NVME,) * layers),
        slot_bytes=max(sizes),
        ring_slots=(2,),
        num_pages=sequences,
        kv_format=kv_format,
        max_context=64,
        token_budget=sequences,
        max_sequences=sequences,
        micro_batches=1,
        micro_batch_tokens=sequences,
        logit_rows=sequences,
        sample_rows=sequences,
        graph_rows=0,
        passes_in_flight=1,
        ahead=0,
        memory=(StageMemory(0, 0, 0, 0, 0, 0, 0, 0, 0),),
        nvme_bytes_a_pass=(sum(sizes),),
        host_bytes_a_pass=(0,),
        prediction=Prediction(sequences, 0.0, 0.0, "nvme", {}),
        expert_slot_bytes=max(experts, default=0),
        expert_slots=(slots,),
        host_experts=(host_experts if slots else 0,),
    )


def decode(step: int, sequences: int, vocab: int) -> Pass:
    random = Random(step)
    slices = (Slice(i, step, (random.randrange(vocab),), (i,), GREEDY) for i in range(sequences))
    return Pass(step, (MicroBatch(tuple(slices)),))


def measure(store: Store, plan: Plan, arguments: argparse.Namespace) -> list[StageTimes]:
    config = StageConfig(
        store=str(store.path),
        stage=0,
        plan=plan,
        device=arguments.device,
        device_memory=0,
        dtype=arguments.dtype,
        storage=arguments.storage,
        deadline=600.0,
        threads=arguments.threads,
    )
    vocab = int(store.config["vocab_size"])
    with Stage(config) as stage:
        stage.wait_host_tier()
        steps = range(min(WARM_UP + arguments.passes, plan.max_context))
        times = [
            stage.run(stage.prepare(decode(step, plan.max_sequences, vocab))).times
            for step in steps
        ]
    return times[WARM_UP:]


def report(times: list[StageTimes], slots: int, sequences: int) -> None:
    total = times[0]
    for more in times[1:]:
        total = total.plus(more)
    count = len(times)
    result = {
        "slots": slots,
        "sequences": sequences,
        "nvme_mb_a_pass": round(total.nvme_bytes / count / 1e6, 1),
        "host_mb_a_pass": round(total.host_bytes / count / 1e6, 1),
        "median_seconds_a_pass": round(median(each.total for each in times), 4),
        "median_seconds_waited": round(median(each.weights_wait for each in times), 4),
        "experts_used_a_pass": round(total.experts_used / count, 1),
        "experts_loaded_a_pass": round(total.experts_loaded / count, 1),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    arguments = parse()
    shape, settings = (arguments.shape, ()) if arguments.shape else ("qwen3-30b", SMALL)
    config = config_of(shape, arguments.layers, settings)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        store = write_store(Path(folder) / "store", config, "nf4")
        for sequences in arguments.sequences:
            for slots in arguments.slots:
                plan = make_plan(
                    store, slots, arguments.host_experts, sequences, PLAIN[arguments.dtype]
                )
                report(measure(store, plan, arguments), slots, sequences)


if __name__ == "__main__":
    main()
