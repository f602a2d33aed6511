"""The Triton kernels over quantized pages: on a GPU as they are, elsewhere in Triton's interpreter."""

import pytest
import torch
from attention_cases import CASES, LONG, SMALL, Case
from interpreter import DEVICES, slow
from quantized_cases import expected, keep_past, make_quantized, quantized_layer, stored

from headrace.runtime.attention.tiles import Tile
from headrace.scheduler.kv_format import FORMATS, KVFormat
from headrace.scheduler.plan import PAGE_TOKENS

QUANTIZED = ["int8", "int4"]
MORE = [pytest.param("int8", marks=pytest.mark.slow), "int4"]
OTHER = ["int8", pytest.param("int4", marks=pytest.mark.slow)]
DECODES = ((300, 1), (0, 1), (63, 1), (64, 1), (127, 1))


def check(
    case: Case, fmt: str, device: str, dtype: torch.dtype = torch.float32,
    splits: int | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    from headrace.runtime.attention import launch
    from headrace.runtime.kv import write_triton

    real = make_quantized(case, FORMATS[fmt], dtype, torch.device(device))
    kv, batch = real.kv, real.batch
    q, k, v = kv.rotate(real.q, real.k, real.v)
    write_triton.fill(k, v, kv, batch)
    out = launch.attend(q, kv, batch, real.rule, splits, tile, newest=(k, v))
    write_triton.keep(k, v, kv, batch)
    out = kv.rotate_back(out)
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), expected(real), atol=bound, rtol=bound)
    # What the batch left behind is what torch would have.
    wanted = quantized_layer(case, FORMATS[fmt], len(kv.k.codes), dtype, torch.device(device))
    for piece, whole in zip(real.slices, real.whole, strict=True):
        for x, ours, theirs in zip(whole, (kv.k, kv.v), (wanted.k, wanted.v), strict=True):
            keep_past(theirs, x, piece)
            assert_stored(stored(ours, piece), stored(theirs, piece), FORMATS[fmt], device)
            left = piece.end % PAGE_TOKENS
            # A rotation's sums are in another order for other numbers of rows there.
            close = 0.0 if device == "cpu" else bound
            torch.testing.assert_close(
                ours.tails[piece.tail, :, :left],
                theirs.tails[piece.tail, :, :left],
                atol=close,
                rtol=close,
            )


def assert_stored(ours: torch.Tensor, theirs: torch.Tensor, fmt: KVFormat, device: str) -> None:
    """On a GPU divisions are rounded otherwise, so that a few numbers are off by a step."""
    if device == "cpu":
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        return
    step = 8 / (2**fmt.bits - 1)  # of normal numbers, whose range in a head is below 8
    torch.testing.assert_close(ours, theirs, atol=step * 1.3, rtol=0)
    assert ((ours - theirs).abs() > 0.2 * step).sum() <= 2e-3 * ours.numel()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", MORE)
@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(SMALL, heads=4, kv_heads=2, k_dim=16, v_dim=16), None),
        slow(Case(SMALL, heads=2, kv_heads=2, k_dim=32, v_dim=32, window=20), 1),
        slow(Case(LONG, heads=8, kv_heads=1, k_dim=48, v_dim=24, softcap=2.0), 1),
        (Case(LONG, heads=5, kv_heads=1, k_dim=80, v_dim=80, window=70, sinks=True), 2),
        (Case(SMALL[1:4], heads=20, kv_heads=1, k_dim=16, v_dim=48, latent=True), 2),
    ],
    ids=["plain", "window", "softcap", "window, sinks, split", "latents"],
)
def test_mixed_batches(case: Case, splits: int | None, fmt: str, device: str) -> None:
    check(case, fmt, device, splits=splits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", OTHER)
@pytest.mark.parametrize("splits", [3, slow(16)])
def test_decodes_split_and_merge(splits: int, fmt: str, device: str) -> None:
    """Parts of pages only, of both, of the newest page only, and of nothing."""
    case = Case(DECODES, heads=4, kv_heads=2, k_dim=16, v_dim=16, sinks=True)
    check(case, fmt, device, splits=splits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", MORE)
@pytest.mark.parametrize(
    ("case", "splits", "tile"),
    [
        slow(Case(LONG, 7, 1, 48, 16, sinks=True), 2, Tile(128, 128, 64, 16, 8, 2, peel=True)),
        (Case(((0, 200),), 1, 1, 16, 16), 1, Tile(128, 32, 16, 16, 4, 2, peel=True)),
    ],
    ids=["7 share, split, across pages", "blocks of three pages"],
)
def test_tiles(case: Case, splits: int, tile: Tile, fmt: str, device: str) -> None:
    check(case, fmt, device, splits=splits, tile=tile)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", OTHER)
def test_half_precision(fmt: str, device: str) -> None:
    check(Case(SMALL[2:], heads=4, kv_heads=1, k_dim=64, v_dim=64), fmt, device, torch.float16)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].k_dim % 16 == 0])
def test_the_cpu_cases(name: str, fmt: str, dtype: torch.dtype, device: str) -> None:
    for splits in (None, 1, 8):
        check(CASES[name], fmt, device, dtype, splits)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
def test_long_slices_on_every_tile(dim: int, fmt: str, device: str) -> None:
    spans = ((0, 700), (1000, 300), (2000, 1), (900, 7))
    case = Case(spans, heads=8, kv_heads=2, k_dim=dim, v_dim=min(dim, 128))
    for dtype in (torch.float32, torch.bfloat16):
        check(case, fmt, device, dtype)
