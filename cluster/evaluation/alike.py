"""Whether two models can be compared token by token."""

from headrace.runtime.sweep.source import SweptModel
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import ModelShape


def refuse_other_model(
    first: SweptModel, shape: ModelShape, other: SweptModel, other_shape: ModelShape
) -> None:
    """HeadraceError when their hidden states or their predictions are not of one size."""
    for what, one, two in (
        ("as hidden size", shape.hidden_size, other_shape.hidden_size),
        ("as size of its vocabulary", shape.vocab_size, other_shape.vocab_size),
    ):
        if one != two:
            raise HeadraceError(
                f"{other.path} cannot be compared with {first.path}: it has {what} {two}, not {one}. Give stores of one "
                "model and its own checkpoint"
            )
