"""What a user chooses of an engine. Light to import: the command line looks at it before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headrace.runtime.stage_config import TENANT
from headrace.scheduler.inputs import KV_LOG_BYTES


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user chooses. Memory in bytes per stage; None takes what discovery finds free.

    `context` is the longest sequence to be served (prompt and output), None the model's own;
    `min_sequences` at once have room for their KV, if they can; `kv_host_memory` of each stage's host
    memory is for KV pages that have to leave its device, 0 leaves it to weights; `kv_format` is one of KV_FORMATS;
    `kv_directory` is for KV pages on NVMe, at most `kv_disk` bytes a stage, encrypted unless `kv_plaintext`;
    `kv_keep` lets them outlive the run, under keys in `kv_key_file`; they are `kv_tenant`'s, and go after
    `kv_ttl` seconds; of sequences that decode over pages that are not on the device, those older than
    `kv_hot_window` tokens may lie there, too (None: they do not); with `kv_write_through` every full page is
    written there, so that what a stage that dies had of it is read and not computed again; at most `kv_daily_writes` bytes a day are written by each stage;
    `graphs` launches decodes as CUDA graphs, None wherever they can be had for little memory;
    `fp8_products` multiplies weights in fp8 without dequantizing them, by rows in fp8, where the checkpoint was made for
    that and the GPU does it;
    `ngram_speculation` is how many guessed tokens a decode carries at most, 0 none, None a few where they
    cost nothing;
    `stage_layers` are how many layers each stage has, None as many as is fastest;
    `network_gbps` and `network_latency` (seconds) are of the network between nodes, None has it measured
    where stages are on several;
    `address` is the Ray cluster to join, None to start one for this engine alone on this machine;
    on it stages find each other at `rendezvous_port` of this machine, say at the next one that they live (0: free
    ones), and speak over the network `interface` of that name or in that network, which None leaves to Ray's address of each machine;
    `metrics_port` is where such a cluster of its own shows metrics, None any free port;
    no pass may take more than `pass_timeout` seconds, and a stage that is not heard of for `heartbeat_timeout`
    seconds while it is waited for is replaced;
    `trace` a file to write, when the engine closes, for Perfetto;
    `cold` is the URL[#NAME] from which each node fetches what its store lacks, None where the store was
    pulled from, if it was; with `from_peers` from nodes of the cluster that have it;
    `adapters` are LoRA adapters by name, in directories that every stage's node has; `adapter_slots` of them are on
    each device at once (None: as many as are named, at most 8), of ranks up to `adapter_rank` (None: theirs);
    `adapter_host_memory` bytes of each stage's host memory keep others (None: 256 MiB).
    """

    store: Path
    stages: int = 1
    device: str = "auto"
    dtype: str = "auto"
    kv_format: str = "auto"
    device_memory: int | None = None
    host_memory: int | None = None
    kv_host_memory: int = 0
    kv_directory: Path | None = None
    kv_disk: int = 0
    kv_keep: bool = False
    kv_key_file: Path | None = None
    kv_plaintext: bool = False
    kv_tenant: str = TENANT
    kv_ttl: float | None = None
    kv_daily_writes: int | None = None
    kv_hot_window: int | None = None
    kv_write_through: bool = False
    placement: str = "auto"
    token_budget: int | None = None
    max_sequences: int | None = None
    min_sequences: int = 1
    micro_batches: int | None = None
    resident_layers: int | None = None
    stage_layers: tuple[int, ...] | None = None
    context: int | None = None
    storage: str = "auto"
    graphs: bool | None = None
    fp8_products: bool = True
    ngram_speculation: int | None = 0
    network_gbps: float | None = None
    network_latency: float = 3e-4
    address: str | None = None
    interface: str | None = None
    rendezvous_port: int = 0
    metrics_port: int | None = None
    pass_timeout: float = 600.0
    heartbeat_timeout: float = 30.0
    trace: Path | None = None
    cold: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    adapter_slots: int | None = None
    adapter_rank: int | None = None
    adapter_host_memory: int | None = None
    from_peers: bool = False

    @property
    def kv_host_bytes(self) -> int:
        """A stage's host memory for KV pages, in slots and on their way to NVMe."""
        return self.kv_host_memory + (KV_LOG_BYTES if self.kv_disk else 0)
