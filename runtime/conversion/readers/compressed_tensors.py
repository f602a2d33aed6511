"""compressed-tensors, as llm-compressor writes it: integers packed or in bytes, 8- and 4-bit floats.

    X.weight_packed      I32 [rows, columns * bits / 32], codes plus half of their range, the first in the
                         lowest bits ("pack-quantized"); U8 [rows, columns / 2], 4-bit floats
    X.weight             I8 ("int-quantized") or F8_E4M3 ("float-quantized") [rows, columns]
    X.weight_scale       [1], [rows, 1] or [rows, groups]; for blocks of 8-bit floats [blocks, blocks]
    X.weight_zero_point  I32 [rows * bits / 32, groups] packed down the rows, or I8 [rows, groups] ("int-quantized",
                         and where one scale is for all)
    X.weight_shape       I64 [2], of the packed weight
    X.weight_global_scale  F32 [1], what NVFP4's scales are divided by
    X.weight_g_idx       I32 [columns], each column's group, of early releases

(compressed_tensors/compressors.)
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.conversion.readers import fp4, fp8
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

LAYOUTS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "naive-quantized",
    "mixed-precision",
)
PARTS = ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    _refuse_others(settings)
    weights, used = [], set()
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight_packed" and tensor.dtype == "U8":
            weights.append(_floats(stem, tensors))
        elif kind == "weight_packed":
            weights.append(_packed(stem, tensors))
        elif kind == "weight" and tensor.dtype == "I8":
            weights.append(_bytes(stem, tensors))
        elif kind == "weight" and tensor.dtype.startswith("F8_"):
            scale = needed(tensors, f"{name}_scale", "8-bit")
            weights.append(fp8.weight(name, tensor, scale, _block(settings), _fp8_rows(settings)))
        else:
            continue
        used |= {name, *(f"{stem}.weight_{part}" for part in PARTS)}
    return Imported(weights, frozenset(used | fp8.activation_scales(tensors)))


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((settings.get("config_groups") or {}).values())


def _refuse_others(settings: Mapping[str, Any]) -> None:
    """StoreError for layouts that are not read and for weights that are rotated."""
    layouts = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    for layout in filter(None, layouts):
        if layout not in LAYOUTS:
            raise StoreError(
                f"compressed-tensors' format {layout!r} is not read here, only {', '.join(LAYOUTS[1:])}; "
                f"{UNREADABLE}"
            )
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise StoreError(
            "the checkpoint's compressed-tensors weights are rotated (transform_config), which is not undone "
            "here; convert the original, unquantized checkpoint"
        )
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise StoreError(
            f"compressed-tensors' sparse format {sparsity!r} is not read here; {UNREADABLE} without it"
        )


def _block(settings: Mapping[str, Any]) -> list[int] | None:
    """The size of blocks that share a scale, where a group of the configuration has any."""
    sizes = [(group.get("weights") or {}).get("block_structure") for group in _groups(settings)]
    return next((list(size) for size in sizes if size), None)


def _fp8_rows(settings: Mapping[str, Any]) -> bool:
    """Whether activations are quantized to 8-bit floats."""
    rows = [group.get("input_activations") or {} for group in _groups(settings)]
    return any(row.get("type") == "float" and row.get("num_bits") == 8 for row in rows)


def _floats(stem: str, tensors: Tensors) -> SourceWeight:
    name = f"{stem}.weight"
    scale, divisor = needed(tensors, f"{name}_scale", "4-bit"), tensors.get(f"{name}_global_scale")
    common = None if divisor is None else partial(fp4.inverse, divisor)
    return fp4.weight(name, tensors[f"{name}_packed"], scale, common)


def _packed(stem: str, tensors: Tensors) -> SourceWeight:
    data = tensors[f"{stem}.weight_packed"]
    shape = needed(tensors, f"{stem}.weight_shape", "packed").tensor().tolist()
    rows, columns = data.shape[0], int(shape[-1])
    bits = data.shape[1] * 32 // columns
    if len(shape) != 2 or bits not in (4, 8):
        raise StoreError(
            f"{stem}.weight {shape} has packed codes of {bits} bits, and only matrices with 4 and 8 are read "
            f"here; {UNREADABLE} with 4"
        )
    points = tensors.get(f"{stem}.weight_zero_point")

    def codes() -> Iterator[Tensor]:
        whole = data.tensor()
        for run in runs(rows, columns):
            yield unpack(whole[run], bits)[:, :columns]

    def zeros() -> Tensor | None:
        if points is None:
            return None
        if points.dtype == "I8":
            return _unsigned(points.tensor(), bits)
        return unpack(points.tensor().T, bits).T[:rows]

    return _affine(stem, tensors, bits, (rows, columns), data, points is not None, codes, zeros)


def _bytes(stem: str, tensors: Tensors) -> SourceWeight:
    data = tensors[f"{stem}.weight"]
    if len(data.shape) != 2:
        raise StoreError(
            f"{stem}.weight is I8 {list(data.shape)}, and only matrices are read here; {UNREADABLE}"
        )
    points = tensors.get(f"{stem}.weight_zero_point")
    rows, columns = data.shape

    def codes() -> Iterator[Tensor]:
        for run in data.rows():
            yield run.view(torch.uint8) ^ 128

    def zeros() -> Tensor | None:
        return None if points is None else _unsigned(points.tensor(), 8)

    return _affine(stem, tensors, 8, (rows, columns), data, points is not None, codes, zeros)


def _unsigned(points: Tensor, bits: int) -> Tensor:
    """Zero points in bytes as they are among codes that begin at 0."""
    return (points.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)


def _affine(
    stem: str, tensors: Tensors, bits: int, shape: tuple[int, int], data: SourceTensor,
    has_zeros: bool, codes: Callable[[], Iterator[Tensor]], zeros: Callable[[], Tensor | None],
) -> SourceWeight:  # fmt: skip
    name = f"{stem}.weight"
    scale = needed(tensors, f"{name}_scale", "quantized")
    rows, groups = shape[0], scale.shape[-1] if len(scale.shape) == 2 else 1
    if scale.shape not in ((1,), (1, 1), (rows,), (rows, groups)):
        raise StoreError(
            f"{name}_scale is {list(scale.shape)}, neither one scale, one a row, nor groups of {rows} rows; "
            f"{UNREADABLE}"
        )

    def rest() -> Scales:
        found = zeros()
        wide = None if found is None else found.reshape(-1, groups).expand(rows, groups)
        return Scales(scale.tensor().reshape(-1, groups).expand(rows, groups), wide)

    index, order = tensors.get(f"{name}_g_idx"), None
    if index is not None:
        order = column_order(index.tensor(), groups, f"{name}_g_idx")
    return AffineWeight(
        name, bits, shape, groups, data, scale.dtype, has_zeros, codes, rest, order
    ).source()
