"""The Triton kernels: on a GPU as they are, elsewhere in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so one test runs this file again in a
process of its own.
"""

import itertools

import pytest
import torch
from attention_cases import CASES, LONG, SMALL, Case, make
from interpreter import DEVICES, slow

from headrace.runtime.attention.tiles import (
    DeviceLimits,
    Tile,
    choose_latent_tile,
    choose_splits,
    choose_tile,
    heads_at_once,
    shared_bytes,
)

HOPPER = DeviceLimits(processors=132, shared_memory=232448, wgmma=True)
ADA = DeviceLimits(processors=128, shared_memory=101376, wgmma=False)
DECODES = ((300, 1), (0, 1), (63, 1), (64, 1))


def check(
    case: Case, device: str, dtype: torch.dtype, splits: int | None, tile: Tile | None = None
) -> None:
    from headrace.runtime.attention import launch
    from headrace.runtime.kv import write_triton

    real = make(case, dtype, torch.device(device))
    write_triton.write(real.k, real.v, real.kv, real.batch)
    out = launch.attend(real.q, real.kv, real.batch, real.rule, splits, tile)
    bound = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), real.expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(SMALL, heads=4, kv_heads=2, k_dim=16, v_dim=16), None),
        slow(Case(SMALL, heads=2, kv_heads=2, k_dim=32, v_dim=32, window=20), 1),
        slow(Case(SMALL, heads=8, kv_heads=1, k_dim=24, v_dim=16, softcap=2.0), 1),
        (Case(SMALL[:4], heads=5, kv_heads=1, k_dim=80, v_dim=80, window=70, sinks=True), 2),
        (Case(SMALL, heads=3, kv_heads=1, k_dim=96, v_dim=128, softcap=5.0, sinks=True), 1),
        (Case(SMALL, heads=4, kv_heads=1, k_dim=24, v_dim=48, latent=True), None),
        (Case(SMALL[2:5], heads=48, kv_heads=1, k_dim=16, v_dim=32, sinks=True, latent=True), 3),
    ],
    ids=["plain", "window", "softcap", "window, sinks, split", "softcap, sinks", "latents",
         "latents of three blocks of heads, sinks, split"],
)  # fmt: skip
def test_mixed_batches(case: Case, splits: int | None, device: str) -> None:
    check(case, device, torch.float32, splits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3, 4, None])
def test_decodes_split_and_merge(splits: int | None, device: str) -> None:
    """More parts than a short context has tiles: the empty ones must weigh nothing."""
    check(Case(DECODES, heads=4, kv_heads=2, k_dim=16, v_dim=16, sinks=True), device,
          torch.float32, splits)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "splits", "tile"),
    [
        (Case(LONG, 5, 1, 16, 16), 1, Tile(64, 64, 16, 16, 4, 2, peel=True)),
        slow(Case(LONG, 7, 1, 24, 16, sinks=True), 2, Tile(128, 128, 32, 16, 8, 2, peel=True)),
        (Case(LONG, 8, 1, 16, 16, sinks=True), 1, Tile(64, 128, 16, 16, 4, 3, peel=True)),
        (Case(LONG, 2, 2, 192, 128), 1, Tile(64, 16, 256, 128, 8, 1, peel=True)),
        slow(Case(LONG, 4, 1, 16, 16, window=70), 2, Tile(64, 128, 16, 16, 4, 2, peel=True)),
        (Case(LONG, 3, 1, 16, 32, softcap=3.0), 1, Tile(16, 128, 16, 32, 4, 2, peel=False)),
        (Case(((100, 5),), 8, 1, 16, 64, latent=True), 2, Tile(32, 32, 16, 64, 8, 2, peel=True)),
    ],
    ids=["5 share", "7 share, split", "across pages", "as in MLA", "window", "softcap", "latents"],
)
def test_tiles(case: Case, splits: int, tile: Tile, device: str) -> None:
    """Tiles within a page and across pages, with those that every row sees apart."""
    check(case, device, torch.float32 if device == "cpu" else torch.bfloat16, splits, tile)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_more_sequences_than_are_counted_at_once(device: str) -> None:
    spans = ((3, 2),) + ((3, 1),) * 258 + ((5, 2),)
    tile = Tile(64, 16, 16, 16, warps=4, stages=2, peel=False)
    check(Case(spans, 16, 1, 16, 16), device, torch.float32, 1, tile)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(device: str) -> None:
    """In float16: the interpreter's tl.dot multiplies the bits of bfloat16 as integers."""
    case = Case(SMALL[2:], heads=4, kv_heads=1, k_dim=64, v_dim=64)
    check(case, device, torch.float16, None)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_may_be_narrower_than_queries(device: str) -> None:
    """Keys and values are rounded to the pages' type on the way in, and multiplied in q's."""
    from headrace.runtime.attention import launch
    from headrace.runtime.kv import write_triton

    case = Case(SMALL[1:4], heads=4, kv_heads=2, k_dim=16, v_dim=16)
    real = make(case, torch.bfloat16, torch.device(device))
    write_triton.write(real.k.float(), real.v.float(), real.kv, real.batch)
    out = launch.attend(real.q.float(), real.kv, real.batch, real.rule)
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
        for dim, queries, visible, itemsize in itertools.product(
            (16, 64, 96, 128, 192, 256), (1, 16, 4096), (160, 32768), (2, 4)
        ):
            tile = choose_tile(queries, visible, 8, dim, dim, itemsize, limits)
            assert shared_bytes(tile, itemsize, limits) <= limits.shared_memory
            assert tile.rows >= 16


def test_tiles_of_latents_fit_and_take_all_heads() -> None:
    for limits in (HOPPER, ADA):
        for heads, queries, itemsize in itertools.product((16, 40, 96, 128), (1, 4096), (2, 4)):
            tile = choose_latent_tile(queries, heads, 64, 512, itemsize, limits)
            query = tile.rows * tile.dim_v * itemsize
            assert query + shared_bytes(tile, itemsize, limits) <= limits.shared_memory
            at_once = heads_at_once(heads, tile)
            assert heads % at_once == 0 and at_once <= tile.rows
    assert heads_at_once(128, choose_latent_tile(1, 128, 64, 512, 2, HOPPER)) == 64


def test_splits_load_all_processors_alike() -> None:
    decode = choose_tile(1, 4096, 8, 128, 128, 2, HOPPER)
    assert choose_splits(256 * 8, 4096, decode, HOPPER) == 1
    assert choose_splits(1, 1, decode, HOPPER) == 1
    for programs, visible in ((64, 32768), (8, 32768), (128, 4096), (1024, 4096), (264, 4096)):
        parts = choose_splits(programs, visible, decode, HOPPER)
        tiles = -(-visible // decode.keys)
        busiest = -(-programs * parts // 132) * -(-tiles // parts)
        assert busiest <= 1.25 * programs * tiles / 132, (programs, visible, parts)
