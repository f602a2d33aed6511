"""Adapters of a server: named as models, listed, loaded and unloaded by operators."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from adapters import save_adapter, stories_adapters
from served import MODEL, Served, serving, stories_engine
from typer.testing import CliRunner

from headrace.cluster.cli.client import app
from headrace.cluster.client.answers import AdapterInfo
from headrace.cluster.client.client import Client
from headrace.cluster.serving.keys import add_key
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.cluster.serving.rpc.inference_pb2_grpc import InferenceStub
from headrace.runtime.adapters.directory import open_adapter

PROMPT: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return stories_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(stories: Path, named: dict[str, Path]) -> Iterator[Served]:
    given = [f"adapter-0={named['adapter-0']}"]
    with (
        stories_engine(stories, adapter=given, adapter_slots=1, adapter_rank=8) as engine,
        serving(engine, grpc_port=0) as made,
    ):
        yield made


def complete(server: Served, **more: Any) -> tuple[int, Any]:
    status, body, _ = server.ask("POST", "/v1/completions", PROMPT | more)
    return status, body


def text(server: Served, **more: Any) -> str:
    status, body = complete(server, **more)
    assert status == 200, body
    return str(body["choices"][0]["text"])


def load(server: Served, name: str, path: Path, headers: Any = None) -> tuple[int, Any]:
    asked = {"lora_name": name, "lora_path": str(path)}
    status, body, _ = server.ask("POST", "/v1/load_lora_adapter", asked, headers)
    return status, body


def models(server: Served) -> list[str]:
    return [each["id"] for each in server.ask("GET", "/v1/models")[1]["data"]]


def test_a_model_by_name_is_the_adapter(server: Served) -> None:
    base, adapted = text(server), text(server, model="adapter-0")
    assert base != adapted
    assert text(server, model=MODEL) == base
    assert text(server, adapter="adapter-0") == adapted
    status, body = complete(server, model="adapter-0")
    assert (status, body["model"]) == (200, "adapter-0")
    assert models(server) == [MODEL, "adapter-0"]
    listed = server.ask("GET", "/v1/models/adapter-0")[1]
    assert (listed["id"], listed["parent"]) == ("adapter-0", MODEL)
    status, body = complete(server, model="adapter-9")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert f"this server has '{MODEL}', 'adapter-0'" in body["error"]["message"]
    status, body = complete(server, adapter="adapter-9")
    assert (status, body["error"]["param"]) == (400, "adapter")


def test_grpc_has_a_field_for_it(server: Served) -> None:
    def said(**more: Any) -> str:
        asked = pb.GenerateRequest(text="Once upon a time", temperature=0, max_tokens=8, **more)
        return "".join(answer.piece.text for answer in stub.Generate(asked))

    assert server.grpc is not None
    with grpc.insecure_channel(server.grpc) as channel:
        stub = InferenceStub(channel)
        assert said() == text(server)
        assert (
            said(adapter="adapter-0") == said(model="adapter-0") == text(server, model="adapter-0")
        )
        with pytest.raises(grpc.RpcError, match="there is no adapter 'x' here"):
            said(adapter="x")


def test_clients_over_grpc_see_which_there_are(server: Served, named: dict[str, Path]) -> None:
    digest = open_adapter(named["adapter-0"]).adapter.digest
    with Client(str(server.grpc)) as client:
        assert client.model_info().adapters == (AdapterInfo("adapter-0", MODEL, digest),)
    shown = CliRunner().invoke(app, ["info", "--address", str(server.grpc)])
    assert f"adapters           adapter-0 (of {MODEL})" in shown.output
    asked = ["generate", PROMPT["prompt"], "--address", str(server.grpc), "--max-tokens", "8"]
    said = CliRunner().invoke(app, [*asked, "--temperature", "0", "--adapter", "adapter-0"])
    assert said.output == text(server, model="adapter-0") + "\n"


def test_adapters_come_and_go_while_the_server_runs(
    server: Served, named: dict[str, Path], tmp_path: Path
) -> None:
    path = named["adapter-1"]
    status, body = load(server, "later", path)
    assert (status, body) == (200, "Success: LoRA adapter 'later' added successfully.")
    assert models(server) == [MODEL, "adapter-0", "later"]
    both = {text(server, model="later"), text(server, model="adapter-0"), text(server)}
    assert len(both) == 3  # through one slot
    for name, where, told in (
        ("later", path, "there is an adapter 'later' already: unload it first"),
        (MODEL, path, "give the adapter another name"),
        ("other", tmp_path / "nowhere", "is no directory"),
        ("other", tmp_path, "has no adapter_config.json"),
    ):
        status, body = load(server, name, where)
        assert (status, body["error"]["code"]) == (400, "adapter_not_loaded")
        assert told in body["error"]["message"]
    gone = {"lora_name": "later"}
    assert server.ask("POST", "/v1/unload_lora_adapter", gone)[0] == 200
    assert models(server) == [MODEL, "adapter-0"]
    assert complete(server, model="later")[0] == 404
    assert server.ask("POST", "/v1/unload_lora_adapter", gone)[0] == 404


def test_what_is_said_of_adapters_that_cannot_be_had(
    stories: Path, named: dict[str, Path], tmp_path: Path
) -> None:
    """Of another model, with too large a rank, changed or gone since it was named; others' requests go on."""
    room = {"adapter_slots": 1, "adapter_rank": 4, "adapter_host_memory": 0}
    copy = shutil.copytree(named["adapter-0"], tmp_path / "copy")
    with stories_engine(stories, **room) as engine, serving(engine) as server:

        def refusal(path: Path) -> str:
            status, body = load(server, "wrong", path)
            assert (status, body["error"]["code"]) == (400, "adapter_not_loaded")
            return str(body["error"]["message"])

        assert "was made for another model" in refusal(save_adapter("llama", tmp_path / "a"))
        assert "has rank 5 in model.layers.0" in refusal(named["adapter-1"])
        status, body = complete(server, adapter="wrong")
        assert (status, body["error"]["param"]) == (400, "adapter")
        assert body["error"]["message"] == "there is no adapter 'wrong' here; none is loaded"
        assert load(server, "named", copy)[0] == 200
        (copy / "adapter_config.json").write_text((copy / "adapter_config.json").read_text() + " ")
        status, body = complete(server, model="named")
        assert (status, "have changed since it was named" in body["error"]["message"]) == (
            400,
            True,
        )
        shutil.rmtree(copy)
        status, body = complete(server, model="named")
        assert (status, "is no directory" in body["error"]["message"]) == (400, True)
        assert text(server)
        assert server.metric('headrace_adapter_loads_total{result="failed"}') == 2


def test_metrics_and_the_ring_tell_of_adapters(server: Served) -> None:
    def count(name: str) -> float:
        return server.metric(f"headrace_adapter_{name}")

    text(server, model="adapter-0")
    before = {
        name: count(name)
        for name in ("hits_total", 'tokens_total{adapter="adapter-0",kind="output"}')
    }
    text(server, model="adapter-0")
    assert [count(name) - past for name, past in before.items()] == [1, 8]
    assert count('sequences_total{adapter="adapter-0"}') >= 2
    assert count("misses_total") >= 1 and count('loads_total{result="loaded"}') >= 1
    assert count('slots{state="cached"}') == 1
    ring = server.ask("GET", "/ring")[1]["adapters"]
    assert ring == {"slots": {"free": 0, "used": 0, "cached": 1, "coming": 0}, "waiting": 0}


def test_only_operators_load_adapters(
    stories: Path, named: dict[str, Path], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    user, operator = add_key(keys, "user", None), add_key(keys, "operator", None, operator=True)
    with stories_engine(stories) as engine, serving(engine, api_keys=keys) as server:
        path = named["adapter-1"]
        status, body = load(server, "a", path, {"Authorization": f"Bearer {user}"})
        assert (status, body["error"]["code"]) == (403, "not_operator")
        status, body = load(server, "a", path, {"Authorization": f"Bearer {operator}"})
        assert status == 400
        assert "--adapter-slots" in body["error"]["message"]
