"""Stores beside a reference, over texts: opened, swept in lock step, and summed up."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.cluster.evaluation.alike import refuse_other_model
from headrace.cluster.evaluation.corpus import Corpus
from headrace.cluster.evaluation.results import VERSION, Evaluation, ModelFigures, StoreFigures
from headrace.cluster.evaluation.shown import SHOWN, STRETCH, Reader, choose_prompts
from headrace.cluster.run_plan import resolve_device, resolve_dtype
from headrace.runtime.evaluation.figures import (
    divergence_figures,
    octaves,
    perplexity,
    worst_windows,
)
from headrace.runtime.evaluation.greedy import continue_greedily
from headrace.runtime.evaluation.measure import Predictions, Progress, measure
from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.shape import model_shape
from headrace.runtime.sweep.room import device_budget, fitting_tokens
from headrace.runtime.sweep.source import SweptModel
from headrace.runtime.sweep.sweep import MOST_TOKENS, Sweep

CONTEXT = 1024
"""Tokens of a window, unless the model is made for fewer."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """`tokens` of each text; `device_memory` in bytes; `prompts` greedy continuations of `new_tokens`."""

    text: tuple[Path, ...]
    context: int | None = None
    tokens: int = 16384
    device: str = "auto"
    device_memory: int | None = None
    dtype: str = "auto"
    prompts: int = 8
    new_tokens: int = 32


def evaluate(
    stores: Sequence[SweptModel],
    reference: SweptModel | None,
    options: EvalOptions,
    progress: Progress,
) -> Evaluation:
    """Figures of every model; with a reference (a checkpoint or a store) also how far it is from that.

    With one, all models are swept in lock step, so that the memory is that of all; without, one by one.
    Raises HeadraceError.
    """
    models = [*([] if reference is None else [reference]), *stores]
    corpus = Corpus(models[0], options.text, options.tokens)
    run = _Run(models, corpus, options, progress)
    if reference is None:
        found = [(run.model(i, one), one) for i, [one] in enumerate(run.one_by_one())]
        return run.evaluation(None, [StoreFigures(model) for model, _ in found])
    beside, *others = run.together()
    return run.evaluation(beside[0], [run.compared(beside, other) for other in others])


_Found = tuple[ModelFigures, Predictions, Tensor | None]


class _Run:
    """What all models of an evaluation share. Raises HeadraceError when they cannot be compared."""

    def __init__(
        self,
        models: Sequence[SweptModel],
        corpus: Corpus,
        options: EvalOptions,
        progress: Progress,
    ) -> None:
        self._models, self._corpus, self._options = models, corpus, options
        self._progress = progress
        self.device = torch.device(resolve_device(options.device))
        self.dtype_name = resolve_dtype(options.dtype, self.device.type, models[0])
        self._dtype: torch.dtype = getattr(torch, self.dtype_name)
        self._shapes = [model_shape(model, self.dtype_name) for model in models]
        for model, shape in zip(models, self._shapes, strict=True):
            refuse_other_model(models[0], self._shapes[0], model, shape)
            corpus.require_same(model)
        most = min(shape.max_context for shape in self._shapes)
        wanted = min(most, CONTEXT) if options.context is None else options.context
        self.windows: Windows = corpus.windows(wanted)
        self._prompts = None
        if options.prompts and len(models) > 1:
            self._prompts = choose_prompts(self.windows, options.prompts, options.new_tokens)
        self.tokens = 0

    def one_by_one(self) -> list[list[Predictions]]:
        found = []
        for index in range(len(self._models)):
            with self._sweeps([index]) as sweeps:
                found.append(measure(sweeps, self.windows, self._progress))
        return found

    def together(self) -> list[_Found]:
        with self._sweeps(range(len(self._models))) as sweeps:
            found = measure(sweeps, self.windows, self._progress)
            said = self._continuations(sweeps)
        models = [self.model(i, one) for i, one in enumerate(found)]
        return list(zip(models, found, said, strict=True))

    @contextmanager
    def _sweeps(self, chosen: Sequence[int]) -> Iterator[list[Sweep]]:
        budget = device_budget(self.device, self._options.device_memory)
        shapes = [self._shapes[i] for i in chosen]
        context = self.windows.context
        self.tokens = fitting_tokens(shapes, context, budget, MOST_TOKENS[self.device.type])
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    Sweep(
                        self._models[i],
                        self.device,
                        self._dtype,
                        context=context,
                        micro_batch_tokens=self.tokens,
                    )
                )
                for i in chosen
            ]

    def _continuations(self, sweeps: Sequence[Sweep]) -> list[Tensor | None]:
        """Of each model; the text's own is the reference's first guess, and the reference's the others'."""
        if self._prompts is None:
            return [None] * len(sweeps)
        prompts, guess = self._prompts
        said: list[Tensor | None] = []
        for sweep in sweeps:
            own, _ = continue_greedily(sweep, prompts, guess, self._progress)
            guess = own if not said else guess
            said.append(own)
        return said

    def model(self, index: int, found: Predictions) -> ModelFigures:
        model = self._models[index]
        weights = sum(shape.parameters for shape in model.layer_shapes)
        return ModelFigures(
            path=str(model.path),
            format=model.format,
            nbytes=model.nbytes,
            bits_a_weight=8 * sum(block.nbytes for block in model.layers) / weights,
            perplexity=perplexity(self.windows, found),
            seconds_a_token=found.seconds / self.windows.computed,
        )

    def compared(self, beside: _Found, other: _Found) -> StoreFigures:
        reference, predictions, said = beside
        model, found, own = other
        windows, reader = self.windows, Reader(self._corpus.tokenizer)
        generation = None
        if self._prompts is not None and said is not None and own is not None:
            generation = reader.generation(self._prompts[0], said, own)
        return StoreFigures(
            model=model,
            perplexity_ratio=model.perplexity / reference.perplexity,
            divergence=divergence_figures(windows, predictions, found),
            octaves=list(octaves(windows, predictions, found)),
            layer_errors=found.layer_errors or None,
            generation=generation,
            worst=[
                reader.window(worst, windows, predictions, found)
                for worst in worst_windows(windows, found, SHOWN, STRETCH)
            ],
        )

    def evaluation(self, reference: ModelFigures | None, stores: list[StoreFigures]) -> Evaluation:
        return Evaluation(
            version=VERSION,
            texts=[str(file) for file in self._corpus.files],
            context=self.windows.context,
            windows=len(self.windows.lengths),
            predicted=self.windows.count,
            device=self.device.type,
            dtype=self.dtype_name,
            micro_batch_tokens=self.tokens,
            reference=reference,
            stores=stores,
        )
