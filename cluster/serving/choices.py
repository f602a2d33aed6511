"""What clients are sent of a generation: pieces while it goes on, or the whole at its end."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from headrace.cluster import answers
from headrace.cluster.completion import Completion
from headrace.cluster.detokenize import TextDeltas
from headrace.cluster.logprobs import LogprobLists
from headrace.cluster.rows import Kind, Tokenizer
from headrace.cluster.serving.generation import Generation, Progress
from headrace.cluster.serving.reader import Model, Work
from headrace.cluster.tools.calls import CallReader, Said
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import FinishReason, SamplingParams

_MANY = 128
"""Tokens whose text takes longer than to have another thread make it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of one choice: what was said, the tokens that it came of, and the sequence when it has
    ended."""

    index: int
    said: Said
    samples: list[Sample]
    completion: Completion | None


class Choice:
    """One sequence's text as it comes, or text and calls where a `reader` tells them apart. Tokens are
    held back until the text that they are part of is shown."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, params: SamplingParams, reader: CallReader | None
    ) -> None:
        self._index, self._deltas = index, TextDeltas(tokenizer, params)
        self._reader = reader
        self._samples: list[Sample] = []
        self.said = Said()

    def take(self, progress: Progress) -> Piece | None:
        """What can be shown now; None when that is nothing."""
        done = progress.completion
        # The last token may be one that ends the text, or complete a stop string.
        shown = progress.samples if done is None else progress.samples[:-1]
        text = "".join([self._deltas.push(sample.token) for sample in shown])
        self._samples += progress.samples
        if done is not None:
            by_stop = done.finish_reason == FinishReason.STOP.value
            text += self._deltas.finish(done.text, [] if by_stop else done.token_ids[-1:])
        said = self._read(text, is_end=done is not None)
        if done is None and said == Said():
            return None
        self.said.add(said)
        samples, self._samples = self._samples, []
        return Piece(self._index, said, samples, done)

    def _read(self, text: str, *, is_end: bool) -> Said:
        if self._reader is None:
            return Said(text)
        said = self._reader.feed(text)
        if is_end:
            said.add(self._reader.finish())
        return said


class Answer:
    """One request's answer in OpenAI's shapes. `created` is Unix seconds."""

    def __init__(self, work: Work, model: Model, created: int) -> None:
        self._work, self._tokenizer = work, model.tokenizer
        self._envelope = answers.envelope(work.kind, work.name, work.adapter or model.name, created)
        self._choices = [
            Choice(
                index,
                model.tokenizer,
                order.params,
                work.tools.reader(f"{work.name} {index}") if work.tools else None,
            )
            for index, order in enumerate(work.orders)
        ]
        self._done: dict[int, Completion] = {}
        self._logprobs = [
            None if order.params.logprobs is None else LogprobLists(model.tokenizer, order.params)
            for order in work.orders
        ]

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer, when all of its sequences have ended."""
        async for _ in self.pieces(generation):
            pass
        # Lines of batches are the same whenever they run.
        usage = self.usage() if generation.of_batch else self._detailed_usage()
        # With logprobs of many tokens, that takes long.
        return await asyncio.to_thread(self._assemble, usage)

    async def chunks(self, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in the pieces that a stream sends."""
        if self._work.kind is Kind.CHAT:
            for index in range(len(self._choices)):
                yield self._chunk([_delta(index, {"role": "assistant", "content": ""})])
        async for piece in self.pieces(generation):
            yield self._chunk([self._listed(piece)])
        if self._work.include_usage:
            yield {**self._chunk([]), "usage": self._detailed_usage()}

    def _assemble(self, usage: dict[str, Any]) -> dict[str, Any]:
        # As it would have been streamed, to the letter.
        kind, tokenizer = self._work.kind, self._tokenizer
        choices = [
            answers.choice(
                kind, i, self._done[i], tokenizer, self._work.orders[i].params, choice.said
            )
            for i, choice in enumerate(self._choices)
        ]
        return {**self._envelope, "choices": choices, "usage": usage}

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """What comes of all choices, as it comes."""
        while news := await generation.read():
            for progress in news:
                take = self._choices[progress.index].take
                # Usually a token or a few. Of a client that did not keep up there may be thousands.
                is_long = len(progress.samples) > _MANY
                piece = await asyncio.to_thread(take, progress) if is_long else take(progress)
                if progress.completion is not None:
                    self._done[progress.index] = progress.completion
                if piece is not None:
                    yield piece

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._envelope, "choices": choices}
        if self._work.kind is Kind.CHAT:
            chunk["object"] = "chat.completion.chunk"
        if self._work.include_usage:
            chunk["usage"] = None
        return chunk

    def _listed(self, piece: Piece) -> dict[str, Any]:
        reason, lists = self.finish_reason(piece), self._logprobs[piece.index]
        logprobs = None if lists is None else lists.listed(self._work.kind, piece.samples)
        if self._work.kind is Kind.CHAT:
            delta = _fields(piece.said, len(self._choices[piece.index].said.calls))
            return _delta(piece.index, delta, logprobs, reason)
        return {
            "index": piece.index,
            "text": piece.said.content,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def finish_reason(self, piece: Piece) -> str | None:
        """None while its sequence goes on."""
        if piece.completion is None:
            return None
        return answers.finish_reason(piece.completion, bool(self._choices[piece.index].said.calls))

    def usage(self) -> dict[str, int]:
        """When all has been read."""
        done = [self._done[index] for index in range(len(self._choices))]
        return answers.usage_of(done[:: self._work.n], done)

    def _detailed_usage(self) -> dict[str, Any]:
        prompts = range(0, len(self._choices), self._work.n)
        found = sum(self._done[index].num_cached for index in prompts)
        return {**self.usage(), "prompt_tokens_details": {"cached_tokens": found}}


def _fields(said: Said, num_calls: int) -> dict[str, Any]:
    """What is new, of `num_calls` calls until now."""
    fields: dict[str, Any] = {"content": said.content} if said.content else {}
    if said.reasoning:
        fields["reasoning_content"] = said.reasoning
    if said.calls:
        first = num_calls - len(said.calls)
        fields["tool_calls"] = [call.listed(index=first + i) for i, call in enumerate(said.calls)]
    return fields


def _delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
