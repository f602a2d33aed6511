"""Which class reads a weight, by the name of its format."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from headrace.runtime.block_weights import Fp8Weight, TurnedWeight
from headrace.runtime.grouped_weights import GroupedInt8Weight, Int3Weight, Int4Weight, Mxfp4Weight
from headrace.runtime.linear import Weight
from headrace.runtime.store import WeightSpec
from headrace.scheduler.errors import StoreError

_READERS: Mapping[str, Callable[[WeightSpec, dict[str, Tensor]], Weight]] = {
    "int4": Int4Weight,
    "int3": Int3Weight,
    "int8g": GroupedInt8Weight,
    "fp8": Fp8Weight,
    "mxfp4": Mxfp4Weight,
}


def stored_weight(spec: WeightSpec, parts: dict[str, Tensor]) -> Weight:
    """A weight in a format that has scales of groups or blocks. StoreError for an unknown one."""
    if spec.format not in _READERS:
        raise StoreError(
            f"a weight is stored as {spec.format!r}, which this version cannot read: convert again"
        )
    if not spec.turned:
        return _READERS[spec.format](spec, parts)
    *stack, rows, columns = spec.shape
    return TurnedWeight(
        _READERS[spec.format](replace(spec, shape=(*stack, columns, rows), turned=False), parts)
    )
