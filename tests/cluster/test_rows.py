import json
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest

from headrace.cluster import answers
from headrace.cluster.completion import Completion
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.id_set import IdSet
from headrace.cluster.inputs import open_input
from headrace.cluster.rows import Kind, Row, decode, is_batch, prepare
from headrace.scheduler.errors import JobError, RequestError
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams
from headrace.scheduler.structured import StructuredOutputsParams

DEFAULTS = SamplingParams(max_tokens=5, temperature=0.5, seed=9)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if not messages %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if shout %}loud{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Any]:
    """A real one, of whole words, that adds a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "a", "b", "user", "assistant", "hello", "loud", "robot"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", model_max_length=10**9
    )
    tokenizer.chat_template = TEMPLATE
    yield tokenizer


def read(tokenizer: Any, data: dict[str, Any] | bytes, max_context: int = 100) -> Row:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return prepare(decode(7, raw, b"salt"), Encoder(tokenizer), DEFAULTS, max_context)


def batch(url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": "x", "method": "POST", "url": url, "body": body}


def test_a_native_prompt(tokenizer: Any) -> None:
    row = read(tokenizer, {"id": "r", "prompt": "a b", "max_tokens": 3, "stop": "b", "top_k": None})
    assert (row.id, row.kind, row.token_ids) == ("r", Kind.NATIVE, [1, 2, 3])
    assert row.params == SamplingParams(max_tokens=3, temperature=0.5, stop=("b",))


def test_what_an_answer_is_bound_to(tokenizer: Any) -> None:
    row = read(
        tokenizer, {"prompt": "a", "logit_bias": {"3": -100}, "structured_outputs": {"regex": "b"}}
    )
    assert row.params.biases == ((3, -100.0),)
    assert row.params.structured_outputs == StructuredOutputsParams(regex="b")
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": False}}
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
    assert read(tokenizer, batch("/v1/chat/completions", body)).params.structured_outputs == (
        StructuredOutputsParams(
            json='{"type":"object","properties":{"b":{"type":"null"},"a":{"type":"null"}}}'
        )
    )
    form = {"type": "json_object"}
    found = read(tokenizer, {"prompt": "a", "response_format": form}).params.structured_outputs
    assert found == StructuredOutputsParams(json_object=True)
    with pytest.raises(RequestError, match="either response_format or structured_outputs"):
        read(
            tokenizer,
            {"prompt": "a", "response_format": form, "structured_outputs": {"regex": "b"}},
        )
    with pytest.raises(RequestError, match="between -100 and 100"):
        read(tokenizer, {"prompt": "a", "logit_bias": {"3": 1000}})


def test_an_effort_is_for_templates_that_know_it(tokenizer: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "high"}
    row = batch("/v1/chat/completions", body)
    with pytest.raises(RequestError, match="knows no reasoning_effort"):
        read(tokenizer, row)
    knows = copy(tokenizer)
    knows.chat_template = TEMPLATE + "{% if reasoning_effort == 'high' %}loud{% endif %}"
    plain = batch("/v1/chat/completions", {**body, "reasoning_effort": None})
    assert read(knows, row).token_ids == [*read(knows, plain).token_ids, 7]


WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if 0 %}<tool_call>{% endif %}"
)


def test_rows_with_tools(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "hello"}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    with pytest.raises(RequestError, match="no place for tools"):
        read(tokenizer, body)
    with pytest.raises(RequestError, match='tools need "messages"'):
        read(tokenizer, {"prompt": "a", "tools": tools})
    tokenizer.chat_template = WITH_TOOLS
    try:
        native = read(tokenizer, body)
        bound = read(tokenizer, batch("/v1/chat/completions", body | {"tool_choice": "required"}))
        none = read(tokenizer, body | {"tool_choice": "none"})
    finally:
        tokenizer.chat_template = TEMPLATE
    assert (native.token_ids, none.token_ids) == ([6, 2], [2])
    assert (native.params.structured_outputs, none.tools) == (None, None)
    form = bound.params.structured_outputs
    assert form is not None and form.grammar is not None and "hello" in form.grammar
    text = 'Hi <tool_call>{"name": "hello", "arguments": {}}</tool_call>'
    done = Completion(0, [2, 3], text, "stop", None, 2)
    answer = answers.answer(native, [done], tokenizer, "m", 0)
    assert (answer["text"], answer["finish_reason"]) == ("Hi", "tool_calls")
    assert answer == answers.answer(native, [done], tokenizer, "m", 1)
    [choice] = answers.answer(bound, [done], tokenizer, "m", 0)["response"]["body"]["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "hello", "arguments": "{}"}
    assert answer["tool_calls"][0]["id"].startswith("call_")


def test_a_row_without_an_id_is_named_by_its_number(tokenizer: Any) -> None:
    assert read(tokenizer, {"prompt": "a"}).id == 7
    assert read(tokenizer, {"id": None, "prompt": "a"}).id == 7
    assert read(tokenizer, {"id": 0, "prompt": "a"}).id == 0


def test_bos_is_not_doubled(tokenizer: Any) -> None:
    assert read(tokenizer, {"prompt": "<s> a"}).token_ids == [1, 2]
    chat = read(tokenizer, {"messages": [{"role": "user", "content": "hello"}]})
    assert chat.token_ids == [1, 4, 6, 5]


def test_tokens_are_taken_as_they_are(tokenizer: Any) -> None:
    assert read(tokenizer, {"prompt": [2, 2, 3]}).token_ids == [2, 2, 3]


def test_text_parts_and_template_variables(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "chat_template_kwargs": {"shout": 1}}
    assert read(tokenizer, body).token_ids == [1, 4, 2, 3, 5, 7]


def test_batch_rows(tokenizer: Any) -> None:
    text = read(tokenizer, batch("/v1/completions", {"model": "m", "prompt": "a", "logprobs": 2}))
    assert (text.id, text.kind, text.params.logprobs) == ("x", Kind.COMPLETION, 2)
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 5,
    }
    chat = read(tokenizer, batch("/v1/chat/completions", body))
    assert (chat.kind, chat.batch) == (Kind.CHAT, True)
    assert chat.params == SamplingParams(max_tokens=4, temperature=0.5, logprobs=3, seed=5)


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        ({"id": True, "prompt": "a"}, "id must be a string or an integer, not True"),
        ({"id": [1], "prompt": "a"}, "id must be a string or an integer"),
        ({"id": "r"}, 'give either "prompt" or "messages"'),
        ({"prompt": "a", "messages": [MESSAGE]}, 'give either "prompt" or "messages"'),
        ({"prompt": "a", "temprature": 1}, "unknown parameter 'temprature'"),
        ({"prompt": "a", "temperature": -1}, "temperature must be between 0 and 100, not -1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature: "),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens: "),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": "a", "top_k": 2**70}, "top_k: "),
        ({"prompt": "a", "seed": 2**70}, "seed: "),
        ({"prompt": "a", "top_logprobs": 2}, "top_logprobs needs"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [9]}, "token 9 is outside the vocabulary of 9 tokens"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a " * 99}, "the prompt has 100 tokens and the context 100"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "refused the messages: no robots"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"custom_id": 3, "body": {}}, "custom_id must be a string, not 3"),
        ({"body": {}}, "custom_id must be a string, not None"),
        ({"custom_id": "x", "method": "POST", "url": "/v1/completions"}, "body: Field required"),
        (batch("/v1/embeddings", {}), "url: "),
        (batch("/v1/completions", {"prompt": "a", "best_of": 2}), "best_of must be n, 1"),
        (batch("/v1/completions", {"prompt": "a", "stream": True}), "stream: "),
        (batch("/v1/chat/completions", {"messages": [MESSAGE], "tools": []}), "tools: "),
    ],
)
def test_what_is_wrong_is_said(tokenizer: Any, data: Any, reason: str | None) -> None:
    if reason is None:
        assert read(tokenizer, data).token_ids == [1]
        return
    with pytest.raises(RequestError) as caught:
        read(tokenizer, data)
    assert reason in str(caught.value)


def test_messages_need_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    try:
        with pytest.raises(RequestError, match="no chat template"):
            read(tokenizer, {"messages": [MESSAGE]})
    finally:
        tokenizer.chat_template = TEMPLATE


def test_the_key_covers_model_id_prompt_and_parameters() -> None:
    rows = [b'{"prompt": "a"}', b'{"prompt": "b"}', b'{"prompt": "a", "top_k": 1}']
    keys = {decode(1, row, salt).key for row in rows for salt in (b"model", b"other")}
    assert len(keys) == 6
    assert decode(1, rows[0], b"model").key != decode(2, rows[0], b"model").key


def test_id_set() -> None:
    ids = IdSet()
    assert all(ids.add(f"row-{i}") for i in range(5000))
    assert not any(ids.add(f"row-{i}") for i in range(5000))
    assert ids.add(7)
    assert not ids.add("7")


def test_jsonl_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n  \n{"b": 2}')
    source = open_input(path)
    assert source.total == 2
    assert list(source) == list(source) == [(1, b'{"a": 1}'), (4, b'{"b": 2}')]
    digest = source.digest
    path.write_bytes(b'{"a": 1}')
    assert open_input(path).digest != digest


def test_parquet_rows(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"id": "p", "prompt": "a", "messages": None, "max_tokens": 3},
        {"id": "m", "prompt": None, "messages": [MESSAGE], "max_tokens": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    source = open_input(tmp_path / "in.parquet")
    assert source.total == 2
    encoder = Encoder(tokenizer)
    read_rows = [prepare(decode(*pair, b""), encoder, DEFAULTS, 100) for pair in source]
    assert [(row.id, row.token_ids, row.params.max_tokens) for row in read_rows] == [
        ("p", [1, 2], 3),
        ("m", [1, 4, 2, 5], 5),
    ]


def test_parquet_files_that_cannot_be_jobs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "in.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(JobError, match="not a readable Parquet file"):
        open_input(path)
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "label": 1}]), path)
    with pytest.raises(JobError, match="columns that mean nothing here: label"):
        open_input(path)


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"cannot read --input .*: No such file"):
        open_input(tmp_path / "in.jsonl")
    with pytest.raises(JobError, match="not a regular file"):
        open_input(tmp_path)


def done(text: str, logprobs: list[Sample] | None = None) -> Completion:
    return Completion(0, [2, 3], text, "stop", logprobs, 4)


USAGE = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
SAMPLES = [Sample(0, 2, -0.5, ((2, -0.5), (3, -1.0))), Sample(0, 3, -0.25, ())]


def row_of(kind: Kind) -> Row:
    return Row(7, "x", 0xAB, kind, [1], DEFAULTS)


def test_native_answers(tokenizer: Any) -> None:
    one = answers.answer(row_of(Kind.NATIVE), [done("t")], tokenizer, "m", 5)
    assert one == {"id": "x", "text": "t", "finish_reason": "stop", "usage": USAGE}
    two = answers.answer(row_of(Kind.NATIVE), [done("t"), done("u")], tokenizer, "m", 5)
    assert [(c["index"], c["text"]) for c in two["choices"]] == [(0, "t"), (1, "u")]
    assert two["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_batch_answers(tokenizer: Any) -> None:
    chat = answers.answer(row_of(Kind.CHAT), [done("t", SAMPLES)], tokenizer, "m", 5)
    assert (chat["custom_id"], chat["error"]) == ("x", None)
    assert chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "m", 5)
    assert body["usage"] == USAGE
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "t"}
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert [top["token"] for top in first["top_logprobs"]] == ["a", "b"]

    text = answers.answer(row_of(Kind.COMPLETION), [done("t", SAMPLES)], tokenizer, "m", 5)
    body = text["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "t"
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", " b"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"a": -0.5, "b": -1.0}, {}],
        "text_offset": [0, 1],
    }


def test_refusals() -> None:
    assert answers.refusal(3, "x", False, "why") == {"id": "x", "line": 3, "error": "why"}
    row = answers.refusal(3, None, True, "why")
    assert (row["custom_id"], row["response"], row["error"]["line"]) == (None, None, 3)
    assert is_batch(b'{"custom_id": ')
    assert json.loads(answers.encode({"id": "\ud800é"})) == {"id": "\ud800é"}
