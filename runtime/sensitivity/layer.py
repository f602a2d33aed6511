"""What a layer makes of its input when one group of its matrices is rounded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.runtime.calibration.encoding import CALIBRATED, Inputs, round_matrix
from headrace.runtime.calibration.layer import LayerCalibration, short_sample
from headrace.runtime.calibration.layer_weights import LayerWeights
from headrace.runtime.calibration.observed import Collector, Matrix, Moments, Watched, batches
from headrace.runtime.manifest import LayerShape, WeightSpec
from headrace.runtime.sensitivity.candidates import KEEP, Candidates
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import SweptLayer
from headrace.runtime.weights.plain import RawWeight
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Weight

Rounding = Literal["nearest", "gptq", "awq"]
"""How candidates are rounded to be judged; "awq" is that without scales of channels."""


@dataclass(frozen=True, slots=True)
class Tried:
    """Matrices `names` in format `fmt`: the layer's output [sequences, length, hidden], and how far it is from what it
    was (`relative_error`)."""

    names: tuple[str, ...]
    fmt: str
    output: Tensor
    error: float


def relative_error(found: Tensor, reference: Tensor) -> float:
    """The mean over tokens of ||x - x_ref||^2 / ||x_ref||^2, of states [..., hidden]: each token counts alike, since the norm
    that follows makes all of them alike."""
    off = (found.float() - reference.float()).square().sum(-1, dtype=torch.float64)
    size = reference.float().square().sum(-1, dtype=torch.float64)
    return float((off / size.clamp(min=1e-30)).mean())


class LayerTrial:
    """Tries all candidates for the matrices of `layer`, group by group.

    `calibrated` are states of all the text, with which matrices are rounded as `rounding` says; `moments_bytes` of second
    moments are held at a time. Experts are rounded to nearest.
    """

    def __init__(
        self,
        layer: SweptLayer,
        weights: LayerWeights,
        candidates: Candidates,
        shape: LayerShape,
        rounding: Rounding,
        moments_bytes: int | None,
    ) -> None:
        self._layer, self._weights, self._candidates = layer, weights, candidates
        self._rounding, self._budget = rounding, moments_bytes
        plans = [candidates.of(name, candidates.smallest) for name in weights.block.weights]
        method = "gptq" if rounding == "nearest" else rounding
        self._calibration = LayerCalibration(
            layer, weights, plans, shape, method, transposed=candidates.transposed
        )

    @torch.inference_mode()
    def run(self, sample: States, calibrated: States | None) -> Iterator[Tried]:
        """Every group in every format but the one that keeps it. `sample`, the layer's input, stays as it is, and so does
        the layer when all is through."""
        reference = self._output(sample, {})
        linears = self._linear_groups(sample)
        for names, moments in self._with_moments(linears, calibrated):
            yield from self._tried(names, sample, reference, moments)
        for names in self._expert_groups():
            yield from self._tried(names, sample, reference, None)
        self._layer.rebind(view_weight)

    def _output(self, sample: States, changed: Mapping[str, Tensor]) -> Tensor:
        """With other values for some weights."""

        def view(spec: WeightSpec, block: Tensor) -> Weight:
            values = changed.get(self._weights.name_of(spec))
            return view_weight(spec, block) if values is None else RawWeight(values)

        self._layer.rebind(view)
        with sample.beside(sample.values) as states:
            self._layer.run(states)
            return states.values

    def _linear_groups(self, sample: States) -> list[tuple[str, ...]]:
        """Matrices that get the same input."""
        with short_sample(sample) as some:
            groups = self._calibration.linear_groups(some)
        return [
            tuple(name for name, _ in group if self._candidates.is_open(name)) for group in groups
        ]

    def _expert_groups(self) -> list[tuple[str, ...]]:
        """What enters all experts of a module, and what leaves them."""
        groups: dict[tuple[str, bool], list[str]] = {}
        for name, role in self._weights.roles.items():
            if role.kind == "expert" and self._candidates.is_open(name):
                leaves = role.attribute == "down_proj"
                groups.setdefault((role.module, leaves), []).append(name)
        return [tuple(names) for names in groups.values()]

    def _with_moments(
        self, groups: list[tuple[str, ...]], states: States | None
    ) -> Iterator[tuple[tuple[str, ...], Moments | None]]:
        if states is None:
            yield from ((names, None) for names in groups)
            return
        leaders: Mapping[Matrix, int] = {
            (names[0], None): self._weights.shape(names[0])[-1] for names in groups
        }
        by_leader = {names[0]: names for names in groups}
        for batch in batches(leaders, self._budget):
            collector = Collector(batch, self._weights.device)

            def view(spec: WeightSpec, block: Tensor, collector: Collector = collector) -> Weight:
                matrix = self._weights.name_of(spec), None
                return Watched(view_weight(spec, block), collector.note, matrix)

            self._layer.rebind(view)
            self._layer.run(states, keep=False)
            for leader in batch:
                yield by_leader[leader[0]], collector.take(leader)

    def _tried(
        self,
        names: tuple[str, ...],
        sample: States,
        reference: Tensor,
        moments: Moments | None,
    ) -> Iterator[Tried]:
        inputs = None
        if moments is not None:
            assert self._rounding != "nearest"
            inputs = Inputs.of(moments.take_means()[0], self._rounding)
        for fmt in self._candidates.formats:
            if fmt != KEEP:
                changed = {name: self._changed(name, fmt, inputs) for name in names}
                output = self._output(sample, changed)
                yield Tried(names, fmt, output, relative_error(output, reference))

    def _changed(self, name: str, fmt: str, inputs: Inputs | None) -> Tensor:
        """Rounded values in the weight's own type, or in the checkpoint's where it is quantized; a matrix of a stack
        at a time."""
        shape = self._weights.shape(name)
        changed = torch.empty(
            shape, dtype=self._candidates.dtype(name), device=self._weights.device
        )
        if len(shape) < 3:
            values = self._weights.values(name).view(-1, shape[-1])
            return changed.copy_(self._rounded(name, values, fmt, inputs).view(shape))
        for expert, matrix in enumerate(changed):
            matrix.copy_(self._rounded(name, self._weights.part(name, expert), fmt, inputs))
        return changed

    def _rounded(self, name: str, values: Tensor, fmt: str, inputs: Inputs | None) -> Tensor:
        plan = self._candidates.of(name, fmt)
        if inputs is None or fmt not in CALIBRATED or not plan.encoded:
            return self._candidates.rounding(name, fmt)(values)
        return round_matrix(plan, values, inputs).values
