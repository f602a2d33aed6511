"""Which drawn tokens stand: those after known tokens, and after drafts that proved right."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from headrace.runtime.sampler import Drawn
from headrace.scheduler.plan import MicroBatch, Sample
from headrace.scheduler.speculation import num_accepted


def verified(micro_batch: MicroBatch, drawn: Sequence[Drawn]) -> list[Sample]:
    """The samples that stand of all that were drawn after the micro-batch's slices, in their order.

    The caller has waited for the stream. Raises StageError as Drawn.collect does, for these alone: what
    comes after a wrong guess may be anything.
    """
    pieces = [piece for piece in micro_batch.slices if piece.sampling is not None]
    if not any(piece.num_drafts for piece in pieces):
        return [sample for some in drawn for sample in some.collect()]
    tokens = [int(token) for some in drawn for token in some.table[:, 0].tolist()]
    stands: list[bool] = []
    for piece in pieces:
        start = len(stands)
        right = num_accepted(piece.drafts, tokens[start : start + piece.num_drafts])
        stands += [i <= right for i in range(piece.num_drawn)]
    assert len(stands) == len(tokens), (len(stands), len(tokens))
    samples, start = [], 0
    for some in drawn:
        kept = [i for i in range(len(some.rows)) if stands[start + i]]
        start += len(some.rows)
        rows = [some.rows[i] for i in kept]
        table = some.table[torch.tensor(kept, dtype=torch.long)]
        samples += replace(some, rows=rows, table=table).collect()
    return samples
