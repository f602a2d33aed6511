"""GPTQ: AutoGPTQ's layout, whose zero points are stored less one, and GPTQModel's, in which they are not.

    X.qweight   I32 [columns * bits / 32, rows], the first column in the lowest bits
    X.qzeros    I32 [groups, rows * bits / 32]; less one as a word, so that 0 borrows from the code above it
    X.scales    F16 or BF16 [groups, rows]
    X.g_idx     I32 [columns], each column's group (act-order: not in order); not written by all tools

(auto_gptq/nn_modules/qlinear; gptqmodel/nn_modules/qlinear, formats "gptq" and "gptq_v2".)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from headrace.runtime.conversion.readers.affine import AffineWeight, Scales
from headrace.runtime.conversion.readers.packing import (
    UNREADABLE,
    column_order,
    needed,
    runs,
    unpack,
)
from headrace.runtime.conversion.source import Imported, SourceTensor, SourceWeight, Tensors
from headrace.scheduler.errors import StoreError

LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""What was taken from each zero point when it was stored, by the checkpoint's format."""


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in LAYOUTS:
        raise StoreError(
            f"GPTQ's layout {layout!r} is not read here, only gptq and gptq_v2; {UNREADABLE}"
        )
    weights, used = [], set()
    for name in tensors:
        stem = name.removesuffix(".qweight")
        if stem == name:
            continue
        weights.append(_weight(stem, tensors, settings, LAYOUTS[layout]))
        used |= {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    return Imported(weights, frozenset(used))


def _weight(stem: str, tensors: Tensors, settings: Mapping[str, Any], less: int) -> SourceWeight:
    data = tensors[f"{stem}.qweight"]
    zeros = needed(tensors, f"{stem}.qzeros", "GPTQ")
    scales = needed(tensors, f"{stem}.scales", "GPTQ")
    index = tensors.get(f"{stem}.g_idx")
    words, rows = data.shape
    # The last word of zero points may be partly used.
    bits = zeros.shape[1] * 32 // rows if index is None else words * 32 // max(index.shape[0], 1)
    if bits not in (4, 8):
        raise StoreError(
            f"{stem} has GPTQ codes of {bits} bits, and only 4 and 8 are read here; {UNREADABLE} with 4"
        )
    columns, groups = words * 32 // bits, scales.shape[0]
    order = None
    if index is not None and settings.get("desc_act"):
        order = column_order(index.tensor(), groups, f"{stem}.g_idx")

    def codes() -> Iterator[Tensor]:
        _check_in_order(index, order, groups, stem)
        whole = data.tensor()
        for run in runs(rows, columns):
            yield unpack(whole[:, run].T, bits)

    def rest() -> Scales:
        # GPTQModel subtracts from whole words, so that what was borrowed comes back only there. Who subtracts
        # from each code stores no 0.
        words = zeros.tensor() + less * sum(1 << place for place in range(0, 32, bits))
        return Scales(scales.tensor().T, unpack(words, bits)[:, :rows].T)

    name, shape = f"{stem}.weight", (rows, columns)
    return AffineWeight(
        name, bits, shape, groups, data, scales.dtype, True, codes, rest, order
    ).source()


def _check_in_order(
    index: SourceTensor | None, order: Tensor | None, groups: int, stem: str
) -> None:
    """Raises StoreError where columns are out of order although config.json says otherwise."""
    if index is None or order is not None:
        return
    if column_order(index.tensor(), groups, f"{stem}.g_idx") is not None:
        raise StoreError(
            f"{stem}.g_idx has columns out of order, but config.json has desc_act false; set it to true "
            "if the checkpoint was quantized with act-order"
        )
