"""Rings whose stages fetch their layers from a cold tier: the same tokens, and each node has its own layers."""

import shutil
from pathlib import Path

import pytest
import ray
from ray_engines import ray_engine
from rings import local_ring, manual_plan

from headrace.cluster.bench.local import local_engine
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.llm import LLM
from headrace.cluster.peers import StorePeer
from headrace.runtime.cold.pull import pull
from headrace.runtime.cold.push import push
from headrace.runtime.cold.source import ColdModel
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError
from headrace.scheduler.request import SamplingParams

PROMPT = [1, 403, 407, 261, 378, 390, 311]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> ColdModel:
    model = ColdModel((tmp_path_factory.mktemp("cold") / "tier").as_uri(), "stories")
    push(stories, model)
    return model


@pytest.fixture(scope="module")
def expected(tier: ColdModel, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What the model answers from a store that was pushed, deleted and pulled; and before."""
    path = tmp_path_factory.mktemp("back") / "stories"
    shutil.copytree(stories, path)
    answers = []
    for _ in range(2):
        with local_engine(EngineOptions(path, device="cpu")) as engine:
            answers.append(answer_of(engine))
        shutil.rmtree(path)
        pull(tier, path)
    assert answers[0] == answers[1]
    return answers[0]


def answer_of(engine: Engine) -> list[int]:
    engine.add(PROMPT, GREEDY, seed=0)
    done = []
    while engine.has_work:
        done += engine.step()
    return list(done[0].token_ids)


def blocks_in(path: Path) -> list[str]:
    return [block.name for block in Store.open(path).present]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_from_an_empty_directory(tier: ColdModel, expected: list[int], tmp_path: Path) -> None:
    path = tmp_path / "node" / "stories"
    with LLM(path, device="cpu", stages=2, cold=tier.url) as llm:
        assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == expected
    assert len(blocks_in(path)) == 14


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_stages_with_stores_of_their_own(
    tier: ColdModel, stories: Path, expected: list[int], tmp_path: Path
) -> None:
    """One node was given its layers, the other begins with nothing; a stage that is replaced fetches, too."""
    plan = manual_plan(Store.open(stories), stages=2, cyclic=True)
    one, other = tmp_path / "one", tmp_path / "other"
    pull(tier, one, lambda store: store.blocks_of(range(0, 12, 2), first=True, last=False))
    with ray_engine(stories, plan, own_stores=(one, other), cold=tier) as engine:
        assert answer_of(engine) == expected
        assert blocks_in(one) == ["embed", *(f"layer-{i:05d}" for i in range(0, 12, 2))]
        # The head of this model is its embedding.
        assert blocks_in(other) == ["embed", *(f"layer-{i:05d}" for i in range(1, 12, 2)), "head"]
        (other / "layer-00003.safetensors").unlink()
        engine.replace_stage(1)
        assert answer_of(engine) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_stages_fetch_from_other_nodes_stores(
    tier: ColdModel, stories: Path, expected: list[int], tmp_path: Path
) -> None:
    """One node has nothing, and one half of the layers; also when a stage is replaced."""
    store, half = Store.open(stories), tmp_path / "half"
    pull(tier, half, lambda store: store.blocks_of(range(6, 12), first=False, last=True))
    peer = ray.remote(num_cpus=0)(StorePeer)
    peers = [peer.remote(str(path), store.digest) for path in (half, stories)]
    ray.kill(peer.remote(str(stories), store.digest))
    path = tmp_path / "empty"
    plan = manual_plan(store, stages=2)
    with ray_engine(stories, plan, own_stores=(path, half), peers=peers) as engine:
        assert answer_of(engine) == expected
        assert len(blocks_in(path)) == 7
        (path / "layer-00003.safetensors").unlink()
        ray.kill(peers[0])
        engine.replace_stage(0)
        assert answer_of(engine) == expected


def test_a_stage_without_its_layers_says_which(
    tier: ColdModel, stories: Path, tmp_path: Path
) -> None:
    path = tmp_path / "node"
    pull(tier, path, lambda store: store.blocks_of(range(6), first=True, last=False))
    plan = manual_plan(Store.open(stories), stages=2)
    with pytest.raises(StoreError) as caught, local_ring(path, plan):
        pass
    assert f"store at {path} on " in str(caught.value)
    assert "lacks head and layers 6-11 " in str(caught.value)
    assert f"headrace pull {tier} {path} --layers 6-11 there" in str(caught.value)
