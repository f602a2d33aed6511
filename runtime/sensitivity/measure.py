"""What every matrix costs in every format: how far the model's predictions go when it alone is rounded.

The checkpoint is swept once, in float32. Every layer is run with each group of matrices rounded in each way, from the
states that the layer gets when nothing is rounded, and the output's relative error e (squared) is taken. In some layers
one of these outputs of each group goes on through all layers that follow, so that its KL divergence D from the
model's predictions is seen. To second order D is quadratic in what is changed, with the Fisher matrix of the predictions
(its first derivative is zero where nothing is changed: Kullback, "Information Theory and Statistics", 1959, chapter
2.6), so that D = c e with c = D / e of the same group, and in layers between, c is interpolated. For the same reason
divergences of several changes add up where their directions have nothing to do with each other; tests compare.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from headrace.runtime.binding import View
from headrace.runtime.calibration.layer_weights import LayerWeights
from headrace.runtime.calibration.room import Room
from headrace.runtime.evaluation.measure import divergence
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.sensitivity.candidates import KEEP, Candidates
from headrace.runtime.sensitivity.factors import Factors, kind_of
from headrace.runtime.sensitivity.layer import LayerTrial, Rounding, Tried
from headrace.runtime.sensitivity.rounded import RoundedWeight
from headrace.runtime.sweep.source import CheckpointModel
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import Sweep, SweptLayer
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Weight

SAMPLE_TOKENS = 2048
"""Over which errors and divergences are measured, from all over the text."""

SAMPLE_CONTEXT = 512
"""Tokens of a sequence of the sample, at most."""

HEAD_TOKENS = 512
"""Of the sample, over which the head's divergence is measured: it is rounded again for every few of them."""

PROBED_LAYERS = 8
"""From which divergences are seen, if there are more: the first, the last, and others evenly between."""


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that get one format: names in the checkpoint, and by each format that was tried the bytes and the
    divergence (nats a token) of the model with it."""

    names: tuple[str, ...]
    nbytes: Mapping[str, int]
    kld: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`groups`: layer by layer, then what is around them; `rounding` is how they were rounded, over `sample` tokens."""

    groups: tuple[Group, ...]
    rounding: Rounding
    sample: int


Progress = Callable[[int, int], None]
"""Layers that are done, of how many."""


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`tokens` [sequences, length] as a sample, sequences from all over them, cut; and those that roundings follow: the others, for
    a rounding changes less of what it followed. Of few sequences they are all."""
    length = min(tokens.shape[1], SAMPLE_CONTEXT)
    count = max(1, min(len(tokens), SAMPLE_TOKENS // length))
    rows = [i * len(tokens) // count for i in range(count)]
    others = [i for i in range(len(tokens)) if len(tokens) <= 2 * count or i not in rows]
    return tokens[rows, :length], tokens[others]


def probed_layers(count: int) -> frozenset[int]:
    most = min(count, PROBED_LAYERS)
    return frozenset(round(i * (count - 1) / max(most - 1, 1)) for i in range(most))


def measure(
    candidates: Candidates,
    tokens: Tensor,
    rounding: Rounding,
    device: torch.device,
    *,
    device_memory: int | None = None,
    progress: Progress = lambda *_: None,
) -> Sensitivity:
    """Of all matrices that have a choice, over a sample of `tokens` [sequences, length] (int64).

    Of models with experts everything is rounded to nearest, whatever `rounding` is: so many matrices take too long
    otherwise. Raises DoesNotFitError, with the figure, where `device_memory` does not suffice.
    """
    if any(role.kind == "expert" for role in candidates.roles.values()):
        rounding = "nearest"
    with _Measuring(candidates, tokens, rounding, device, device_memory) as measuring:
        return measuring.run(progress)


@dataclass(frozen=True, slots=True)
class _Probe:
    """States of the sample that go on from what was tried in layer `layer`."""

    layer: int
    tried: Tried
    states: States


class _Measuring:
    """The sweep, the sample's states, and those that are on their way to the end."""

    def __init__(
        self,
        candidates: Candidates,
        tokens: Tensor,
        rounding: Rounding,
        device: torch.device,
        device_memory: int | None,
    ) -> None:
        self._candidates, self._rounding = candidates, rounding
        # Linears that make keys of latents have to be seen at work, so latents are expanded.
        self._model = CheckpointModel(candidates.checkpoint.path, self_check=lambda _: False)
        context = tokens.shape[1]
        # What is rounded is there beside what it was.
        beside = max(candidates.value_bytes(block.weights) for block in self._model.layers)
        room = Room.of(
            self._model,
            candidates.plan,
            torch.float32,
            context,
            device,
            device_memory,
            method="awq" if rounding == "awq" else "gptq",
            has_head=True,
            beside=beside,
        )
        self._moments_bytes = room.gram_bytes
        with ExitStack() as stack:
            self._sweep = stack.enter_context(
                Sweep(
                    self._model,
                    device,
                    torch.float32,
                    context=context,
                    device_memory=room.sweep_bytes,
                )
            )
            sample, followed = split(tokens)
            self._sample = stack.enter_context(self._sweep.embed(sample))
            self._all: States | None = None
            if rounding != "nearest":
                self._all = stack.enter_context(self._sweep.embed(followed))
            self._stack = stack.pop_all()
        self._probes: list[_Probe] = []
        self._tables = dict(self._rounded_tables())
        self._tried: list[tuple[int, Tried]] = []

    def _rounded_tables(self) -> Iterator[tuple[str, States]]:
        """What the first layer gets of the sample with the embedding table in each format."""
        table, tokens = self._candidates.table, self._sample.tokens
        if table is not None:
            for fmt in self._candidates.formats[:-1]:
                states = self._sweep.embed(tokens, self._candidates.rounding(table, fmt))
                yield fmt, self._stack.enter_context(states)

    def run(self, progress: Progress) -> Sensitivity:
        total = self._sweep.num_layers
        for layer in self._sweep.layers():
            progress(layer.index, total)
            self._run_layer(layer, probed_layers(total))
        progress(total, total)
        factors = Factors()
        for probe, kld in zip(self._probes, self._divergences(), strict=True):
            factors.add(probe.layer, kind_of(probe.tried.names), kld, probe.tried.error)
        groups = (*self._layer_groups(factors), *self._end_groups())
        return Sensitivity(groups, self._rounding, self._sample.tokens.numel())

    @torch.inference_mode()
    def _run_layer(self, layer: SweptLayer, probed: frozenset[int]) -> None:
        block = self._model.layers[layer.index]
        weights = LayerWeights(block, layer.block, self._candidates.roles)
        shape = self._model.layer_shapes[layer.index]
        trial = LayerTrial(
            layer, weights, self._candidates, shape, self._rounding, self._moments_bytes
        )
        started = []
        known = {kind_of(tried.names) for _, tried in self._tried}
        for tried in trial.run(self._sample, self._all):
            is_new = layer.index in probed or kind_of(tried.names) not in known
            if is_new and tried.fmt == self._candidates.smallest:
                states = self._going_on(tried.output)
                started.append(_Probe(layer.index, replace(tried, output=states.values), states))
            # Of outputs only those are kept that go on.
            self._tried.append((layer.index, replace(tried, output=torch.empty(0))))
        for states in self._under_way():
            layer.run(states)
        self._probes += started

    def _under_way(self) -> Iterator[States]:
        yield self._sample
        if self._all is not None:
            yield self._all
        yield from self._tables.values()
        yield from (probe.states for probe in self._probes)

    def _going_on(self, output: Tensor) -> States:
        return self._stack.enter_context(self._sample.beside(output))

    @torch.inference_mode()
    def _divergences(self) -> list[float]:
        """Of all probes, from the sample's predictions: means over its tokens."""
        sums = [0.0] * len(self._probes)
        reference = self._sample.values.flatten(0, 1)
        places = torch.arange(len(reference))
        for rows in places.split(self._sweep.logit_rows):
            logs = self._logs(reference[rows])
            for i, probe in enumerate(self._probes):
                found = self._logs(probe.states.values.flatten(0, 1)[rows])
                sums[i] += float(divergence(logs, found).sum())
        return [each / len(places) for each in sums]

    def _logs(self, rows: Tensor) -> Tensor:
        """Logarithms of probabilities [R, vocabulary]."""
        return self._sweep.logits(rows).log_softmax(-1)

    def _layer_groups(self, factors: Factors) -> Iterator[Group]:
        by_names: dict[tuple[str, ...], dict[str, float]] = {}
        for layer, tried in self._tried:
            factor = factors.at(layer, kind_of(tried.names))
            by_names.setdefault(tried.names, {})[tried.fmt] = factor * tried.error
        for names, kld in by_names.items():
            yield self._group(names, kld)

    def _group(self, names: tuple[str, ...], kld: Mapping[str, float]) -> Group:
        formats = self._candidates.formats
        sizes = {fmt: self._candidates.nbytes(names, fmt) for fmt in formats}
        return Group(names, sizes, {**kld, KEEP: 0.0})

    def _end_groups(self) -> Iterator[Group]:
        """The table, whose rounded rows went through all layers and which may be the head, too, and a head of its own."""
        chosen = self._candidates
        if chosen.table is not None:
            kld = {
                fmt: self._end_divergence(states, chosen.table if chosen.tied else None, fmt)
                for fmt, states in self._tables.items()
            }
            yield self._group((chosen.table,), kld)
        if chosen.head is not None:
            kld = {
                fmt: self._end_divergence(self._sample, chosen.head, fmt)
                for fmt in chosen.formats[:-1]
            }
            yield self._group((chosen.head,), kld)

    @torch.inference_mode()
    def _end_divergence(self, states: States, head: str | None, fmt: str) -> float:
        """Seen as it is, over some of the sample, of `states` after the last layer and with the weight `head` rounded."""
        step = -(-self._sample.tokens.numel() // HEAD_TOKENS)
        rows, found = (
            each.values.flatten(0, 1)[::step].split(self._sweep.logit_rows)
            for each in (self._sample, states)
        )
        view = view_weight if head is None else self._rounded(head, fmt)
        total = 0.0
        for some, other in zip(rows, found, strict=True):
            self._sweep.rebind_head(view_weight)
            logs = self._logs(some)
            self._sweep.rebind_head(view)
            total += float(divergence(logs, self._logs(other)).sum())
        self._sweep.rebind_head(view_weight)
        return total / sum(map(len, rows))

    def _rounded(self, name: str, fmt: str) -> View:
        rounding = self._candidates.rounding(name, fmt)

        def view(spec: WeightSpec, block: Tensor) -> Weight:
            return RoundedWeight(view_weight(spec, block), rounding)

        return view

    def close(self) -> None:
        self._stack.close()
        self._probes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
