"""Quantized weights as values, to be quantized in another format, and what that changed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.runtime.block_file import lay_out
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.quantize import weight_spec
from headrace.runtime.conversion.source import SourceWeight, rows_at_once

if TYPE_CHECKING:
    from headrace.runtime.weights.weight import Weight


def values(source: SourceWeight) -> Iterator[Tensor]:
    """Runs of rows of the weight in float32, 64 n of a matrix, or matrix by matrix of a stack.

    The packed weight is in memory meanwhile.
    """
    return _runs(loaded(source))


def loaded(source: SourceWeight) -> "Weight":
    """The weight as it is in its checkpoint."""
    return in_memory(source.format, source.shape, source.stored, source.stream(), source.state)


def in_memory(
    fmt: str,
    shape: tuple[int, ...],
    parts: Sequence[Part],
    stream: Iterable[tuple[str, memoryview]],
    state: Mapping[str, Any] | None,
) -> "Weight":
    """The weight that stored tensors, streamed in their order, encode."""
    # Imported late: bitsandbytes takes seconds.
    from headrace.runtime.weights.view import view_weight

    layout = lay_out(part.entry for part in parts)
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    filled: dict[str, int] = {}
    for name, data in stream:
        start = layout.tensors[name].offset + filled.get(name, 0)
        block[start : start + len(data)] = torch.frombuffer(data, dtype=torch.uint8)
        filled[name] = filled.get(name, 0) + len(data)
    return view_weight(weight_spec(fmt, shape, parts, layout.tensors, state), block)


def _runs(weight: "Weight") -> Iterator[Tensor]:
    rows, *rest = weight.shape
    step = 1 if len(rest) > 1 else rows_at_once(4 * rest[0])
    # The rows of some formats begin at multiples only, which 64 rows are.
    assert len(rest) > 1 or step % weight.row_multiple == 0
    for start in range(0, rows, step):
        yield weight.rows(start, min(start + step, rows)).dense(torch.float32)


def relative_error(before: "Weight", after: "Weight") -> float:
    """The root of the mean square of what changed, relative to that of the weight before."""
    changed = whole = 0.0
    for old, new in zip(_runs(before), _runs(after), strict=True):
        changed += float((new - old).double().square().sum())
        whole += float(old.double().square().sum())
    return (changed / whole) ** 0.5 if whole else 0.0
