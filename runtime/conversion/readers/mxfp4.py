"""MXFP4 as gpt-oss has it: stacks of experts, each matrix transposed against transformers' parameter.

    X_blocks  U8 [experts, rows, blocks, 16], 32 codes of a row in a block, the even one in the low nibble
    X_scales  U8 [experts, rows, blocks], exponents of two plus 127

(transformers/integrations/mxfp4.py; OCP Microscaling Formats 1.0.)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from headrace.runtime.conversion.readers.packing import UNREADABLE, needed, repacked
from headrace.runtime.conversion.source import Imported, SourceWeight, Tensors
from headrace.runtime.weights.small_floats import MX_BLOCK
from headrace.scheduler.errors import StoreError


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    weights, used = [], set()
    for name in tensors:
        stem = name.removesuffix("_blocks")
        if stem != name:
            weights.append(_weight(stem, tensors))
            used |= {name, f"{stem}_scales"}
    return Imported(weights, frozenset(used))


def _weight(stem: str, tensors: Tensors) -> SourceWeight:
    data = tensors[f"{stem}_blocks"]
    scale = needed(tensors, f"{stem}_scales", "MXFP4")
    if len(data.shape) != 4 or data.shape[3] != MX_BLOCK // 2 or scale.shape != data.shape[:3]:
        raise StoreError(
            f"{stem} has MXFP4 blocks {list(data.shape)} and scales {list(scale.shape)}, which is not read "
            f"here, only stacks of experts with blocks of {MX_BLOCK}; {UNREADABLE}"
        )
    experts, rows, blocks, _ = data.shape

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for run in data.rows():
            yield "data", run << 4 | run >> 4
        yield "scale", scale.tensor()

    others = {"scale": ("U8", (experts * rows, blocks))}
    shape = (experts, blocks * MX_BLOCK, rows)
    return repacked(stem, "mxfp4", shape, data, others, pieces, {"turned": True})
