"""Time paged attention on a GPU, in the shape of a 70B model, against what the device could do.

    python benchmarks/attention.py [--bandwidth 4.0e12] [--compute 8.0e14]

Decodes are bound by reading keys and values, prefill by the matrix products of the causal half.
The bounds are measured first: a copy in device memory, and a product of matrices in bf16.
"""

import argparse
from collections.abc import Callable

import torch

from headrace.runtime import attention_triton
from headrace.runtime.attention import Rule
from headrace.runtime.batch import Batch
from headrace.runtime.kv_store import KVStore
from headrace.runtime.probe import matmul_tflops, memory_gbps
from headrace.runtime.store import LayerShape
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

HEADS, KV_HEADS, DIM = 64, 8, 128
SHAPE = LayerShape(KV_HEADS, DIM, DIM, 0, 0, 0)
CUDA = torch.device("cuda")


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call, by events."""
    for _ in range(3):
        work()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def run(sequences: int, past: int, new: int, bandwidth: float, compute: float) -> None:
    end = past + new
    pages = -(-end // PAGE_TOKENS)
    order = torch.randperm(sequences * pages).tolist()
    slices = tuple(
        Slice(i, past, (0,) * new, tuple(order[i * pages : (i + 1) * pages]), None)
        for i in range(sequences)
    )
    batch = Batch.build(MicroBatch(slices), CUDA)
    tokens = sequences * new
    with KVStore({0: SHAPE}, sequences * pages, torch.bfloat16, CUDA) as store:
        kv = store.layer(0)
        kv.k.normal_()
        kv.v.normal_()
        q = torch.randn(tokens, HEADS, DIM, dtype=torch.bfloat16, device=CUDA)
        k, v = (q[:, :KV_HEADS].contiguous() for _ in range(2))
        rule = Rule(DIM**-0.5)
        writing = seconds(lambda: attention_triton.write(k, v, kv, batch))
        attending = seconds(lambda: attention_triton.attend(q, kv, batch, rule))
    moved = sequences * end * KV_HEADS * DIM * 2 * 2 + 2 * q.nbytes
    scores = sequences * (new * past + new * (new + 1) // 2)
    flops = 4 * scores * HEADS * DIM
    bound = max(moved / bandwidth, flops / compute)
    print(
        f"{sequences:4d} sequences, {past:5d} + {new:4d} tokens: attend {attending * 1e6:8.1f} us, "
        f"{moved / attending / 1e9:7.0f} GB/s, {flops / attending / 1e12:6.1f} TFLOP/s, "
        f"{bound / attending:5.0%} of the bound; write {writing * 1e6:6.1f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, help="bytes/s; measured when left out")
    parser.add_argument("--compute", type=float, help="FLOP/s; measured when left out")
    args = parser.parse_args()
    bandwidth = args.bandwidth or memory_gbps(CUDA) * 1e9
    compute = args.compute or matmul_tflops(CUDA, torch.bfloat16) * 1e12
    print(
        f"{torch.cuda.get_device_name()}: {bandwidth / 1e9:.0f} GB/s, {compute / 1e12:.0f} TFLOP/s"
    )
    for sequences, past, new in (
        (256, 159, 1),
        (256, 1023, 1),
        (16, 4095, 1),
        (1, 32767, 1),
        (32, 1016, 8),
        (128, 0, 256),
        (4, 0, 4096),
        (1, 30720, 2048),
    ):
        run(sequences, past, new, bandwidth, compute)


if __name__ == "__main__":
    main()
