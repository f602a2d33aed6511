"""All sequences through one layer, then through the next: a model is read once for a whole corpus.

with Sweep(open_model(path), device, dtype, context=1024) as sweep, sweep.embed(tokens) as states:
    for layer in sweep.layers():
        layer.run(states)
    logits = sweep.logits(states.values[0])
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from headrace.runtime.batch import Batch
from headrace.runtime.binding import View
from headrace.runtime.dtypes import name_of
from headrace.runtime.model import Prepared, StageModel
from headrace.runtime.shape import model_shape
from headrace.runtime.sweep.feed import LayerFeed
from headrace.runtime.sweep.pages import SweepPages
from headrace.runtime.sweep.room import device_budget, fitting_tokens, logit_rows, pages_of
from headrace.runtime.sweep.source import SweptModel
from headrace.runtime.sweep.states import States
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

MOST_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Of a micro-batch, where memory has room: enough that a layer's arithmetic hides the next one's load."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A micro-batch: positions [start, end) of the sequences [first, last)."""

    first: int
    last: int
    start: int
    end: int


class Sweep:
    """A model, of which two layers and what follows the last one are in the device's memory at a time.

    `context` is the longest sequence. A micro-batch has at most `micro_batch_tokens` tokens, by default as
    many as `device_memory` bytes have room for (on CUDA by default most of what is free); a sequence that is longer goes through a layer in parts,
    over its own keys and values. `host_memory` is for hidden states, see `States`; `storage` says how a
    store's files are read; `with_head`, whether there are going to be logits. Raises DoesNotFitError, with the figure, when `device_memory` does not suffice, and
    HeadraceError when the model does not go as far as `context`.
    """

    def __init__(
        self,
        model: SweptModel,
        device: torch.device,
        dtype: torch.dtype,
        *,
        context: int,
        device_memory: int | None = None,
        micro_batch_tokens: int | None = None,
        host_memory: int | None = None,
        directory: Path | None = None,
        storage: str = "auto",
        with_head: bool = True,
    ) -> None:
        self.model = model
        self.device, self.dtype, self.context = device, dtype, context
        shape = model_shape(model, name_of(dtype))
        most = MOST_TOKENS[device.type] if micro_batch_tokens is None else micro_batch_tokens
        budget = device_budget(device, device_memory)
        self.micro_batch_tokens = fitting_tokens([shape], context, budget, most, has_head=with_head)
        self.vocabulary = shape.vocab_size
        self.logit_rows = logit_rows(shape.vocab_size)
        self._host_memory, self._directory = host_memory, directory
        self._pages = pages_of(context, self.micro_batch_tokens)
        with ExitStack() as stack:
            self._stage = StageModel(
                model,
                range(len(model.layers)),
                device=device,
                dtype=dtype,
                with_embedding=True,
                with_head=with_head,
            )
            stack.callback(self._stage.close)
            _refuse_context(self._stage, context, model)
            self._kv = stack.enter_context(
                SweepPages(model.layer_shapes, self._pages, dtype, device)
            )
            self._feed = stack.enter_context(LayerFeed(model, device, storage))
            self._stack = stack.pop_all()
        self._alike = _is_alike(self._stage)
        self._prepared: tuple[tuple[int, int, int], Prepared] | None = None

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    @torch.inference_mode()
    def embed(self, tokens: Tensor, through: Callable[[Tensor], Tensor] | None = None) -> States:
        """tokens [sequences, length] int64, on the host -> what the first layer gets. Rows of the embedding table [T, hidden]
        float32 go `through`, if it is given."""
        sequences, length = tokens.shape
        assert 0 < length <= self.context, (length, self.context)
        size = sequences, length, self._stage.hidden_size
        states = States(
            size, self.dtype, tokens, host_memory=self._host_memory, directory=self._directory
        )
        for piece in self._pieces(sequences, length):
            batch = self._batch(piece, tokens)
            rows = self._stage.rows(batch)
            if through is not None:
                rows = through(rows.float()).to(rows.dtype)
            x = self._stage.enter(rows, batch).x
            _part(states, piece).copy_(x.view(piece.last - piece.first, -1, x.shape[-1]))
        return states

    def layers(self, first: int = 0) -> Generator["SweptLayer", None, None]:
        """The layers in order, from `first` on; each can be run until the next one is asked for.

        Whoever stops before the last one closes the generator.

        Raises StoreError when one cannot be read.
        """
        with closing(self._feed.blocks(first)) as blocks:
            for index, block in blocks:
                self._stage.bind(index, block)
                yield SweptLayer(self, index, self._stage.layer(index), block)

    def rebind(self, index: int, block: Tensor, view: View) -> None:
        """`SweptLayer.rebind`."""
        self._stage.bind_through(index, block, view)

    def rebind_head(self, view: View) -> None:
        """From now on logits are made with a head that is what `view` makes of it."""
        self._stage.bind_head_through(view)

    @torch.inference_mode()
    def run_layer(self, index: int, states: States, *, keep: bool) -> None:
        """`SweptLayer.run`."""
        for piece in self._pieces(states.sequences, states.length):
            part = _part(states, piece)
            prepared = self._prepare(piece, states.tokens)
            x = part.to(self.device).reshape(-1, part.shape[-1])
            out = self._stage.run_layer(index, x, prepared, self._kv)
            if keep:
                part.copy_(out.view(part.shape))

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """rows [R, hidden] of the last layer's output -> [R, vocabulary] float32, on the device.

        The caller takes at most `logit_rows` rows at a time.
        """
        assert len(rows) <= self.logit_rows, (len(rows), self.logit_rows)
        return self._stage.logits(rows.to(self.device))

    def _pieces(self, sequences: int, length: int) -> Iterator[Piece]:
        """Whole sequences where several fit, else parts of one, in order."""
        # Shorter ones than `context` waste more of their pages.
        at_once = min(self.micro_batch_tokens // length, self._pages // -(-length // PAGE_TOKENS))
        if at_once:
            for first in range(0, sequences, at_once):
                yield Piece(first, min(first + at_once, sequences), 0, length)
            return
        for row in range(sequences):
            for start in range(0, length, self.micro_batch_tokens):
                yield Piece(row, row + 1, start, min(start + self.micro_batch_tokens, length))

    def _prepare(self, piece: Piece, tokens: Tensor) -> Prepared:
        """What layers are given beside states, which for most models depends on positions alone."""
        if not self._alike:
            return self._stage.prepare(self._batch(piece, tokens))
        key = piece.last - piece.first, piece.start, piece.end
        if self._prepared is None or self._prepared[0] != key:
            batch = self._batch(piece, None)
            blank = torch.zeros(1, self._stage.hidden_size, dtype=self.dtype, device=self.device)
            rows = blank.expand(len(batch.positions), -1)
            self._prepared = key, self._stage.enter(rows, batch)
        return self._prepared[1]

    def _batch(self, piece: Piece, tokens: Tensor | None) -> Batch:
        used = -(-piece.end // PAGE_TOKENS)
        blank = (0,) * (piece.end - piece.start)
        slices = (
            Slice(
                request=place,
                start=piece.start,
                tokens=blank
                if tokens is None
                else tuple(tokens[row, piece.start : piece.end].tolist()),
                pages=tuple(range(place * used, (place + 1) * used)),
                sampling=None,
            )
            for place, row in enumerate(range(piece.first, piece.last))
        )
        return Batch.build(MicroBatch(tuple(slices)), self.device)

    def close(self) -> None:
        """Let reads end and free what is held. Safe to call twice."""
        self._stack.close()
        self._prepared = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class SweptLayer:
    """One layer, whose weights are in device memory now, in `block` (uint8). `module` is transformers' own: forward
    hooks of its linears (QuantLinear; `named`) are called once a micro-batch, with inputs [1, T, features]."""

    sweep: Sweep
    index: int
    module: nn.Module
    block: Tensor

    def named(self) -> dict[str, nn.Module]:
        """The layer's modules by name, such as "self_attn.q_proj"."""
        return {name: module for name, module in self.module.named_modules() if name}

    def rebind(self, view: View) -> None:
        """From now on the layer's weights are what `view` makes of their places in `block`."""
        self.sweep.rebind(self.index, self.block, view)

    def run(self, states: States, *, keep: bool = True) -> None:
        """Takes all sequences through the layer, in place; without `keep` the states stay as they were, for
        hooks that only look."""
        self.sweep.run_layer(self.index, states, keep=keep)


def _part(states: States, piece: Piece) -> Tensor:
    return states.values[piece.first : piece.last, piece.start : piece.end]


def _refuse_context(stage: StageModel, context: int, model: SweptModel) -> None:
    limit = stage.context_limit
    if limit is not None and context > limit:
        raise HeadraceError(
            f"sequences of {context} tokens are longer than {model.path} gives the reference's results for "
            f"({limit}): choose a --context up to that"
        )


@torch.inference_mode()
def _is_alike(stage: StageModel) -> bool:
    """Whether layers get the same beside their input whatever the tokens are: found by trying."""
    piece = Slice(request=0, start=0, tokens=(0, 0), pages=(0,), sampling=None)
    batch = Batch.build(MicroBatch((piece,)), stage.device)
    shape = 2, stage.hidden_size
    one = torch.ones(shape, dtype=stage.dtype, device=stage.device)
    other = torch.linspace(-1, 1, shape[0] * shape[1], device=stage.device)
    calls = [stage.enter(rows, batch).calls for rows in (one, other.to(stage.dtype).view(shape))]
    return all(map(_is_equal, *calls))


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)
