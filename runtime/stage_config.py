"""What a stage is told. Apart from the stage, whose imports take seconds that a driver can spare."""

from dataclasses import dataclass

from headrace.scheduler.placement import Plan


@dataclass(frozen=True, slots=True)
class StageConfig:
    """What a stage process needs to build itself.

    `device_memory` is the budget in bytes, which CUDA's allocator enforces. `dtype` is the compute
    type, `storage` "auto", "direct", "buffered" or "kvikio". `deadline` bounds every wait
    for another stage or for the device, in seconds. `threads` compute on a CPU. With `trace` the
    stage keeps a Trace of its newest passes.
    """

    store: str
    stage: int
    plan: Plan
    device: str
    device_memory: int
    dtype: str
    storage: str
    deadline: float
    threads: int
    trace: bool = False
