"""Paged attention on the CPU against plain attention in float64."""

import random

import pytest
import torch
from attention_cases import CASES, Case, Tensors, make, micro_batch
from torch import Tensor

from headrace.runtime.attention.paged import paged_attention
from headrace.runtime.batch import Batch
from headrace.scheduler.plan import MicroBatch, Sampling, Slice

CPU = torch.device("cpu")
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())


def run(case: Tensors) -> Tensor:
    rule = case.rule
    return paged_attention(
        case.q, case.k, case.v, case.kv, case.batch,
        scaling=rule.scaling, sliding_window=rule.sliding_window, softcap=rule.softcap,
        sinks=rule.sinks,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_reference(name: str) -> None:
    case = make(CASES[name], torch.float32, CPU)
    torch.testing.assert_close(run(case).double(), case.expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["mixed", "everything"])
def test_bfloat16_is_close(name: str) -> None:
    case = make(CASES[name], torch.bfloat16, CPU)
    out = run(case)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), case.expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    spans = [(rng.choice([0, rng.randrange(200)]), rng.choice([1, rng.randrange(1, 150)]))
             for _ in range(rng.randrange(1, 9))]  # fmt: skip
    case = make(
        Case(
            tuple(spans),
            heads=kv_heads * rng.choice([1, 2, 3, 4, 8]),
            kv_heads=kv_heads,
            k_dim=rng.choice([16, 40, 128]),
            v_dim=rng.choice([16, 40, 128]),
            window=rng.choice([None, rng.randrange(1, 200)]),
            softcap=rng.choice([None, 4.0]),
            sinks=rng.random() < 0.5,
        ),
        torch.float32, CPU, seed,
    )  # fmt: skip
    torch.testing.assert_close(run(case).double(), case.expected, atol=3e-6, rtol=3e-6)


def test_long_slices_are_cut_into_blocks() -> None:
    case = make(Case(((40, 700),), 4, 2, 16, 16, window=100), torch.float32, CPU)
    torch.testing.assert_close(run(case).double(), case.expected, atol=2e-6, rtol=2e-6)


def test_a_sequence_gets_the_same_bits_alone() -> None:
    """Decodes of equally many pages share a call; that must not show."""
    spans = ((70, 1), (100, 1), (126, 1), (30, 1), (65, 40))
    together = make(Case(spans, 4, 2, 32, 32), torch.float32, CPU)
    out, row = run(together), 0
    for i, (_, new) in enumerate(spans):
        pages = together.batch.page_table[i].tolist()
        alone = Batch.build(micro_batch(spans[i : i + 1], pages), CPU)
        rows = slice(row, row + new)
        single = paged_attention(
            together.q[rows], together.k[rows], together.v[rows], together.kv, alone,
            scaling=together.rule.scaling,
        )  # fmt: skip
        assert torch.equal(single, out[rows])
        row += new


def test_chunks_give_what_one_slice_gives() -> None:
    whole = make(Case(((0, 150),), 4, 2, 16, 16), torch.float32, CPU)
    expected = run(whole)
    pages = whole.batch.page_table[0].tolist()
    whole.kv.k.zero_()
    for start, end in ((0, 1), (1, 65), (65, 149), (149, 150)):
        batch = Batch.build(micro_batch([(start, end - start)], pages), CPU)
        rows = slice(start, end)
        out = paged_attention(
            whole.q[rows], whole.k[rows], whole.v[rows], whole.kv, batch,
            scaling=whole.rule.scaling,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[rows], atol=1e-6, rtol=1e-6)


def test_strided_inputs_are_read_as_they_are() -> None:
    case = make(CASES["mixed"], torch.float32, CPU)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.q, case.k, case.v))
    out = paged_attention(q, k, v, case.kv, case.batch, scaling=case.rule.scaling)
    torch.testing.assert_close(out.double(), case.expected, atol=2e-6, rtol=2e-6)


def test_build_packs_positions_slots_and_sampled_rows() -> None:
    batch = Batch.build(
        MicroBatch(
            (
                Slice(4, 63, (1, 2, 3), (9, 5), GREEDY),
                Slice(5, 0, (7, 8), (2,), None),
                Slice(6, 128, (1,), (0, 1, 3), GREEDY),
            )
        ),
        CPU,
    )
    assert batch.positions.tolist() == [63, 64, 65, 0, 1, 128]
    assert batch.token_slots.tolist() == [9 * 64 + 63, 5 * 64, 5 * 64 + 1, 128, 129, 3 * 64]
    assert batch.sample_rows.tolist() == [2, 5]
    assert batch.query_start.tolist() == [0, 3, 5, 6]
    assert batch.context.tolist() == [66, 2, 129]
    assert batch.page_table.tolist() == [[9, 5, 0], [2, 0, 0], [0, 1, 3]]
    assert (batch.min_query, batch.max_query, batch.max_context) == (1, 3, 129)
    for wide in (batch.positions, batch.token_slots, batch.sample_rows):
        assert wide.dtype == torch.int64
    for narrow in (batch.query_start, batch.context, batch.page_table):
        assert narrow.dtype == torch.int32


def test_build_without_sampled_rows() -> None:
    batch = Batch.build(micro_batch([(0, 3)], [0]), CPU)
    assert batch.sample_rows.shape == (0,)
