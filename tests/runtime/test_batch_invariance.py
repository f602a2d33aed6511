"""A request's logits are its own: bit for bit the same, whatever else is in the batch (float32)."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_config
from bits import same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole import WholeModel

from headrace.runtime.conversion.convert import convert
from headrace.runtime.weights.plain import RawWeight
from headrace.scheduler.plan import Slice

STEPS = 24
LENGTHS = tuple(3 + 7 * i % 90 for i in range(20))
CHUNK = 40
PAGES = 3


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    # Sums long enough for kernels to differ in their order.
    config = tiny_config(request.param, hidden_size=256, intermediate_size=640, head_dim=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="nf4", allow_missing_tokenizer=True)
    return folder / "store"


def tokens_of(request: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(request)
    return tuple(torch.randint(3, 256, (LENGTHS[request] + STEPS,), generator=generator).tolist())


def pieces(request: int) -> list[Slice]:
    """The prompt in chunks, then one token at a time."""
    tokens, prompt = tokens_of(request), LENGTHS[request]
    cuts = [*range(0, prompt, CHUNK), *range(prompt, prompt + STEPS), prompt + STEPS]
    pages = tuple(range(request * PAGES, request * PAGES + PAGES))
    return [Slice(request, a, tokens[a:b], pages, None) for a, b in pairwise(cuts)]


def run(model: WholeModel, requests: list[int]) -> dict[int, list[Tensor]]:
    """Each request's logits by slice; in every pass every request that is not done has a slice."""
    work = {request: pieces(request) for request in requests}
    found: dict[int, list[Tensor]] = {request: [] for request in requests}
    for step in range(max(map(len, work.values()))):
        slices = [work[request][step] for request in requests if step < len(work[request])]
        parts = model.logits(slices).split([len(piece.tokens) for piece in slices])
        for piece, part in zip(slices, parts, strict=True):
            found[piece.request].append(part)
    return found


def test_alone_and_in_a_batch_of_20_are_bitwise_equal(store: Path) -> None:
    model = WholeModel(store, pages=PAGES * len(LENGTHS))
    together = run(model, list(range(len(LENGTHS))))
    for some in ([0], [7], [19], [3, 4], list(range(5, 17))):
        for request, parts in run(model, some).items():
            for step, part in enumerate(parts):
                assert same_bits(part, together[request][step]), (some, request, step)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(640, 256), (256, 4096), (1024, 1024), (96, 64)])
def test_a_row_of_a_product_is_its_own(threads: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    columns, rows = shape
    weight, x = RawWeight(torch.randn(rows, columns)), torch.randn(300, columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = weight.linear(x)
        for n in (1, 2, 3, 7, 15, 16, 17, 50, 130, 257):
            assert torch.equal(weight.linear(x[:n].clone()), want[:n]), n
            assert torch.equal(weight.linear(x[40 : 40 + n].clone()), want[40 : 40 + n]), n
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(want, F.linear(x, weight.dense(torch.float32)))
