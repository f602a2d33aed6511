"""What calibrating takes of a device's memory beside the sweep of the model."""

from dataclasses import dataclass
from math import prod

import torch

from headrace.runtime.calibration.encoding import CALIBRATED, Method
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.plan import ConversionPlan
from headrace.runtime.dtypes import name_of
from headrace.runtime.shape import model_shape
from headrace.runtime.streaming.page_cache import available_memory
from headrace.runtime.sweep.room import FEWEST_TOKENS, sweep_bytes
from headrace.runtime.sweep.source import CheckpointModel
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.sizes import format_size

_GPTQ_MATRICES = 4
"""Matrices as large as the weights in float32: those themselves, reordered, a product, and codes."""

_GPTQ_COLUMN = 12 << 10
"""Bytes that making a factor takes for each of its columns beside it."""

_AWQ_MATRICES = 8
"""As large as the weights in float32: those that share an input, scaled, codes, values and differences."""

_AWQ_MOMENTS = 4
"""As large as second moments: scaled ones, and what leads to them."""

_SHARE = 4
"""By default, second moments take at most one part in so many of the memory that is free."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes for the sweep (None: as it likes), and for second moments at a time."""

    sweep_bytes: int | None
    gram_bytes: int

    @classmethod
    def of(
        cls,
        model: CheckpointModel,
        plan: ConversionPlan,
        dtype: torch.dtype,
        context: int,
        device: torch.device,
        device_memory: int | None,
        *,
        method: Method,
        has_head: bool,
        beside: int = 0,
    ) -> "Room":
        """`beside` bytes are for what else there is; `has_head`, whether the sweep makes logits.

        Raises DoesNotFitError, with the figure that is needed, where `device_memory` does not do."""
        if device_memory is None:
            is_cuda = device.type == "cuda"
            free = torch.cuda.mem_get_info(device)[0] if is_cuda else available_memory()
            return cls(None, free // _SHARE)
        work, gram = rounding_bytes(plan, method)
        work += beside
        shape = model_shape(model, name_of(dtype))
        least = sweep_bytes(shape, context, FEWEST_TOKENS, has_head=has_head)
        needed = work + gram + least
        if needed > device_memory:
            raise DoesNotFitError(
                f"calibrating with sequences of {context} tokens needs {format_size(needed)} ({needed} bytes) of "
                f"device memory ({format_size(least)} for two layers and a micro-batch, {format_size(work + gram)} to "
                f"round the largest matrix), --device-memory is {format_size(device_memory)}: give it that, "
                "another --device, or a smaller --calibration-context"
            )
        spare = (device_memory - needed) // 2
        return cls(least + spare, gram + spare)


def rounding_bytes(plan: ConversionPlan, method: Method) -> tuple[int, int]:
    """Bytes for rounding the matrix that takes most, or for a layer as it is written, which comes after; and for the
    second moments of the matrix with most columns."""
    matrices = [
        _matrix(weight)
        for block in plan.blocks[1:-1]
        for weight in block.weights
        if weight.encoded and weight.format in CALIBRATED
    ]
    of_one = _awq_bytes if method == "awq" else _gptq_bytes
    work = [of_one(rows, columns) for rows, columns in matrices]
    written = max(block.layout.nbytes for block in plan.blocks[1:-1])
    grams = (4 * columns * columns for _, columns in matrices)
    return max(*work, written), max(grams, default=0)


def _gptq_bytes(rows: int, columns: int) -> int:
    """Beside the second moments, which are gone when the weights come."""
    factor = 4 * columns * columns + _GPTQ_COLUMN * columns
    return max(factor, 4 * _GPTQ_MATRICES * rows * columns)


def _awq_bytes(rows: int, columns: int) -> int:
    return 4 * columns * (_AWQ_MATRICES * rows + _AWQ_MOMENTS * columns)


def _matrix(weight: WeightPlan) -> tuple[int, int]:
    """Rows and columns; of a stack, those of one expert's."""
    shape = weight.source.shape
    return prod(shape[-2:-1]), shape[-1]
