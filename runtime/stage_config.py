"""What a stage is told. Apart from the stage, whose imports take seconds that a driver can spare."""

from dataclasses import dataclass

from headrace.runtime.cold.source import ColdModel, Hydration
from headrace.scheduler.placement import Plan

TENANT = "default"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How stages keep KV pages on NVMe: each in a folder of its own in `directory`, in `cap` bytes.

    All pages are a `tenant`'s, encrypted with its key in `key_file`, or without that with one that is
    in memory only, or `plaintext`. `keep`: pages outlive the run. They go after `ttl` seconds;
    `daily_writes` bytes are written a day at most. None is no limit.
    """

    directory: str
    cap: int
    tenant: str = TENANT
    key_file: str | None = None
    plaintext: bool = False
    keep: bool = False
    ttl: float | None = None
    daily_writes: int | None = None


@dataclass(frozen=True, slots=True)
class StageConfig:
    """What a stage process needs to build itself.

    `device_memory` is the budget in bytes, which CUDA's allocator enforces. `dtype` is the compute
    type, `storage` "auto", "direct", "buffered" or "kvikio". `deadline` bounds every wait
    for another stage or for the device, in seconds. `threads` compute on a CPU. With `trace` the
    stage keeps a Trace of its newest passes. `kv_log` is for KV pages on NVMe, if there are to be any.
    What the directory `store` lacks comes from `cold`, or `from_peers`, before the stage is built.
    `adapter_host_memory` bytes keep adapters that are not on the device. Without `fp8_products` weights in
    fp8 are dequantized for every product.
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
    kv_log: LogConfig | None = None
    cold: ColdModel | None = None
    from_peers: bool = False
    adapter_host_memory: int = 0
    fp8_products: bool = True

    @property
    def hydration(self) -> Hydration | None:
        """What the stage needs of its store, and where that comes from; None where it has to be there."""
        if self.cold is None and not self.from_peers:
            return None
        placement = self.plan.placement
        return Hydration(
            self.store,
            self.cold,
            placement.layers_of(self.stage),
            first=self.stage == placement.first_stage,
            last=self.stage == placement.last_stage,
        )
