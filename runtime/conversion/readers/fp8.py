"""8-bit floats: DeepSeek's blocks, and one scale for a tensor or for each row.

    X.weight            F8_E4M3 [rows, columns], or X, a stack [experts, rows, columns]
    X.weight_scale_inv  what each block, row or the whole is multiplied with; also named weight_scale.
                        GPTQModel means what it is divided by, and says so: weight_scale_semantics "inverse"

With an activation_scheme rows are to be multiplied in 8 bits, too, which GPUs that can do. Static scales of
rows are left out: each gets its own when it is multiplied.
(transformers/integrations/finegrained_fp8.py; gptqmodel/nn_modules/qlinear/fp8.py.)
"""

import logging
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor

from headrace.runtime.conversion.readers.packing import UNREADABLE, repacked
from headrace.runtime.conversion.source import Imported, SourceTensor, SourceWeight, Tensors
from headrace.scheduler.errors import StoreError

log = logging.getLogger(__name__)

SCALES = ("_scale_inv", "_scale")
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
ACTIVATIONS = (
    "activation_scale",
    "input_scale",
    "input_global_scale",
    "output_scale",
    "k_scale",
    "v_scale",
)


def read(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    weights, used = [], set()
    block = settings.get("weight_block_size")
    fp8_rows = bool(settings.get("activation_scheme"))
    divides = settings.get("weight_scale_semantics") == "inverse"
    for name, tensor in tensors.items():
        if tensor.dtype not in ("F8_E4M3", "F8_E5M2"):
            continue
        found = [name + suffix for suffix in SCALES if name + suffix in tensors]
        if not found:
            raise StoreError(
                f"{name} is {tensor.dtype} without {name}{SCALES[0]} or {name}{SCALES[1]}, so that its "
                f"scale is not known; {UNREADABLE}"
            )
        weights.append(weight(name, tensor, tensors[found[0]], block, fp8_rows, divides))
        used |= {name, found[0]}
    return Imported(weights, frozenset(used | activation_scales(tensors)))


def read_fbgemm(tensors: Tensors, settings: Mapping[str, Any]) -> Imported:
    """FBGEMM's, as Meta has published Llama 3.1 405B: scales of rows, and inputs are always in 8 bits."""
    return read(tensors, {**settings, "activation_scheme": "dynamic"})


def activation_scales(tensors: Tensors) -> set[str]:
    """Names of scales that are not the weights'; logged, since they are left out."""
    found = {name for name in tensors if name.rpartition(".")[2].endswith(ACTIVATIONS)}
    if found:
        log.warning(
            "left out %d scales of activations, such as %s: rows get their own here, or none",
            len(found),
            min(found),
        )
    return found


def weight(
    name: str, data: SourceTensor, scale: SourceTensor, block: tuple[int, int] | list[int] | None,
    fp8_rows: bool, divides: bool = False,
) -> SourceWeight:  # fmt: skip
    """A weight stored as fp8. `block` is the size of blocks, if there are any; `fp8_rows` as in WeightSpec;
    `divides` says that values are codes over scales.

    Raises StoreError for types and shapes that are not read.
    """
    if data.dtype != "F8_E4M3" or scale.dtype not in SCALE_TYPES or len(data.shape) not in (2, 3):
        raise StoreError(
            f"{name} is {data.dtype} {list(data.shape)} with scales in {scale.dtype}, which is not read "
            f"here, only F8_E4M3 matrices with scales in {', '.join(SCALE_TYPES)}; {UNREADABLE}"
        )
    height, width = _block(name, data, scale, block)
    rows, columns = data.shape[-2:]
    shape = (prod(data.shape[:-2]) * -(-rows // height), -(-columns // width))

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for run in data.rows():
            yield "data", run
        whole = scale.tensor().float().reshape(-1)
        whole = whole.reciprocal() if divides else whole
        # One scale of a whole stack serves every matrix of it.
        yield "scale", whole.repeat(prod(shape) // len(whole)).view(shape)

    state = {"block_rows": height, "blocksize": width, "fp8_rows": fp8_rows}
    return repacked(name, "fp8", data.shape, data, {"scale": ("F32", shape)}, pieces, state)


def _block(
    name: str, data: SourceTensor, scale: SourceTensor, block: tuple[int, int] | list[int] | None
) -> tuple[int, int]:
    """Rows and columns that share a scale, from the shape of the scales."""
    *stack, rows, columns = data.shape
    count, experts = prod(scale.shape), prod(stack)
    if count in (1, experts):
        return rows, columns
    if count == experts * rows and scale.shape[-1] in (1, rows):
        return 1, columns
    height, width = block or (0, 0)
    if height and width:
        grid = (*stack, -(-rows // height), -(-columns // width))
        if tuple(scale.shape) == grid:
            return height, width
    raise StoreError(
        f"{name} {list(data.shape)} has scales {list(scale.shape)}, which are neither one, one a row, nor "
        f"one for each block of weight_block_size {list(block) if block else 'in config.json'}; "
        "check that config.json belongs to these weights"
    )
