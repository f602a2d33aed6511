"""The formats that a matrix may get, and what it takes in each."""

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from headrace.runtime.calibration.encoding import CALIBRATED, nearest
from headrace.runtime.conversion.affine import BITS
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.plan import ConversionPlan, Options, plan_conversion
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.conversion.source import AnyCheckpoint
from headrace.runtime.manifest import ALIGN_TENSOR
from headrace.runtime.skeleton import Role, Skeleton, parse_config
from headrace.scheduler.errors import StoreError

KEEP = "keep"
TRIED = ("int3", "int4", "int8")


class Candidates:
    """Of the matrices of `checkpoint`'s layers, the embedding table, and a head of its own; int3 and int4 have groups of `group_size`.

    `formats` are in order of size, the last one keeps a matrix as it is. Of a checkpoint that is quantized these are what is
    smaller, and StoreError is raised unless `requantize` accepts a second error.
    """

    def __init__(
        self, checkpoint: AnyCheckpoint, group_size: int | None, *, requantize: bool = False
    ) -> None:
        quantized = next((w.format for w in checkpoint.weights.values() if w.format != "raw"), None)
        if quantized is not None and not requantize:
            raise StoreError(
                f"{checkpoint.path} is quantized to {quantized} already, and what --budget makes smaller gets a second "
                "error: convert the original checkpoint, or say --requantize to accept that"
            )
        self.checkpoint, self.group_size, self.requantize = checkpoint, group_size, requantize
        config = parse_config(checkpoint.config, str(checkpoint.path))
        skeleton = Skeleton(config, TORCH_DTYPES[checkpoint.dtype], expand=True)
        self.roles: Mapping[str, Role] = skeleton.classify(checkpoint.weights)
        self.head = self._own_head(skeleton)
        self.table = self._named(skeleton.embedding_name)
        self.tied = skeleton.tied
        wide = ("bf16",) if checkpoint.dtype == "F32" else ()
        self._plans = {fmt: self._plan(fmt) for fmt in (*TRIED, *wide, KEEP)}
        self.formats: tuple[str, ...] = tuple(
            f for f in self._plans if f == KEEP or self._is_smaller(f)
        )
        if self.formats == (KEEP,):
            raise StoreError(
                f"{checkpoint.path} is quantized to {quantized} and has no weights that --budget could make smaller"
            )
        self._weights = {fmt: _by_name(plan) for fmt, plan in self._plans.items()}
        # gpt-oss' experts are multiplied from the other side.
        self.transposed = frozenset(
            name
            for name, role in self.roles.items()
            if role.kind == "expert" and skeleton.model.get_submodule(role.module).is_transposed
        )

    def _own_head(self, skeleton: Skeleton) -> str | None:
        """The LM head's weight, where it is a matrix that nothing else uses."""
        if skeleton.tied or type(skeleton.model.get_output_embeddings()) is not torch.nn.Linear:
            return None
        return self._named(skeleton.head_name)

    def _named(self, target: str) -> str | None:
        return next((name for name, role in self.roles.items() if role.target == target), None)

    def _plan(self, fmt: str) -> ConversionPlan:
        own = tuple((name, fmt) for name in (self.table, self.head) if name is not None)
        group_size = self.group_size if fmt in BITS else None
        options = Options(fmt, own, group_size=group_size, requantize=self.requantize)
        return plan_conversion(self.checkpoint, options, expand=True)

    def _is_smaller(self, fmt: str) -> bool:
        return self._plans[fmt].nbytes < self._plans[KEEP].nbytes

    @property
    def smallest(self) -> str:
        return self.formats[0]

    @property
    def plan(self) -> ConversionPlan:
        """With everything in the smallest format."""
        return self._plans[self.smallest]

    @property
    def parameters(self) -> int:
        """All weights, those of embeddings, head and norms with them."""
        return sum(prod(weight.source.shape) for weight in self._weights[KEEP].values())

    def count(self, names: Iterable[str]) -> int:
        """Weights in matrices."""
        return sum(prod(self.of(name, KEEP).source.shape) for name in names)

    def is_open(self, name: str) -> bool:
        """Whether there is a choice."""
        weight = self._weights[self.smallest].get(name)
        return weight is not None and weight.encoded

    def dtype(self, name: str) -> torch.dtype:
        """Of a weight's values."""
        source = self.of(name, KEEP).source
        is_raw = source.format == "raw"
        return TORCH_DTYPES[source.stored[0].entry.dtype if is_raw else self.checkpoint.dtype]

    def value_bytes(self, names: Iterable[str]) -> int:
        """Of those weights that have a choice."""
        return sum(
            prod(self.of(name, KEEP).source.shape) * self.dtype(name).itemsize
            for name in names
            if self.is_open(name)
        )

    def of(self, name: str, fmt: str) -> WeightPlan:
        return self._weights[fmt][name]

    def nbytes(self, names: Iterable[str], fmt: str) -> int:
        """What weights take in a block, with the alignment of their tensors."""
        return sum(
            -(-part.entry.nbytes // ALIGN_TENSOR) * ALIGN_TENSOR
            for name in names
            for part in self._weights[fmt][name].parts
        )

    def rounding(self, name: str, fmt: str) -> Callable[[Tensor], Tensor]:
        """To nearest: weights [N, K] float32 to the values that they would be read as."""
        if not self.of(name, fmt).encoded:  # it has that format already
            return lambda weight: weight
        if fmt in CALIBRATED:
            return nearest(self.of(name, fmt))
        dtype = TORCH_DTYPES[self.of(name, fmt).parts[0].entry.dtype]
        return lambda weight: weight.to(dtype).float()


def _by_name(plan: ConversionPlan) -> dict[str, WeightPlan]:
    return {weight.source.name: weight for block in plan.blocks for weight in block.weights}
