"""AWQ, in AutoAWQ's layout for its GEMM kernel.

    X.qweight  I32 [columns, rows / 8], rows 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest bits up
    X.qzeros   I32 [groups, rows / 8], likewise
    X.scales   F16 or BF16 [groups, rows]

(awq/modules/linear/gemm.py.)
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.conversion.readers.affine import AffineWeight, Scales
from headrace.runtime.conversion.readers.packing import UNREADABLE, needed, runs, unpack
from headrace.runtime.conversion.source import Imported, SourceWeight, Tensors
from headrace.scheduler.errors import StoreError

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight rows is."""


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if layout != "gemm" or bits != 4:
        raise StoreError(
            f"AWQ's layout {layout!r} with {bits} bits is not read here, only gemm with 4; {UNREADABLE}"
        )
    weights, used = [], set()
    for name in tensors:
        stem = name.removesuffix(".qweight")
        if stem != name:
            weights.append(_weight(stem, tensors))
            used |= {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")}
    return Imported(weights, frozenset(used))


def _weight(stem: str, tensors: Tensors) -> SourceWeight:
    data = tensors[f"{stem}.qweight"]
    zeros = needed(tensors, f"{stem}.qzeros", "AWQ")
    scales = needed(tensors, f"{stem}.scales", "AWQ")
    columns, rows, groups = data.shape[0], data.shape[1] * 8, scales.shape[0]

    def codes() -> Iterator[Tensor]:
        whole = data.tensor()
        for run in runs(rows // 8, columns * 8):
            yield _rows(whole[:, run])

    def rest() -> Scales:
        return Scales(scales.tensor().T, _rows(zeros.tensor()))

    shape = (rows, columns)
    return AffineWeight(
        f"{stem}.weight", 4, shape, groups, data, scales.dtype, True, codes, rest
    ).source()


def _rows(words: Tensor) -> Tensor:
    """int32 [columns, rows / 8] -> uint8 [rows, columns]."""
    codes = unpack(words, 4).view(len(words), -1, 8)
    return codes[..., torch.tensor(PLACES)].view(len(words), -1).T
