"""Answers follow their grammars, whatever stages and pages do, and everybody else goes on as before."""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from local_engines import engine_of

from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.cluster.grammars import Followed, Grammars
from headrace.scheduler.errors import RequestError
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import Request, SamplingParams
from headrace.scheduler.structured import MAX_GRAMMAR, StructuredOutputsParams

STORY = "The old man had a boat and a dog. One day, there was a big storm and Tom said: "
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["dog", "cat"]}, "maxItems": 1},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
FORMS = [
    StructuredOutputsParams(json=PERSON),
    None,
    StructuredOutputsParams(regex="[A-Z][a-z]{2,8}, [0-9]{3}"),
    StructuredOutputsParams(choice=["a big (red) dog", "a cat"]),
    StructuredOutputsParams(grammar='start: "very "{0,3} "so"'),
    StructuredOutputsParams(grammar='root ::= ("the " | "a ") "end"'),
]
RINGS: list[Any] = [
    {"stages": 1, "tier": Tier.DEVICE, "num_pages": 6, "token_budget": 80, "ahead": 1},
    {"stages": 2, "tier": Tier.DEVICE, "passes_in_flight": 2, "token_budget": 40, "ahead": 1},
    pytest.param(
        {"stages": 2, "tier": Tier.NVME, "cyclic": True, "num_pages": 6}, marks=pytest.mark.slow
    ),
]


def serve(engine: Engine) -> Mapping[int, Completion]:
    story = engine.tokenizer(4 * STORY)["input_ids"]
    for i in range(2 * len(FORMS)):
        params = SamplingParams(
            max_tokens=24 if FORMS[i // 2] is None else 80,
            temperature=0.9 * (i % 2),
            structured_outputs=FORMS[i // 2],
            logprobs=1 if i % 3 else None,
        )
        engine.add(story[: 56 + i // 2], params, seed=i)  # most need a second page soon
    done: dict[int, Completion] = {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[Engine]:
    with engine_of(stories, {"stages": 1, "tier": Tier.DEVICE}) as made:
        yield made


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Mapping[int, Completion]:
    return serve(engine)


def test_answers_are_what_was_asked_for(alone: Mapping[int, Completion]) -> None:
    for i, form in enumerate(FORMS):
        for done in (alone[2 * i], alone[2 * i + 1]):
            assert done.finish_reason == ("length" if form is None else "stop"), done
            if form is None:
                continue
            if form.json is not None:
                jsonschema.validate(json.loads(done.text), PERSON)
            pattern = form.regex or "(very ){0,3}so|(the|a) end|a big \\(red\\) dog|a cat"
            assert form.json is not None or re.fullmatch(pattern, done.text), done.text


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_stages_pages_and_passes_ahead_change_nothing(
    ring: dict[str, Any], alone: Mapping[int, Completion], stories: Path
) -> None:
    with engine_of(stories, ring) as engine:
        found = serve(engine)
        assert (engine._scheduler.num_preemptions > 0) == ("num_pages" in ring)
    assert {i: (done.text, done.token_ids) for i, done in found.items()} == {
        i: (done.text, done.token_ids) for i, done in alone.items()
    }


def one(engine: Engine, **given: Any) -> Completion:
    engine.add(engine.tokenizer(STORY)["input_ids"], SamplingParams(**given), seed=1)
    while not (done := engine.step()):
        pass
    while engine.has_work:
        engine.step()
    return done[0]


def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    form = StructuredOutputsParams(json=PERSON)
    done = one(engine, max_tokens=4, structured_outputs=form)
    assert (done.finish_reason, len(done.token_ids)) == ("length", 4)


def test_a_complete_answer_ends_though_the_model_may_not_end_it(engine: Engine) -> None:
    form = StructuredOutputsParams(regex="a|ab|ab{50}")
    bias = {engine.tokenizer.eos_token_id: -100.0}
    done = one(engine, max_tokens=90, structured_outputs=form, ignore_eos=True, logit_bias=bias)
    assert (done.text, done.finish_reason) == ("a" + 50 * "b", "stop")
    ends = one(engine, temperature=0.0, structured_outputs=form, logit_bias={0: 100.0})
    assert (ends.text, ends.finish_reason) in (("a", "stop"), ("ab", "stop"))
    assert ends.token_ids[-1] == engine.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"json": {"not": {"type": "string"}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": '{"type"'}, "EOF"),
        ({"json": {"$ref": "https://example.org/schema"}}, "example.org"),
        ({"json": {"$ref": "#"}}, "nothing can be said"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": 4000 * "(" + 4000 * ")"}, "invalid regex"),
        ({"grammar": "start: unknown"}, "unknown"),
        ({"grammar": "root ::= <"}, "GBNF"),
        ({"grammar": "start: " + 30_000 * "(" + '"a"' + 30_000 * ")"}, "deeply nested"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_followed_is_refused(
    engine: Engine, form: dict[str, Any], reason: str
) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    with pytest.raises(RequestError, match=reason) as caught:
        engine.check([5], params)
    assert (caught.value.param, len(str(caught.value)) < 400) == ("structured_outputs", True)
    with pytest.raises(RequestError, match=reason):
        engine.add([5], params, seed=0)
    assert not engine.has_work


@pytest.mark.parametrize(
    "form",
    [{}, {"regex": "a", "json_object": True}, {"choice": []}, {"choice": [""]},
     {"regex": "a" * (MAX_GRAMMAR + 1)}, {"json": {"const": {1, 2}}}],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_forms_that_are_none(form: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="structured_outputs"):
        StructuredOutputsParams(**form)


@pytest.mark.parametrize("bias", [{5: 101}, {-1: 1}, {"a": 1}, {5: float("nan")}, {4096: 1}, 5])
def test_biases_that_are_none(engine: Engine, bias: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        engine.check([5], SamplingParams(logit_bias=bias))


@pytest.mark.parametrize("kind", ["rules", "definitions"])
def test_long_chains_of_rules_do_not_end_the_process(kind: str, tokenizer: Any) -> None:
    if kind == "rules":
        rules = "".join(f'r{i}: "a" | r{i + 1}\n' for i in range(3300))
        form = StructuredOutputsParams(grammar=f'start: r0\n{rules}r3300: "b"')
    else:
        given = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1000)}
        form = StructuredOutputsParams(json={"$defs": given | {"a1000": {}}, "$ref": "#/$defs/a0"})
    followed = Followed(Grammars(tokenizer, [0]))
    request = Request(0, [5], SamplingParams(), seed=0)
    followed.start(request, form)
    request.tokens += tokenizer("b" if kind == "rules" else "{")["input_ids"]
    followed.advance([request])


def test_who_can_no_longer_follow_ends_alone(tokenizer: Any) -> None:
    followed = Followed(Grammars(tokenizer, [0]))
    form = StructuredOutputsParams(regex="[a-z ]+")
    good, bad = (Request(i, [5], SamplingParams(), seed=0) for i in range(2))
    for request, text in ((good, "a"), (bad, "A")):
        followed.start(request, form)
        request.tokens += tokenizer(text)["input_ids"]
    first = good.mask
    assert {**followed.advance([good, bad])}.keys() == {bad}
    assert good.mask != first  # it may end now
    followed.drop(bad.request_id)
    good.tokens += tokenizer("b")["input_ids"]
    assert followed.advance([good]) == {}


def test_each_grammar_is_compiled_once_whoever_asks(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, [0])
    forms = [StructuredOutputsParams(regex=f"a{{{i % 3}}}b") for i in range(30)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(grammars.compiled, forms))
    assert len({id(grammar) for grammar in made}) == 3


def test_tokens_without_a_logit_are_not_allowed(tokenizer: Any) -> None:
    words = tokenizer("yes no")["input_ids"]
    grammars = Grammars(tokenizer, [0], vocabulary=min(words))
    form = StructuredOutputsParams(grammar=f"start: <[{max(words)}]>")
    with pytest.raises(RequestError, match="no answer of this model"):
        grammars.compiled(form)
