"""Ray Serve and Ray Data in front of rings: the examples as users run them, and what goes wrong on a cluster."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import ray
from commands import python, wait_for
from ray import serve
from served import serving, stories_engine

from headrace import LLM, SamplingParams
from headrace.cluster.serving.addresses import bind
from headrace.scheduler.errors import HeadraceError

EXAMPLES = Path(__file__).parents[2] / "examples"
RING = {"stages": 2, "device": "cpu", "device_memory": "8MiB", "host_memory": 0, "context": 256}
LONG = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}


def free_port() -> int:
    with bind("127.0.0.1", 0) as taken:
        return int(taken.getsockname()[1])


@pytest.mark.timeout(300)
def test_the_example_of_ray_serve_streams_what_the_server_answers(
    stories: Path, tmp_path: Path
) -> None:
    with stories_engine(stories, context=128) as engine, serving(engine) as plain:
        asked = {"prompt": "Once upon a time", "max_tokens": 60, "seed": 1}
        want = plain.ask("POST", "/v1/completions", asked)[1]["choices"][0]["text"]
    example = EXAMPLES / "ray_serve.py", stories, "--port", free_port()
    # Ray would join the cluster of another test that it finds on this machine.
    with python(tmp_path, *example, RAY_ADDRESS="local") as command:
        assert command.wait(240.0) == 0, command.stderr
        assert want in command.stdout
        wait_for(lambda: not command.processes(), 60.0, lambda: str(command.processes()))


@pytest.mark.timeout(300)
def test_the_example_of_ray_data_answers_as_the_server(stories: Path, tmp_path: Path) -> None:
    with stories_engine(stories, context=128) as engine, serving(engine) as plain:
        wanted = []
        for line in (EXAMPLES / "prompts.jsonl").read_text().splitlines()[:8]:
            row = json.loads(line)
            asked = {"messages": row["messages"], "max_tokens": 30, "seed": 1}
            answer = plain.ask("POST", "/v1/chat/completions", asked)[1]["choices"][0]
            wanted.append(f"[{row['id']}] {answer['message']['content']!r}")
    with python(tmp_path, EXAMPLES / "ray_data.py", stories) as command:
        assert command.wait(240.0) == 0, command.stderr
        assert sorted(l for l in command.stdout.splitlines() if l.startswith("[s")) == wanted
        wait_for(lambda: not command.processes(), 60.0, lambda: str(command.processes()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Room for two rings of two stages and for Ray Data's tasks."""
    ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def processes(title: str) -> list[psutil.Process]:
    """Of this process's cluster, by the name that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def stages() -> list[psutil.Process]:
    """Before and after their first pass."""
    return processes("ray::StageActor") + processes("ray::stage ")


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


@pytest.fixture
def client(cluster: None, stories: Path, request: Any) -> Iterator[openai.OpenAI]:
    """Of an application with the arguments of the test's parameter."""
    from headrace.cluster.serving.ray_serve import build_app

    port = free_port()
    serve.start(http_options={"port": port})
    try:
        args = {"store": stories, "model_name": "stories", **RING, **request.param}
        serve.run(build_app(args), name="stories")
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as made:
            yield made
    finally:
        serve.shutdown()
    wait_for(lambda: free_cpus() == 5.0, 60.0, lambda: str(ray.available_resources()))


def sequences(client: openai.OpenAI) -> dict[str, Any]:
    path = str(client.base_url).removesuffix("/v1/")
    return dict(
        client.with_options(base_url=path).get("/ring", cast_to=dict[str, Any])["sequences"]
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("client", [{"max_waiting": 1}], indirect=True)
def test_a_client_that_leaves_and_a_ring_that_is_full(client: openai.OpenAI) -> None:
    streams = []
    for _ in range(2):  # as many as the ring has room for
        stream = client.completions.create(model="stories", prompt="Once", stream=True, **LONG)
        assert next(iter(stream)).choices[0].text
        streams.append(stream)
    waiting = client.completions.create(model="stories", prompt="Once", stream=True, **LONG)
    # Ours, not Ray Serve's: it says when to come back.
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="stories", prompt="Once", **LONG)
    assert caught.value.response.headers["Retry-After"]
    for stream in (*streams, waiting):
        stream.close()
    wait_for(
        lambda: sequences(client)["interactive"] == {"running": 0, "waiting": 0},
        30.0,
        lambda: str(sequences(client)),
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("client", [{"num_replicas": 2}], indirect=True)
def test_a_replica_whose_ring_fails_is_replaced(client: openai.OpenAI) -> None:
    asked = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 12, "seed": 3}
    want = client.completions.create(**asked).choices[0].text
    old = stages()
    assert len(old) == 4
    for stage in old:
        stage.kill()

    def answers() -> bool:
        try:
            return client.completions.create(**asked).choices[0].text == want
        except openai.APIStatusError:
            return False

    def are_replaced() -> bool:
        return len({*stages()} - {*old}) == 4

    # Each has to be asked once to find out.
    wait_for(lambda: answers() and are_replaced(), 240.0, lambda: str(serve.status()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_serve_run_takes_arguments(cluster: None, stories: Path, tmp_path: Path) -> None:
    """As Ray's command line splits them, all of them text."""
    path = "headrace.cluster.serving.ray_serve:build_app"
    args = [f"{name}={value}" for name, value in {"store": stories, **RING}.items()]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": address}
    with (tmp_path / "log").open("wb") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", path, *args],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        said = tmp_path / "log"
        wait_for(lambda: "is ready" in said.read_text(), 240.0, lambda: said.read_text())
    finally:
        command.send_signal(signal.SIGINT)
        command.wait(60.0)
    wait_for(lambda: free_cpus() == 5.0, 60.0, lambda: str(ray.available_resources()))


def test_arguments_that_mean_nothing(stories: Path) -> None:
    from headrace.cluster.serving.ray_serve import build_app

    for args, told in (
        ({"stagse": 2}, "no option stagse"),
        ({"stages": "two"}, "stages: "),
        ({"device_memory": "8 apples"}, "8 apples"),
        ({"address": "auto"}, "leave it out"),
    ):
        with pytest.raises(HeadraceError, match=told):
            build_app({"store": stories, **args})


def processor(store: Path, **options: Any) -> Any:
    from headrace.cluster.ray_data import HeadraceProcessorConfig, build_processor

    ray.data.DataContext.get_current().enable_progress_bars = False
    config = HeadraceProcessorConfig(
        model_source=str(store), engine_kwargs=RING, batch_size=4, **options
    )
    return build_processor(
        config, postprocess=lambda row: {**row, "length": row["num_generated_tokens"]}
    )


def rows(count: int, **params: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "prompt": f"The {i}. story is about",
            "sampling_params": {"seed": i, "max_tokens": 20 + i} | params,
        }
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_are_those_of_llm_generate_and_a_bad_one_keeps_none(
    cluster: None, stories: Path
) -> None:
    given = rows(12)
    given[5]["sampling_params"]["max_tokens"] = -3
    made = processor(stories, should_continue_on_error=True)
    found = sorted(made(ray.data.from_items(given)).take_all(), key=lambda row: row["id"])
    assert "max_tokens must be at least 1" in found[5]["__inference_error__"]
    assert found[5]["generated_text"] == ""
    good = [row for row in found if row["id"] != 5]
    wait_for(lambda: free_cpus() == 5.0, 60.0, lambda: str(ray.available_resources()))
    with LLM(stories, **RING) as llm:
        params = [SamplingParams(**given[row["id"]]["sampling_params"]) for row in good]
        want = llm.generate([row["prompt"] for row in good], params)
    for row, one in zip(good, want, strict=True):
        assert row["__inference_error__"] == ""
        assert row["generated_text"] == one.outputs[0].text
        assert list(row["generated_tokens"]) == one.outputs[0].token_ids
        assert row["num_input_tokens"] == len(one.prompt_token_ids)
        assert row["length"] == len(one.outputs[0].token_ids)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("title", ["ray::stage 1", "RingUDF"])
def test_rows_outlive_a_ring(cluster: None, stories: Path, title: str) -> None:
    """Whether a stage dies or the process that drives them."""
    data = ray.data.from_items(rows(60, ignore_eos=True), override_num_blocks=15)
    found = []
    for row in processor(stories)(data).iter_rows():
        if not found:
            for process in processes(title):
                process.kill()
        found.append(row["id"])
    assert sorted(found) == list(range(60))
    wait_for(lambda: free_cpus() == 5.0, 120.0, lambda: str(ray.available_resources()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bad_row_ends_a_dataset_that_was_not_told_to_go_on(cluster: None, stories: Path) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="max_tokens must be"):
        processor(stories)(ray.data.from_items(rows(4, max_tokens=-3))).take_all()
