"""Who decides a layer's bytes in the place of rounding to nearest."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from headrace.runtime.conversion.plan import BlockPlan, ConversionPlan
from headrace.runtime.manifest import Block

STATES = "headrace-calibration-*.states"
"""Files beside the journal that an encoder may leave there while a conversion is under way."""


class Encoder(Protocol):
    """Gets a conversion's blocks in order, and each when its file is durable."""

    def start(self, plan: ConversionPlan, done: Mapping[str, Block]) -> None:
        """`done` are blocks that an earlier run has written."""

    def encode(self, block: BlockPlan) -> Mapping[str, Sequence[tuple[str, Tensor]]]:
        """By names of weights, (stored name, tensor on the host) in stored order, for those that are not
        stored as the plan alone says."""

    def written(self, block: Block) -> None: ...
