"""The Triton kernels: on a GPU as they are, elsewhere in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so one test runs this file again in a
process of its own.
"""

import importlib.util
import itertools
import os

import pytest
import torch
from attention_cases import CASES, Case, make
from interpreter import run_interpreted

from headrace.runtime.attention_tiles import DeviceLimits, choose_splits, choose_tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="in a subprocess")),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                INTERPRETED or not HAS_TRITON or not torch.cuda.is_available(),
                reason="needs CUDA and Triton",
            ),
        ],
    ),
]
HOPPER = DeviceLimits(processors=132, shared_memory=232448)
ADA = DeviceLimits(processors=128, shared_memory=101376)
SMALL = ((0, 3), (62, 4), (64, 1), (130, 1), (0, 1), (40, 19))
DECODES = ((300, 1), (0, 1), (63, 1), (64, 1))


def check(case: Case, device: str, dtype: torch.dtype, splits: int | None) -> None:
    from headrace.runtime import attention_triton

    real = make(case, dtype, torch.device(device))
    attention_triton.write(real.k, real.v, real.kv, real.batch)
    out = attention_triton.attend(real.q, real.kv, real.batch, real.rule, splits)
    bound = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), real.expected, atol=bound, rtol=bound)


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(SMALL, heads=4, kv_heads=2, k_dim=16, v_dim=16), None),
        (Case(SMALL, heads=2, kv_heads=2, k_dim=32, v_dim=32, window=20), 1),
        (Case(SMALL, heads=8, kv_heads=1, k_dim=24, v_dim=16, softcap=2.0), 1),
        (Case(SMALL[:4], heads=5, kv_heads=1, k_dim=80, v_dim=80, window=70, sinks=True), 2),
        (Case(SMALL, heads=3, kv_heads=1, k_dim=96, v_dim=128, softcap=5.0, sinks=True), 1),
    ],
    ids=["plain", "window", "softcap", "window, sinks, split", "softcap, sinks"],
)
def test_mixed_batches(case: Case, splits: int | None, device: str) -> None:
    check(case, device, torch.float32, splits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 4, None])
def test_decodes_split_and_merge(splits: int | None, device: str) -> None:
    """More parts than a short context has tiles: the empty ones must weigh nothing."""
    check(Case(DECODES, heads=4, kv_heads=2, k_dim=16, v_dim=16, sinks=True), device,
          torch.float32, splits)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(device: str) -> None:
    """In float16: the interpreter's tl.dot multiplies the bits of bfloat16 as integers."""
    case = Case(SMALL[2:], heads=4, kv_heads=1, k_dim=64, v_dim=64)
    check(case, device, torch.float16, None)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_may_be_narrower_than_queries(device: str) -> None:
    """Keys and values are rounded to the pages' type on the way in, and multiplied in q's."""
    from headrace.runtime import attention_triton

    case = Case(SMALL[1:4], heads=4, kv_heads=2, k_dim=16, v_dim=16)
    real = make(case, torch.bfloat16, torch.device(device))
    attention_triton.write(real.k.float(), real.v.float(), real.kv, real.batch)
    out = attention_triton.attend(real.q.float(), real.kv, real.batch, real.rule)
    torch.testing.assert_close(out.cpu().double(), real.expected, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_cases(name: str, dtype: torch.dtype, device: str) -> None:
    for splits in (None, 1, 8):
        check(CASES[name], device, dtype, splits)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
def test_long_slices_on_every_tile(dim: int, device: str) -> None:
    spans = ((0, 700), (1000, 300), (2000, 1), (900, 7))
    for dtype in (torch.float32, torch.bfloat16):
        check(Case(spans, heads=8, kv_heads=2, k_dim=dim, v_dim=min(dim, 128)), device, dtype, None)


def test_tiles_fit_the_shared_memory() -> None:
    for limits in (HOPPER, ADA):
        for dim, queries, itemsize in itertools.product(
            (16, 64, 96, 128, 192, 256), (1, 16, 4096), (2, 4)
        ):
            tile = choose_tile(queries, 8, dim, dim, itemsize, limits)
            step = tile.keys * (tile.dim_k + tile.dim_v) * itemsize
            loads = step * max(tile.stages - 1, 1)
            assert loads + tile.rows * tile.dim_k * itemsize <= limits.shared_memory
            assert tile.rows >= 16 and 64 % tile.keys == 0


def test_splits_fill_the_device_with_parts_worth_a_program() -> None:
    assert choose_splits(256 * 8, 4096, HOPPER) == 1
    assert choose_splits(8, 32768, HOPPER) == 32
    assert choose_splits(8, 300, HOPPER) == 2
    assert choose_splits(1, 1, HOPPER) == 1
