"""One layer's matrices, rounded by what they are given when calibration text runs through it."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.runtime.binding import View
from headrace.runtime.calibration.awq import search_scales
from headrace.runtime.calibration.encoding import (
    CALIBRATED,
    Inputs,
    Method,
    Rounded,
    is_double,
    nearest,
    round_matrix,
    stored,
)
from headrace.runtime.calibration.folding import Fold, find_fold
from headrace.runtime.calibration.layer_weights import LayerWeights
from headrace.runtime.calibration.observed import (
    Collector,
    InputGroups,
    Matrix,
    Moments,
    Watched,
    batches,
)
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.manifest import LayerShape, WeightSpec
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import SweptLayer
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Weight

log = logging.getLogger(__name__)

FEWEST_TOKENS = 128
"""Of a matrix whose rounding follows its inputs. Fewer tell little of what an expert is given."""

UNSCALED = "awq without scales, which nothing can divide"

Encoded = dict[str, list[tuple[str, Tensor]]]
"""By a weight's name, what is stored of it, (stored name, tensor on the host) in order."""


@dataclass(slots=True)
class Tally:
    """How matrices were rounded, in all layers so far."""

    counts: Counter[str] = field(default_factory=Counter)
    too_few: dict[str, int] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)


class LayerCalibration:
    """Rounds what `plans` quantizes of one layer.

    `shape` is the layer's, `budget` how many bytes of second moments are kept at a time, on the layer's device.
    `transposed` are names of expert stacks that are not multiplied from the right; these, and stacks whose scales
    are quantized together, are left to the caller.
    """

    def __init__(
        self,
        layer: SweptLayer,
        weights: LayerWeights,
        plans: Sequence[WeightPlan],
        shape: LayerShape,
        method: Method,
        *,
        transposed: frozenset[str] = frozenset(),
        budget: int | None = None,
    ) -> None:
        self._layer, self._weights, self._shape = layer, weights, shape
        self._method, self._budget = method, budget
        self._all = plans
        self._plans = {
            plan.source.name: plan
            for plan in plans
            if plan.encoded
            and plan.format in CALIBRATED
            and plan.source.name not in transposed
            and not (len(plan.source.shape) == 3 and is_double(plan))
        }
        self._left = [
            plan.source.name
            for plan in plans
            if plan.encoded and plan.format in CALIBRATED and plan.source.name not in self._plans
        ]
        self._rounded: dict[Matrix, Rounded] = {}

    @torch.inference_mode()
    def run(self, states: States, tally: Tally) -> Encoded:
        """Runs `states`, the layer's input, through the layer as often as the budget asks for, and leaves them
        as they are. Norms that were changed are among what is given back."""
        with short_sample(states) as sample:
            groups = self.linear_groups(sample) + self._expert_groups()
            folds = self.folds(groups, sample) if self._method == "awq" else {}
        # Backwards, because rows may be divided for the sake of a matrix that comes after.
        leaders = {group[0]: self._columns(group[0]) for group in reversed(groups)}
        by_leader = {group[0]: group for group in groups}
        for batch in batches(leaders, self._budget):
            collector = Collector(batch, self._weights.device)
            self._layer.rebind(self._watching(collector))
            self._layer.run(states, keep=False)
            for leader in batch:
                fold = folds.get(leader)
                self._round(by_leader[leader], collector.take(leader), fold, tally)
            if self._weights.device.type == "cuda":
                # Else activations are carved out of what was a factor, and the next one finds no place.
                torch.cuda.empty_cache()
        if self._left:
            tally.counts["to nearest, in stacks that are not calibrated"] += len(self._left)
        return dict(self._encoded())

    def _watching(self, watcher: Collector | InputGroups) -> View:
        def view(spec: WeightSpec, block: Tensor) -> Weight:
            matrix = self._weights.name_of(spec), None
            return Watched(view_weight(spec, block), watcher.note, matrix)

        return view

    def linear_groups(self, sample: States) -> list[tuple[Matrix, ...]]:
        """Linears that get the same tensor, in the order of calls; those that are not rounded here come last."""
        groups = InputGroups()
        self._layer.rebind(self._watching(groups))
        self._layer.run(sample, keep=False)
        found = []
        for group in groups.finish():
            linears = [m for m in group if self._weights.roles[m[0]].kind == "linear"]
            if any(name in self._plans for name, _ in linears):
                found.append(tuple(sorted(linears, key=lambda m: m[0] not in self._plans)))
        return found

    def _expert_groups(self) -> list[tuple[Matrix, ...]]:
        """What enters and what leaves each expert."""
        groups: dict[tuple[str, int, bool], list[Matrix]] = {}
        for name, plan in self._plans.items():
            role = self._weights.roles[name]
            if role.kind == "expert":
                leaves = role.attribute == "down_proj"
                if len(plan.source.shape) == 3:
                    for expert in range(plan.source.shape[0]):
                        groups.setdefault((role.module, expert, leaves), []).append((name, expert))
                else:
                    key = role.module, role.expert or 0, leaves
                    groups.setdefault(key, []).append((name, None))
        return [tuple(group) for group in groups.values()]

    def folds(self, groups: Sequence[Sequence[Matrix]], sample: States) -> dict[Matrix, Fold]:
        """By the first matrix of a group, what can divide the group's input."""

        def run() -> Tensor:
            self._layer.rebind(view_weight)
            with short_sample(sample) as states:
                self._layer.run(states)
                return states.values.float() - sample.values.float()

        found = {}
        before: list[str] = []
        for group in groups:
            names = [name for name, _ in group]
            linear = all(self._weights.roles[name].kind == "linear" for name in names)
            whole = all(n in self._plans and self._weights.is_raw(n) for n in names)
            if linear and whole:
                fold = find_fold(self._weights, names, before, self._shape, run)
                if fold is not None:
                    found[group[0]] = fold
                before += names
        return found

    def _columns(self, matrix: Matrix) -> int:
        return self._weights.shape(matrix[0])[-1]

    def _values(self, matrix: Matrix) -> Tensor:
        name, expert = matrix
        values = self._weights.values(name) if expert is None else self._weights.part(name, expert)
        return values.view(-1, values.shape[-1])

    def _round(
        self, group: Sequence[Matrix], moments: Moments, fold: Fold | None, tally: Tally
    ) -> None:
        mine = [matrix for matrix in group if matrix[0] in self._plans]
        if moments.count < FEWEST_TOKENS:
            for matrix in mine:
                tally.too_few[_called(matrix)] = moments.count
                self._put(matrix, self._values(matrix), None)
            tally.counts["to nearest, given too few tokens"] += len(mine)
            return
        gram, magnitude = moments.take_means()
        scales = None if fold is None else self._scales(mine, gram, magnitude, fold)
        if scales is not None:
            gram = gram / scales / scales[:, None]
        inputs = Inputs.of(gram, self._method)
        del gram  # gptq has made something as large of it
        for matrix in mine:
            values = self._values(matrix) if scales is None else self._values(matrix) * scales
            error = self._put(matrix, values, inputs)
            if error is not None:
                tally.errors.append(error)
        alone = self._method == "awq" and scales is None
        tally.counts[UNSCALED if alone else self._method] += len(mine)

    def _put(self, matrix: Matrix, values: Tensor, inputs: Inputs | None) -> float | None:
        rounded = round_matrix(self._plans[matrix[0]], values, inputs)
        self._rounded[matrix] = rounded.on_host()
        return rounded.error

    def _scales(
        self, group: Sequence[Matrix], gram: Tensor, magnitude: Tensor, fold: Fold
    ) -> Tensor:
        """The scales that this input's channels are really divided by; notes what is changed for that."""
        matrices = [(self._values(m), nearest(self._plans[m[0]])) for m in group]
        found = search_scales(matrices, gram, magnitude, fold.shared)
        real, changed = fold.divided(self._weights, found.scales)
        self._weights.changed.update(changed)
        log.debug("%s: alpha %.2f by %s", _called(group[0]), found.alpha, fold)
        return real

    def _encoded(self) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
        for plan in self._all:
            name, shape = plan.source.name, plan.source.shape
            if name in self._plans:
                is_stack = len(shape) == 3
                experts: Sequence[int | None] = range(shape[0]) if is_stack else (None,)
                yield name, stored(plan, [self._rounded.pop((name, e)) for e in experts])
            elif name in self._weights.changed:
                entry = plan.parts[0].entry
                values = self._weights.changed[name].to(TORCH_DTYPES[entry.dtype]).cpu()
                yield name, [(entry.name, values)]


def short_sample(states: States) -> States:
    """The first tokens of the first sequence."""
    length = min(states.length, 64)
    shape = 1, length, states.values.shape[-1]
    some = States(shape, states.values.dtype, states.tokens[:1, :length])
    some.values.copy_(states.values[:1, :length])
    return some


def _called(matrix: Matrix) -> str:
    name, expert = matrix
    return name if expert is None else f"{name}[{expert}]"
