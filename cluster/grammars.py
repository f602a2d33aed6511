"""Grammars of answers: compiled once by any thread, followed by the one that commits tokens.

llguidance does the work, in Rust and without holding the interpreter. A matcher is a function of the
grammar and of the tokens that were committed, so nothing of it has to survive what stages do.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread, stack_size
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from headrace.scheduler.errors import RequestError
from headrace.scheduler.request import Request
from headrace.scheduler.structured import StructuredOutputsParams

MAX_COMPILED = 256
"""Grammars that are kept for whoever asks for them again."""

_GAP = r" |\n[ \t]{0,20}"
"""White space between two parts of JSON: as models write it, and never without end."""

_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=50_000,  # of 1 to 2 KiB, for each sequence
    max_grammar_size=200_000,
    verbose_errors=False,
)
_STACK = 512 << 20
"""Rules that refer to rules are compiled by recursion, and a stack that ends takes the process along.
These are addresses: what is not needed is no memory."""

_SHOWN = 300
_GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Grammar:
    """What sequences start from; `mask` is of their first token. Never advanced itself."""

    matcher: llguidance.LLMatcher
    mask: bytes


class Grammars:
    """Compiles what users ask for, each distinct one once. Any thread may call it."""

    def __init__(
        self, tokenizer: Any, stop_ids: Collection[int], vocabulary: int | None = None
    ) -> None:
        """`stop_ids` end an answer that is complete; a model has logits of `vocabulary` tokens."""
        self._hf, self._stop_ids, self._vocabulary = tokenizer, sorted(stop_ids), vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._opening, self._lock, self._room = Lock(), Lock(), _DeepStack()
        self._made: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()

    def compiled(self, wanted: StructuredOutputsParams) -> Grammar:
        """RequestError when it is no valid grammar, asks for what llguidance cannot do, or would take
        too much memory or time. The first call takes about a second: the tokenizer is read."""
        with self._lock:
            known = self._made.get(wanted)
            if known is None:
                made = self._made[wanted] = Future[Grammar]()
                while len(self._made) > MAX_COMPILED:
                    self._made.popitem(last=False)
            else:
                self._made.move_to_end(wanted)
        if known is not None:
            return known.result()
        try:
            made.set_result(self._room.call(partial(self._compile, wanted)))
        except BaseException as error:
            with self._lock:
                if self._made.get(wanted) is made:
                    del self._made[wanted]
            made.set_exception(error)
            raise
        return made.result()

    def allowed(self, matchers: list[llguidance.LLMatcher]) -> "NDArray[np.int32]":
        """Which tokens each may go on with, one bit each: [matchers, 32-bit words]."""
        masks = allocate_token_bitmask(len(matchers), self._open().vocab_size)
        places = [(matcher, row) for row, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, places, masks)
        if self._vocabulary is not None:  # tokens without a logit cannot be drawn
            words, bits = divmod(self._vocabulary, 32)
            masks[:, words + bool(bits) :] = 0
            if bits and words < masks.shape[1]:
                masks[:, words] &= np.int32((1 << bits) - 1)
        return masks

    def _open(self) -> llguidance.LLTokenizer:
        with self._opening:
            if self._tokenizer is None:
                known = len(self._hf)
                ends = [i for i in self._stop_ids if i < known]
                if not ends:
                    raise RequestError(
                        "the model has no token that ends a text, which structured outputs need:"
                        ' give it an "eos_token_id"'
                    )
                import llguidance.hf  # and transformers: only when it is needed

                self._executor = llguidance.LLExecutor()
                self._tokenizer = llguidance.hf.from_tokenizer(self._hf, eos_token=ends)
            return self._tokenizer

    def _compile(self, wanted: StructuredOutputsParams) -> Grammar:
        tokenizer = self._open()
        try:
            text = _grammar(wanted)
        except (ValueError, RecursionError) as error:
            raise _refusal(wanted, str(error)) from error
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        # Computed before it is copied, so that nobody computes it again.
        masks = self.allowed([matcher])
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        if not masks.any():
            raise _refusal(wanted, "no answer of this model can be that")
        return Grammar(matcher, masks[0].tobytes())


class _DeepStack:
    """Calls functions in threads of their own, which have a stack of _STACK bytes."""

    def __init__(self) -> None:
        self._starting = Lock()

    def call(self, work: Callable[[], Grammar]) -> Grammar:
        done: Future[Grammar] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
                if not isinstance(error, Exception):
                    raise

        thread = Thread(target=run, name="headrace-grammar", daemon=True)
        with self._starting:
            before = stack_size(_STACK)
            try:
                thread.start()
            finally:
                stack_size(before)
        return done.result()


class Followed:
    """The sequences that are bound to a grammar, each as far as its tokens are committed."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._matchers: dict[int, llguidance.LLMatcher] = {}

    def start(self, request: Request, wanted: StructuredOutputsParams) -> None:
        """Say what the next token of a request may be, the first one or one behind what it has said."""
        grammar = self._grammars.compiled(wanted)
        matcher = self._matchers[request.request_id] = grammar.matcher.deep_copy()
        request.mask = grammar.mask
        if request.output:
            matcher.consume_tokens(request.output)
            [mask] = self._grammars.allowed([matcher])
            request.mask = mask.tobytes()

    def advance(self, requests: Sequence[Request]) -> dict[Request, str | None]:
        """Say what may follow the newest token of each. Returns those that nothing may follow: with None
        where the answer is complete, else with the reason why it cannot become so.

        The masks of all are computed together, by several threads.
        """
        ended: dict[Request, str | None] = {}
        matchers = [self._matchers[request.request_id] for request in requests]
        for request, matcher in zip(requests, matchers, strict=True):
            matcher.consume_token(request.tokens[-1])
            if matcher.is_stopped():
                ended[request] = _failure(matcher)
        going = [pair for pair in zip(requests, matchers, strict=True) if pair[0] not in ended]
        if not going:
            return ended
        masks = self._grammars.allowed([matcher for _, matcher in going])
        for (request, matcher), mask in zip(going, masks, strict=True):
            if matcher.is_error() or not mask.any():
                ended[request] = _failure(matcher) or "no token of this model can follow"
            else:
                request.mask = mask.tobytes()
        return ended

    def drop(self, request_id: int) -> None:
        self._matchers.pop(request_id, None)


def _grammar(wanted: StructuredOutputsParams) -> str:
    """What llguidance reads. ValueError when it is not even that."""
    matcher = llguidance.LLMatcher
    if wanted.regex is not None:
        return matcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return matcher.grammar_from_regex("|".join(map(re.escape, wanted.choice)))
    if wanted.grammar is not None:
        if _GBNF.search(wanted.grammar):
            return llguidance.grammar_from("gbnf", wanted.grammar)
        return matcher.grammar_from_lark(wanted.grammar)
    schema: Any = wanted.json if wanted.json is not None else '{"type":"object"}'
    return matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _GAP})


def _failure(matcher: llguidance.LLMatcher) -> str | None:
    if not matcher.is_error():
        return None
    return f"the answer cannot follow its grammar further: {_reason(matcher.get_error())}"


def _refusal(wanted: StructuredOutputsParams, error: str) -> RequestError:
    return RequestError(f"{wanted.param} cannot be followed: {_reason(error)}", wanted.param)


def _reason(error: str) -> str:
    """What llguidance says, without its insides."""
    if error.startswith("panic"):
        return "it is too large, or too complex"
    line = " ".join(error.partition("<")[0].split()) if "<non-verbose/>" in error else error
    if line == "NoExtensionBias":
        return "nothing can be said that follows it"
    return " ".join(line.split())[:_SHOWN]
