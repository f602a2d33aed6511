"""Decodes in lanes: padded, in place, and with the same tokens. CUDA graphs themselves need CUDA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import greedy, tiny_model
from rings import local_ring, manual_plan, run_all

from headrace.runtime.conversion.convert import convert
from headrace.runtime.graphs import padded_rows
from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import Request, SamplingParams

LENGTHS = (1, 3, 40, 60, 65, 9, 14, 20, 33, 70, 5)
"""Eleven sequences, which lanes pad, and which cross from one page to two."""


class CallAgain:
    """What a CUDA graph does, without CUDA: the same work on the same memory."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.replays.append(0)
        place = len(self.replays) - 1

        def again() -> None:
            self.replays[place] += 1
            work()

        return again


class Unable:
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


def made(name: str, folder: Path) -> tuple[Path, list[Request], dict[int, list[int]]]:
    model = tiny_model(name)
    model.save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist()
        for n in LENGTHS
    ]
    requests = [
        Request(i, list(prompt), SamplingParams(temperature=0.0, max_tokens=6 + i % 5), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    wanted = {i: greedy(model, prompt, 6 + i % 5) for i, prompt in enumerate(prompts)}
    return folder / "store", requests, wanted


RINGS: list[dict[str, Any]] = [
    {"stages": 1, "tier": Tier.DEVICE},
    {"stages": 1, "tier": Tier.NVME, "layers_a_visit": 2},
    {"stages": 2, "tier": Tier.NVME, "cyclic": True},
]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_same_tokens(name: str, ring: dict[str, Any], tmp_path: Path) -> None:
    store, requests, wanted = made(name, tmp_path)
    plan = manual_plan(Store.open(store), graph_rows=16, **ring)
    capture = CallAgain()
    with local_ring(store, plan, capture=capture) as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    # What precedes the layers is always recorded, experts never are.
    assert sum(capture.replays) > 0
    if name == "llama":
        assert max(capture.replays) > 3


def test_without_recordings_nothing_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, requests, wanted = made("llama", tmp_path)
    plan = manual_plan(Store.open(store), graph_rows=16)
    with local_ring(store, plan, capture=Unable()) as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    assert len([r for r in caplog.records if "not as CUDA graphs" in r.message]) == 1


def test_padding_is_little() -> None:
    sizes = {padded_rows(n) for n in range(1, 257)}
    assert len(sizes) <= 18
    assert all(n <= padded_rows(n) <= max(2 * n, n + 31) for n in range(1, 257))
    assert padded_rows(256) == 256


@pytest.mark.gpu
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_cuda_graphs_give_the_same_tokens(
    name: str, ring: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, requests, wanted = made(name, tmp_path)
    plan = manual_plan(Store.open(store), graph_rows=16, **ring)
    with local_ring(store, plan, "cuda") as pipeline:
        assert run_all(plan, pipeline, requests) == wanted
    assert not caplog.records
