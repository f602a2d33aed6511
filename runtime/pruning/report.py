"""What a pruning took away, and what is gained by it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace.runtime.block_file import DTYPE_BYTES, write_durably
from headrace.runtime.cold.chunks import MOST_BYTES
from headrace.runtime.cold.codec import encode
from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.plan import BlockPlan, Options, plan_conversion
from headrace.runtime.conversion.writer import stored_bytes
from headrace.runtime.pruning.choice import Request
from headrace.runtime.pruning.statistics import Statistics
from headrace.runtime.pruning.surgery import Stays, Subject
from headrace.runtime.pruning.units import head_groups, neurons
from headrace.scheduler.errors import StoreError

REPORT = "headrace-prune.json"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """A layer of the whole model. `became` is its index now, None where it is gone; `influence` is None where
    no text was needed. Neurons, and groups of heads by index, that are gone."""

    layer: int
    influence: float | None
    became: int | None
    neurons_gone: int
    groups_gone: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ColdTier:
    """Bytes of the matrices of some `layers` (of the pruned model), and what they take in a cold tier, compressed:
    as they would be `without` zeros, and `with_zeros`."""

    layers: tuple[int, ...]
    nbytes: int
    without: int
    with_zeros: int


@dataclass(frozen=True, slots=True)
class Cost:
    """How far the pruned model is from the whole one, over `predicted` tokens of these `texts`: KL divergence
    in nats, and the share of tokens of which both predict the same most."""

    texts: tuple[str, ...]
    predicted: int
    perplexity_before: float
    perplexity_after: float
    mean_kld: float
    top1: float


@dataclass(frozen=True, slots=True)
class Report:
    """Bytes are those of weights: `before`, `after` in the format that they had, and `stored` in the store's.

    `zeros` is the share of the layers' matrices that became zero, where a pattern was asked for.
    """

    request: dict[str, Any]
    calibration_tokens: int
    layers: tuple[LayerReport, ...]
    before: int
    after: int
    stored: int
    zeros: str | None
    cold_tier: ColdTier | None
    cost: Cost | None = None


def write_report(store: Path, report: Report) -> None:
    data = json.dumps(asdict(report), indent=2).encode() + b"\n"
    write_durably(store / REPORT, data)


def read_report(store: Path) -> Report:
    """Raises StoreError when the report in the store is damaged."""
    file = store / REPORT
    try:
        return msgspec.json.decode(file.read_bytes(), type=Report)
    except msgspec.MsgspecError as error:
        raise StoreError(f"{file} is damaged ({error}); delete {store} and prune again") from error


def make_report(
    subject: Subject,
    pruned: Checkpoint,
    options: Options,
    request: Request,
    stays: Stays,
    found: Statistics | None,
) -> Report:
    cold = None
    if stays.pattern is not None:
        dense = Stays(stays.layers, stays.neurons, stays.groups)
        cold = _cold_tier(subject.without(dense), pruned, options)
    return Report(
        request=request.as_json(),
        calibration_tokens=found.tokens if found else 0,
        layers=tuple(_layer(subject, stays, found, i) for i in range(len(subject.layers))),
        before=_bytes_of_checkpoint(subject.checkpoint, subject.weights),
        after=_bytes_of_checkpoint(pruned, pruned.weights),
        stored=sum(
            part.entry.nbytes
            for block in plan_conversion(pruned, options).blocks
            for weight in block.weights
            for part in weight.parts
        ),
        zeros=str(stays.pattern) if stays.pattern else None,
        cold_tier=cold,
    )


def _layer(subject: Subject, stays: Stays, found: Statistics | None, layer: int) -> LayerReport:
    became = stays.layers.index(layer) if layer in stays.layers else None
    neurons_gone, groups_gone = 0, ()  # type: int, tuple[int, ...]
    if became is not None and stays.neurons:
        neurons_gone = neurons(subject.layers[layer]).count - len(stays.neurons[layer])
    if became is not None and stays.groups:
        kept = set(stays.groups[layer].tolist())
        count = head_groups(subject.layers[layer], subject.kv_heads).count
        groups_gone = tuple(group for group in range(count) if group not in kept)
    influence = found.influence[layer] if found else None
    return LayerReport(layer, influence, became, neurons_gone, groups_gone)


def _bytes_of_checkpoint(checkpoint: Checkpoint, weights: Any) -> int:
    return sum(data.nbytes for weight in weights.values() for _, data in weight.parts)


def _cold_tier(dense: Checkpoint, pruned: Checkpoint, options: Options) -> ColdTier:
    """Measured on the first, a middle and the last layer: all of them would take long."""
    plans = [plan_conversion(checkpoint, options) for checkpoint in (dense, pruned)]
    count = len(plans[0].layer_shapes)
    chosen = tuple(sorted({0, count // 2, count - 1}))
    # The first block is the embedding.
    without, zeros = ([_compressed(plan.blocks[1 + layer]) for layer in chosen] for plan in plans)
    return ColdTier(
        chosen,
        sum(nbytes for nbytes, _ in zeros),
        sum(stored for _, stored in without),
        sum(stored for _, stored in zeros),
    )


def _compressed(block: BlockPlan) -> tuple[int, int]:
    """(bytes, bytes in a cold tier) of a layer's matrices."""
    sizes = [_compressed_weight(w) for w in block.weights if len(w.source.shape) > 1]
    return sum(nbytes for nbytes, _ in sizes), sum(stored for _, stored in sizes)


def _compressed_weight(weight: WeightPlan) -> tuple[int, int]:
    widths = {part.entry.name: DTYPE_BYTES[part.entry.dtype] for part in weight.parts}
    nbytes = stored = 0
    waiting: dict[str, bytearray] = {}
    for name, piece in stored_bytes(weight):
        here = waiting.setdefault(name, bytearray())
        here += piece
        nbytes += len(piece)
        while len(here) >= MOST_BYTES:
            stored += _object_bytes(bytes(here[:MOST_BYTES]), widths[name])
            del here[:MOST_BYTES]
    for name, rest in waiting.items():
        stored += _object_bytes(bytes(rest), widths[name]) if rest else 0
    return nbytes, stored


def _object_bytes(data: bytes, width: int) -> int:
    return len(encode(data, [(width, len(data))]))
