"""The library's front door, in the shape that vLLM's users know."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from headrace.cluster.completion import Completion
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.keyword_options import engine_options
from headrace.cluster.launch import running_engine
from headrace.cluster.replacement import Replacement
from headrace.cluster.rows import chat_tokens, prompt_tokens
from headrace.cluster.seeds import derive_seed
from headrace.cluster.tools.use import chat_template_with
from headrace.scheduler.errors import RequestError
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation. `logprobs` has a Sample per token when they were asked for."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Sample] | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its `n` continuations. `prompt` is None for prompts given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """A model on its own ring of stages, for use from Python.

    >>> with LLM("stories.nf4", stages=2, device_memory="6MiB") as llm:
    ...     llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32))

    `model` is a store made by `headrace convert`. Keywords are EngineOptions' (`device`, `dtype`,
    `placement`, `context`, ...); memory may be bytes or text such as "600MB" or "10GiB",
    `kv_ttl` seconds or text such as "12h". Starting
    takes seconds; `close()`, or leaving the `with` block, ends every process that was started and
    writes `trace`, if there is one: a file for Perfetto of each stage's newest passes.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._stack = ExitStack()
        self._engine = self._stack.enter_context(running_engine(engine_options(model, options)))
        self._encoder = Encoder(self._engine.tokenizer)
        self._count = 0

    @property
    def plan(self) -> Plan:
        """The Plan that this engine runs by."""
        return self._engine.plan

    @property
    def stats(self) -> EngineStats:
        """What has been done since the engine started; `stats.kv` is about KV pages."""
        return self._engine.stats

    def get_tokenizer(self) -> Any:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        keep_context: bool = False,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids); results come in the order of the prompts.

        `keep_context` saves keys and values of prompts and answers to host RAM and NVMe, where there
        is room for them: a later prompt that begins with the same tokens finds them. All run with the `adapter` of that name, if one is given. RequestError when a prompt cannot be served (empty, or longer than the context, or with a grammar that cannot be
        followed).
        """
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        several: Any = [prompts] if single else prompts
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        context = self._engine.max_context
        tokens = [
            prompt_tokens(self._encoder, prompt, context=context)
            if isinstance(prompt, str)
            else list(prompt)
            for prompt in several
        ]
        return self._run(texts, tokens, sampling_params, keep_context, adapter)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        keep_context: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template, which is told of `tools`.

        Calls are in the text as the model writes them. All run with the `adapter` of that name, if one is given.
        """
        one = bool(messages) and isinstance(messages[0], dict)
        conversations: Any = [messages] if one else messages
        if tools:
            chat_template_with(self._engine.tokenizer, tools)
        context = self._engine.max_context
        tokens = [
            chat_tokens(self._encoder, list(each), None, tools, context=context)
            for each in conversations
        ]
        return self._run([None] * len(tokens), tokens, sampling_params, keep_context, adapter)

    def _run(
        self,
        texts: Sequence[str | None],
        tokens: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        keep: bool,
        adapter: str | None,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(tokens)
        waiting: dict[int, tuple[int, int]] = {}
        for i, (prompt, wish) in enumerate(zip(tokens, params, strict=True)):
            self._count += 1
            for index in range(wish.n):
                own = self._count if wish.seed is None else wish.seed
                seed = derive_seed(self._engine.model_digest, own, index)
                one = replace(wish, n=1)
                number = self._engine.add(prompt, one, seed, keep=keep, adapter=adapter)
                waiting[number] = (i, index)
        done: dict[tuple[int, int], Completion] = {}
        while waiting:
            for completion in self._engine.step():
                done[waiting.pop(completion.request_id)] = completion
        if failed := [each.error for each in done.values() if each.error is not None]:
            raise RequestError(failed[0])
        return [
            RequestOutput(
                request_id=str(i),
                prompt=text,
                prompt_token_ids=prompt,
                outputs=[_output(index, done[i, index]) for index in range(wish.n)],
            )
            for i, (text, prompt, wish) in enumerate(zip(texts, tokens, params, strict=True))
        ]

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Have `generate` know a LoRA adapter that PEFT has saved in a directory. HeadraceError when it cannot be
        applied, the name is taken, or there are no slots for adapters (`adapters`, or `adapter_slots`)."""
        self._engine.load_adapters({name: Path(path)})

    def unload_adapter(self, name: str) -> None:
        """Forget a name. RequestError when there is none."""
        self._engine.remove_adapter(name)

    def replace_stage(self, stage: int, node: str | None = None) -> Replacement:
        """Move a stage to a new process, with the keys and values that it has: to take a GPU or a node out
        of service. Call it between other calls.

        Without a `node` the new process starts where the old one was; with the id, host name or address
        of a node of the Ray cluster, there, beside the old one until it has taken over. HeadraceError
        when there is no such stage or node, or no room for the new process.
        """
        return self._engine.replace_stage(stage, node)

    def close(self) -> None:
        """End the engine and its processes. Safe to call twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _output(index: int, completion: Completion) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        logprobs=completion.logprobs,
    )
