"""A store as a model of lm-evaluation-harness: likelihoods by sweeps, generation by an engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headrace.cluster.cli.sizes import parse_size
from headrace.cluster.evaluation.corpus import special_prefix, tokenizer_of
from headrace.cluster.keyword_options import engine_options
from headrace.cluster.llm import LLM
from headrace.cluster.run_plan import resolve_device, resolve_dtype
from headrace.runtime.evaluation.continuations import Scored, likelihoods
from headrace.runtime.shape import model_shape
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.request import SamplingParams

MOST_LENGTH = 4096
"""Tokens of a request that are looked at, by default, where the model goes further."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("headrace")
class HeadraceLM(TemplateLM):  # type: ignore[misc]
    """`store` is a store; likelihoods can also be had of a checkpoint.

    `max_length` are the tokens of a request that are looked at, the last ones where there are more. `device`,
    `dtype` and `device_memory` mean what they mean to commands, and other keywords are the engine's
    (EngineOptions), which runs while there is text to generate. A sweep takes all requests of a task at
    once, so `batch_size` and `max_batch_size`, which the harness always hands over, change nothing here.
    Raises HeadraceError.
    """

    def __init__(
        self,
        store: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        device_memory: str | int | None = None,
        max_length: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **engine: Any,
    ) -> None:
        super().__init__()
        self._path = Path(store)
        self._model = open_model(self._path)
        self._device = torch.device(resolve_device(device or "auto"))
        dtype_name = resolve_dtype(dtype, self._device.type, self._model)
        self._dtype: torch.dtype = getattr(torch, dtype_name)
        self._memory = device_memory
        self.tokenizer = tokenizer_of(self._model)
        self._prefix = special_prefix(self.tokenizer)
        reach = model_shape(self._model, dtype_name).max_context
        self.max_length = min(reach, MOST_LENGTH) if max_length is None else int(max_length)
        self._engine = {
            "device": self._device.type,
            "dtype": dtype,
            "device_memory": device_memory,
            "context": self.max_length,
            **engine,
        }
        engine_options(self._path, self._engine)  # a mistake shows now, not after an hour

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that begins with nothing."""
        return self._prefix[0] if self._prefix else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """With what the tokenizer puts before a text, unless the text begins with it or nobody wants it."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        wanted = add_special_tokens is not False and ids[: len(self._prefix)] != self._prefix
        return [*self._prefix, *ids] if wanted else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return self._score([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Whole texts, in windows of `max_length` tokens that each begin where the one before ended."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += log
        return totals

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(context, continuation) each."""
        if not pairs:
            return []
        requests = [_scored(before, after, self.max_length) for before, after in pairs]
        memory = parse_size(self._memory) if isinstance(self._memory, str) else self._memory
        with Sweep(
            self._model,
            self._device,
            self._dtype,
            context=max(len(request.tokens) for request in requests) - 1,
            device_memory=memory,
        ) as sweep:
            found = likelihoods(sweep, requests, lambda *_: None)
        return [(one.log, one.is_greedy) for one in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """By an engine, all requests at once; the harness asks once for all tasks."""
        params = [self._sampling(request.args[1]) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-max(1, self.max_length - one.max_tokens) :]
            for request, one in zip(requests, params, strict=True)
        ]
        with LLM(self._path, **self._engine) as llm:
            return [each.outputs[0].text for each in llm.generate(prompts, params)]

    def _sampling(self, wishes: Mapping[str, Any]) -> SamplingParams:
        given = normalize_gen_kwargs(dict(wishes), 256)
        end = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(given.pop("until", None), eos=end)
        most, _ = given.pop("max_gen_toks"), given.pop("do_sample", None)
        if unknown := sorted(given.keys() - set(SAMPLING)):
            raise HeadraceError(
                f"a task asks for {', '.join(unknown)}, which an engine does not know; it knows {', '.join(SAMPLING)}"
            )
        return SamplingParams(max_tokens=most, stop=tuple(stop), **given)


def _scored(before: Sequence[int], after: Sequence[int], max_length: int) -> Scored:
    """The last `max_length` tokens that are computed with, and the one after them."""
    tokens = (*before, *after)[-(max_length + 1) :]
    return Scored(tokens, min(len(after), len(tokens) - 1))
