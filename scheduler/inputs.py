"""What a plan is made from: the model's sizes, the machines' speeds, the budgets and the wishes."""

from dataclasses import dataclass, replace
from typing import Literal

DEFAULT_CONTEXT = 1024

PLACEMENTS = ("auto", "cyclic", "contiguous")

KV_LOG_BYTES = 32 << 20
"""Most host memory of a stage for KV pages on their way to NVMe: small ones wait to be written together."""

Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's routed experts, each of which can be read without the others.

    `count` of them, of which a token reaches `per_token`; `dense_bytes` is what every token needs of
    the layer, `expert_bytes` the largest read of one expert.
    """

    count: int
    per_token: int
    dense_bytes: int
    expert_bytes: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model as stored, in bytes unless said otherwise. Tuples have one entry a layer.

    `layer_bytes`: the layer's aligned block in the store, which is what is loaded and kept.
    `layer_kv_bytes`: one page (64 tokens) of the layer in `kv_format`. `layer_tail_bytes`: one page
    in the compute type, which each sequence needs for its newest where others are quantized.
    `layer_parameters`, `layer_active_parameters`: matrix elements, and those that one token uses.
    `largest_matrix`: elements of the largest matrix that is dequantized at once.
    `head_bytes`: final norm and LM head as they lie on the device; `tied_bytes` of them are the embedding's, which
    a stage that embeds on its CPU has already.
    `intermediate_size`: columns that one token takes in the MLP (top-k experts together).
    `attention_size`: columns that one token takes where attention multiplies latents (0: it does not).
    `compute_bytes`: bytes of one element of the compute dtype.
    `needs_scratch`: whether matrices have to be dequantized before a matmul.
    `layer_adapter_columns`: rows and columns together of all matrices that an adapter may change;
    `layer_adapter_bytes`: what the slots for adapters take of the device (empty: there are none).
    `experts`: None for a layer whose experts, if any, cannot be read alone; empty: so are all.
    """

    layer_bytes: tuple[int, ...]
    layer_kv_bytes: tuple[int, ...]
    layer_parameters: tuple[int, ...]
    layer_active_parameters: tuple[int, ...]
    largest_matrix: int
    embed_bytes: int
    head_bytes: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    max_context: int
    compute_bytes: int
    needs_scratch: bool
    kv_format: str
    experts: tuple[Experts | None, ...] = ()
    layer_tail_bytes: tuple[int, ...] = ()
    attention_size: int = 0
    tied_bytes: int = 0
    layer_adapter_columns: tuple[int, ...] = ()
    layer_adapter_bytes: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    def with_adapters(self, slots: int, rank: int) -> "ModelShape":
        """With room for so many adapters on the device: of each matrix [N, K], [slots, rank, K] and
        [slots, rank, N] elements of the compute type."""
        each = slots * rank * self.compute_bytes
        sizes = tuple(columns * each for columns in self.layer_adapter_columns)
        return replace(self, layer_adapter_bytes=sizes if each else ())

    @property
    def can_split(self) -> bool:
        """Whether any layer's experts can be read alone."""
        return any(self.experts)

    def is_mixture(self, layer: int) -> bool:
        """Whether a token uses only some of the layer's matrices."""
        return self.layer_active_parameters[layer] < self.layer_parameters[layer]

    def experts_of(self, layer: int) -> Experts | None:
        return self.experts[layer] if self.experts else None

    def held_bytes(self, *, split: bool) -> tuple[int, ...]:
        """What rests in a layer's tier and passes through a ring: all of it, or all but experts."""
        if not split:
            return self.layer_bytes
        own = (self.experts_of(layer) for layer in range(self.num_layers))
        return tuple(
            whole if experts is None else experts.dense_bytes
            for whole, experts in zip(self.layer_bytes, own, strict=True)
        )

    @property
    def expert_bytes(self) -> int:
        """The largest read of one expert in any layer."""
        return max((experts.expert_bytes for experts in self.experts if experts), default=0)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Measured speeds of one stage's machine; GB/s are 1e9 bytes a second.

    `host_gbps` is pinned host RAM to device, on a CPU a memcpy. `hbm_gbps` counts bytes read and
    bytes written. `hop_seconds` is the latency of handing hidden states to the next stage,
    `link_gbps` the rate after that. `layer_seconds` is what a layer takes a micro-batch beside its
    arithmetic and its bytes: to launch its kernels and to run the code around them.
    `least_rows` are what a float32 product computes of fewer rows, too (headrace.runtime.product).
    """

    kind: Kind
    nvme_gbps: float
    host_gbps: float
    tflops: float
    hbm_gbps: float
    hop_seconds: float
    link_gbps: float
    layer_seconds: float = 0.0
    least_rows: int = 1

    def shared_by(self, stages: int) -> "DeviceProfile":
        """One stage's share when `stages` of them run on one host.

        They share its drive; stages on CPUs share its cores and memory, too; each GPU is its own.
        """
        if self.kind == "cuda":
            return replace(self, nvme_gbps=self.nvme_gbps / stages)
        return replace(
            self,
            nvme_gbps=self.nvme_gbps / stages,
            host_gbps=self.host_gbps / stages,
            tflops=self.tflops / stages,
            hbm_gbps=self.hbm_gbps / stages,
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that one stage may use. `kv_host_memory` of its host memory is for KV pages, `kv_disk` of
    its drive, `adapter_host_memory` of its host memory for adapters.

    `process_bytes` is reported, not planned with.
    """

    device_memory: int
    host_memory: int
    process_bytes: int = 0
    kv_host_memory: int = 0
    kv_disk: int = 0
    adapter_host_memory: int = 0

    @property
    def kv_log(self) -> int:
        """Host memory for pages on their way to the drive."""
        return KV_LOG_BYTES if self.kv_disk else 0

    @property
    def host_weights(self) -> int:
        """Host memory for weights."""
        others = self.kv_host_memory + self.kv_log + self.adapter_host_memory
        return self.host_memory - others


@dataclass(frozen=True, slots=True)
class Workload:
    """What the run will look like: tokens that a sequence reaches, and how many sequences at once.

    `context` None: DEFAULT_CONTEXT, or what the model allows. `max_sequences` None: as many as
    still raise the throughput. `min_sequences` have room even where fewer are faster, if all of
    them fit.
    """

    context: int | None = None
    max_sequences: int | None = None
    min_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user settles rather than the planner; None leaves it to the planner.

    `placement` is one of PLACEMENTS. `token_budget` and `max_sequences` are per pass.
    `resident_layers` of each stage stay on its device (all of them, if it has fewer) and the others
    are streamed, whatever room there is; 0 streams everything. Of layers that are split, they stay
    without their experts, which have the room that is left; with 0, room for one layer's to be
    loaded ahead. Of sequences that decode over pages that are not on the device, those older than
    `kv_hot_window` tokens may lie on NVMe; None: none may. `drafts` a decode carries at most; None: a few, where they cost
    nothing. `adapter_slots` adapters of up to `adapter_rank` are on each stage's device at once. `stage_layers` are how many layers each stage has; None: as many as is fastest. `graphs`: decodes as CUDA graphs; None makes them on CUDA, where they take little of
    the device's memory.
    """

    placement: str = "auto"
    token_budget: int | None = None
    max_sequences: int | None = None
    micro_batches: int | None = None
    resident_layers: int | None = None
    graphs: bool | None = None
    kv_hot_window: int | None = None
    drafts: int | None = None
    stage_layers: tuple[int, ...] | None = None
    adapter_slots: int = 0
    adapter_rank: int = 0
