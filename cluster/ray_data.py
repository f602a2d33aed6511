"""Rows of Ray Data's datasets through rings: a config for `ray.data.llm.build_processor`, and its processor.

Each actor of a processor drives a ring. The batches that it has at once share passes, so that no batch's longest
row keeps the ring from others.
"""

import asyncio
import atexit
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from typing import Annotated, Any
from uuid import uuid4

import ray.data
from pydantic import Field, field_validator
from ray.data.llm import Processor, ProcessorConfig, build_processor
from ray.llm._internal.batch.processor import ProcessorBuilder
from ray.llm._internal.batch.stages import StatefulStage
from ray.llm._internal.batch.stages.base import StatefulStageUDF
from ray.llm._internal.batch.stages.common import maybe_convert_ndarray_to_list

from headrace.cluster.actor_engine import actor_engine, actor_options
from headrace.cluster.completion import Completion
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.rows import Draft, Row, prepare
from headrace.cluster.seeds import derive_seed
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.metrics import Metrics
from headrace.scheduler.errors import RequestError
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams

__all__ = ["HeadraceProcessorConfig", "build_processor"]

log = logging.getLogger(__name__)

_SHOWN = 500
"""Characters of a prompt that are kept of a row that failed."""


class HeadraceProcessorConfig(ProcessorConfig):  # type: ignore[misc]
    """Names are those of Ray's `vLLMEngineProcessorConfig`: `batch_size` rows a batch (32), `concurrency` rings.

    `model_source` is a store, at this path on every node; `engine_kwargs` are keywords of `headrace.LLM`: `stages`,
    `device_memory`, ... An actor has `max_concurrent_batches` at once. With `should_continue_on_error` a row that
    cannot be served gets a reason in `__inference_error__`, and the others are served.
    """

    model_source: str
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    max_concurrent_batches: Annotated[int, Field(ge=1)] = 8
    max_tasks_in_flight_per_actor: Annotated[int, Field(ge=1)] | None = None
    should_continue_on_error: bool = False

    @field_validator("accelerator_type")
    @classmethod
    def none_is_chosen(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError("stages take any GPU: leave it out")


class RingUDF(StatefulStageUDF):  # type: ignore[misc]
    """An actor's part: rows in, rows with answers out. Ray Data has one event loop call it for all batches."""

    def __init__(
        self,
        data_column: str,
        expected_input_keys: list[str],
        options: EngineOptions,
        chat_template_kwargs: Mapping[str, Any] | None,
        rows_at_once: int,
        continues: bool,
    ) -> None:
        super().__init__(data_column, expected_input_keys)
        self._template, self._continues = chat_template_kwargs, continues
        self._stack = ExitStack()
        self._ring = self._stack.enter_context(actor_engine(options))
        # Ray Data bounds how many rows there are: none is turned away.
        self._engine = AsyncEngine(self._ring, Metrics(self._ring.events), max_waiting=0)
        self._stack.callback(self._engine.join)
        # An error's traceback may refer to this object, so that __del__ is not called before the process ends.
        atexit.register(self._stack.close)
        self._is_started = False
        self._encoder = Encoder(self._ring.tokenizer)
        if rows_at_once < self._ring.max_sequences:
            log.warning(
                "%d rows are here at once and the ring has room for %d sequences: raise batch_size or"
                " max_concurrent_batches",
                rows_at_once,
                self._ring.max_sequences,
            )

    async def udf(self, rows: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        if not self._is_started:
            self._is_started = True
            self._engine.start()
        answering = [asyncio.ensure_future(self._answered(row)) for row in rows]
        try:
            for answered in asyncio.as_completed(answering):
                yield await answered
        finally:  # or an error of one row would leave the others in the ring
            for each in answering:
                each.cancel()

    async def _answered(self, given: dict[str, Any]) -> dict[str, Any]:
        index = {self.IDX_IN_BATCH_COLUMN: given[self.IDX_IN_BATCH_COLUMN]}
        started = time.perf_counter()
        try:
            row = await asyncio.to_thread(self._read, given)
            completion = await self._generate(row)
        except RequestError as error:
            if not self._continues:
                raise
            return {**index, **_failed(given, error)}
        except Exception:
            if self._engine.error is not None:
                await self._leave()
            raise
        return {
            **index,
            **_columns(given, row, completion, self._ring.tokenizer),
            "time_taken_llm": time.perf_counter() - started,
        }

    def _read(self, given: dict[str, Any]) -> Row:
        """RequestError for a row that cannot be served."""
        wanted = maybe_convert_ndarray_to_list(given.get("sampling_params") or {})
        if not isinstance(wanted, dict):
            raise RequestError("sampling_params must be a dict", "sampling_params")
        wanted.pop("detokenize", None)  # text is always there, as after Ray's own stages
        row = {**wanted, **_prompt(given)}
        if "messages" in row:
            row["chat_template_kwargs"] = self._template
        ring = self._ring
        read = prepare(
            Draft(0, 0, 0, False, row),
            self._encoder,
            SamplingParams(),
            ring.max_context,
            ring.adapters,
        )
        if read.params.n > 1:
            raise RequestError("n: a row has one answer; repeat the row, with other seeds", "n")
        ring.check(read.token_ids, read.params)
        return read

    async def _generate(self, row: Row) -> Completion:
        own = uuid4().hex if row.params.seed is None else row.params.seed
        seed = derive_seed(self._ring.model_digest, own, 0)
        order = Order(row.token_ids, row.params, seed, keep=row.keep_context, adapter=row.adapter)
        with self._engine.running([order], of_batch=True) as generation:
            return await _ended(generation)

    async def _leave(self) -> None:
        """Of a ring that has failed: Ray Data makes another actor and gives it the batches that are lost.

        It does so for a process that is gone, and not for an error.
        """
        log.error("the ring failed, and is replaced: %s", self._engine.error)
        try:
            await asyncio.to_thread(self._stack.close)
        finally:
            os._exit(1)

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()


class RingStage(StatefulStage):  # type: ignore[misc]
    fn: type[StatefulStageUDF] = RingUDF

    def get_optional_input_keys(self) -> dict[str, str]:
        return {
            "messages": "A conversation, as OpenAI's API has it. Goes before the others.",
            "tokenized_prompt": "Token ids.",
            "prompt": "A text.",
            "sampling_params": "Names and defaults as in rows of `headrace generate`.",
        }


def _build(
    config: HeadraceProcessorConfig,
    chat_template_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Processor:
    stage = RingStage(
        fn_constructor_kwargs={
            "options": actor_options(config.model_source, config.engine_kwargs),
            "chat_template_kwargs": chat_template_kwargs,
            "rows_at_once": config.batch_size * config.max_concurrent_batches,
            "continues": config.should_continue_on_error,
        },
        map_batches_kwargs={
            "zero_copy_batch": True,
            "compute": ray.data.ActorPoolStrategy(
                **config.get_concurrency(),
                max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor,
            ),
            "max_concurrency": config.max_concurrent_batches,
            # As the driver of any engine it is not counted: stages have the processors.
            "num_cpus": 0,
        },
    )
    return Processor(config, [stage], **kwargs)


ProcessorBuilder.register(HeadraceProcessorConfig, _build)


def _prompt(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be continued, under its name in a row of ours."""
    for column, name in (("messages", "messages"), ("tokenized_prompt", "prompt")):
        if given.get(column) is not None:
            return {name: maybe_convert_ndarray_to_list(given[column])}
    return {"prompt": given.get("prompt")}


async def _ended(generation: Generation) -> Completion:
    while True:
        for progress in await generation.read():
            if progress.completion is not None:
                return progress.completion


def _columns(
    given: Mapping[str, Any], row: Row, completion: Completion, tokenizer: Any
) -> dict[str, Any]:
    """As Ray's vLLM stage names them, and `finish_reason`."""
    prompt = given.get("prompt") if _prompt(given).keys() == {"prompt"} else None
    logprobs = completion.logprobs
    return {
        "prompt": prompt if isinstance(prompt, str) else tokenizer.decode(row.token_ids),
        "prompt_token_ids": row.token_ids,
        "num_input_tokens": completion.num_prompt,
        "generated_tokens": completion.token_ids,
        "generated_text": completion.text,
        "num_generated_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "logprobs": logprobs and [_logprobs(sample, tokenizer) for sample in logprobs],
        "__inference_error__": "",
    }


def _logprobs(sample: Sample, tokenizer: Any) -> dict[int, dict[str, Any]]:
    """By token. The drawn one has no rank when it is none of the most likely."""
    ranked: dict[int, tuple[float | None, int | None]] = {
        token: (logprob, rank) for rank, (token, logprob) in enumerate(sample.top, start=1)
    }
    ranked.setdefault(sample.token, (sample.logprob, None))
    return {
        token: {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.decode([token])}
        for token, (logprob, rank) in ranked.items()
    }


def _failed(given: Mapping[str, Any], error: RequestError) -> dict[str, Any]:
    return {
        "prompt": str(given.get("prompt") or "")[:_SHOWN],
        "prompt_token_ids": None,
        "num_input_tokens": 0,
        "generated_tokens": [],
        "generated_text": "",
        "num_generated_tokens": 0,
        "finish_reason": "error",
        "logprobs": None,
        "time_taken_llm": -1.0,
        "__inference_error__": f"{type(error).__name__}: {error}",
    }
