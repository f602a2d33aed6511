"""Pinned memory: whether CUDA takes a GiB of it, and how fast that crosses to the GPU.

Measured in a process of its own, since it opens a CUDA context: `python -m headrace.cluster.doctor.pinned`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from headrace.cluster.doctor.finding import Finding, NotChecked, ok, problem, run_checks, warn

AREA = "memory"
NBYTES = 1 << 30
SECONDS = 120.0
SLOW_GBPS = 10.0
"""PCIe 3 x16 reaches 12 GB/s, PCIe 4 x16 24."""


def pinned() -> Iterator[Finding]:
    yield from run_checks(AREA, [("pinned memory", _pinned)])


def _pinned() -> Iterator[Finding]:
    environment = dict(os.environ)
    if not environment.get("CUDA_VISIBLE_DEVICES", "0"):
        del environment["CUDA_VISIBLE_DEVICES"]  # Ray hides GPUs from tasks that asked for none
    try:
        done = subprocess.run(
            [sys.executable, "-m", "headrace.cluster.doctor.pinned"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        yield problem(AREA, "pinned memory", f"no answer within {SECONDS:.0f} s", "look at dmesg")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield problem(
            AREA, "pinned memory", f"1 GiB cannot be pinned: {last}", "ulimit -l unlimited"
        )
        return
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer is None:
        raise NotChecked("this torch sees no GPU")
    text = f"1 GiB pinned in {answer['seconds']:.2f} s, {answer['gbps']:.1f} GB/s to the GPU"
    if answer["gbps"] < SLOW_GBPS:
        yield warn(
            AREA, "pinned memory", text, "see PCIe above: the link is slower than PCIe 3 x16"
        )
    else:
        yield ok(AREA, "pinned memory", text)


def _measure() -> dict[str, float] | None:
    import time

    import torch

    from headrace.cluster.bench.speeds import copy_gbps
    from headrace.runtime.streaming.tiers import AlignedBuffer

    if not torch.cuda.is_available():
        return None
    torch.cuda.init()
    started = time.perf_counter()
    with AlignedBuffer(NBYTES, pinned=True):
        seconds = time.perf_counter() - started
    device = torch.device("cuda:0")
    return {"seconds": seconds, "gbps": copy_gbps([device], NBYTES)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure()) + "\n")
