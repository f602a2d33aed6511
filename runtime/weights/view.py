"""Which class reads a weight, by the name of its format, and where its parts are."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.manifest import TensorSpec, WeightSpec
from headrace.runtime.weights.blocks import Fp8Weight, TurnedWeight
from headrace.runtime.weights.four_bit import FourBitWeight
from headrace.runtime.weights.grouped import (
    GroupedInt8Weight,
    Int3Weight,
    Int4Weight,
    Mxfp4Weight,
    Nvfp4Weight,
)
from headrace.runtime.weights.plain import Int8Weight, RawWeight
from headrace.runtime.weights.weight import Weight
from headrace.scheduler.errors import StoreError

_READERS: Mapping[str, Callable[[WeightSpec, dict[str, Tensor]], Weight]] = {
    "nf4": FourBitWeight,
    "fp4": FourBitWeight,
    "int4": Int4Weight,
    "int3": Int3Weight,
    "int8g": GroupedInt8Weight,
    "fp8": Fp8Weight,
    "mxfp4": Mxfp4Weight,
    "nvfp4": Nvfp4Weight,
}


def view_weight(spec: WeightSpec, block: Tensor) -> Weight:
    """The weight that `spec` places in `block`, a block's data section (uint8, any device).

    StoreError when it is in a format that is not known.
    """
    parts = parts_of(spec, block)
    if spec.format == "raw":
        return RawWeight(parts["data"].view(spec.shape))
    if spec.format == "int8":
        return Int8Weight(parts["data"].view(spec.shape), parts["scale"])
    if spec.format not in _READERS:
        raise StoreError(
            f"a weight is stored as {spec.format!r}, which this version cannot read: convert again"
        )
    if not spec.turned:
        return _READERS[spec.format](spec, parts)
    *stack, rows, columns = spec.shape
    turned = replace(spec, shape=(*stack, columns, rows), turned=False)
    return TurnedWeight(_READERS[spec.format](turned, parts))


def parts_of(spec: WeightSpec, block: Tensor) -> dict[str, Tensor]:
    """The tensors that encode a weight, as views of its block."""
    return {
        role: _view(part, block)
        for role, part in spec.parts.items()
        if role not in ("state", "layout")
    }


def _view(part: TensorSpec, block: Tensor) -> Tensor:
    data = block[part.offset : part.offset + part.nbytes]
    return data.view(TORCH_DTYPES[part.dtype]).view(part.shape)
