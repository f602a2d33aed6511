"""The few-row 4-bit matmul: on a GPU as it is, elsewhere in Triton's interpreter, against float64."""

from pathlib import Path

import pytest
import torch
from interpreter import HAS_TRITON, INTERPRETED, interpreted, slow
from torch import Tensor

from headrace.runtime.bnb import functional
from headrace.runtime.matmul.configs import (
    BUCKETS,
    Codes,
    Config,
    Product,
    bucket,
    candidates,
    fits,
    shared_bytes,
    supports,
)
from headrace.runtime.matmul.decode_4bit import decoding, table
from headrace.runtime.matmul.tuning import choices, load, problems, tune

BF16, F16 = torch.bfloat16, torch.float16
FORMATS = ["nf4", "fp4", "int4", "int4 with zeros"]
HOPPER = {"processors": 132, "shared": 232448}
needs_cuda = pytest.mark.skipif(
    INTERPRETED or not HAS_TRITON or not torch.cuda.is_available(), reason="needs CUDA and Triton"
)


def make(kind: str, columns: int, depth: int, group: int, device: str) -> Codes:
    generator = torch.Generator().manual_seed(columns + depth)
    packed = torch.randint(256, (columns * depth // 2,), dtype=torch.uint8, generator=generator)
    scales = torch.rand(columns * depth // group, generator=generator) + 0.1
    zeros = torch.randint(17, scales.shape, generator=generator, dtype=torch.uint8)
    name, _, with_zeros = kind.partition(" ")
    # Stores have F16; the kernel takes other types, too.
    kept = {"int4": F16, "int4 with zeros": BF16}.get(kind, torch.float32)
    return Codes(
        name,
        packed.to(device),
        scales.to(device, kept),
        group,
        (columns, depth),
        zeros.to(device) if with_zeros else None,
    )


def values(codes: Codes) -> Tensor:
    """float64 [N, K], even k from the high nibble."""
    columns, depth = codes.shape
    packed = codes.packed.view(columns, depth // 2)
    code = torch.stack((packed >> 4, packed & 15), dim=-1).view(columns, depth).int()

    def wide(a: Tensor) -> Tensor:
        return a.double().view(columns, -1).repeat_interleave(codes.group, dim=1)

    if codes.kind == "int4":
        return (code - (8 if codes.zeros is None else wide(codes.zeros))) * wide(codes.scales)
    entries = functional.get_4bit_type(codes.kind, device=code.device).double()
    return entries[code] * wide(codes.scales)


def check(
    kind: str, columns: int, depth: int, group: int, rows: int, config: Config,
    dtype: torch.dtype, device: str, bound: float, *, biased: bool = True,
) -> None:  # fmt: skip
    from headrace.runtime.matmul.kernel import matmul

    assert supports(group, depth, rows, dtype) and fits(config, depth)
    codes = make(kind, columns, depth, group, device)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator).to(device, dtype)
    bias = torch.randn(columns, generator=generator).to(device, dtype) if biased else None
    out = matmul(x, codes, bias, config)
    assert torch.equal(out, matmul(x, codes, bias, config)), "not the same twice"
    expected = x.double() @ values(codes).T + (0 if bias is None else bias.double())
    assert out.shape == expected.shape and out.dtype == dtype
    # Every column on its own: an error in one place must not hide in the norm of all.
    errors, typical = (out.double() - expected).norm(dim=0), expected.norm() / columns**0.5
    assert errors.norm() < bound * expected.norm(), (errors.norm() / expected.norm()).item()
    assert errors.max() < 16 * bound * typical, (errors.max() / typical).item()


def check_together(
    kind: str, widths: tuple[int, ...], depth: int, rows: int, config: Config, dtype: torch.dtype,
    device: str, bound: float, *, biased: bool,
) -> None:  # fmt: skip
    """One launch for several weights against float64, and bit for bit against one for each."""
    from headrace.runtime.matmul.kernel import matmul, matmuls

    weights = [make(kind, columns, depth, 64, device) for columns in widths]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, depth, generator=generator).to(device, dtype)
    biases = [torch.randn(n, generator=generator).to(device, dtype) for n in widths]
    found = matmuls(x, weights, biases if biased else None, config)
    for codes, bias, out in zip(weights, biases, found, strict=True):
        alone = matmul(x, codes, bias if biased else None, config)
        assert out.is_contiguous() and torch.equal(out, alone)
        expected = x.double() @ values(codes).T + (bias.double() if biased else 0)
        assert out.shape == expected.shape and out.dtype == dtype
        assert (out.double() - expected).norm() < bound * expected.norm()


INTERPRETED_SHAPES = [
    # Columns past the end.
    ((96, 512, 64, 5, Config(64, 32, 2, 4, 2)), ("nf4", "int4 with zeros")),
    # Padded to 32 rows, parts of one step.
    ((64, 384, 32, 17, Config(32, 16, 3, 4, 2)), ("fp4", "int4")),
    # K in one piece.
    ((64, 1024, 128, 1, Config(64, 64, 1, 4, 2)), ("int4", "int4 with zeros")),
    # Padded to 16 rows.
    ((32, 512, 64, 9, Config(32, 64, 1, 2, 2)), ("nf4", "int4")),
    # Several steps a scale, uneven parts.
    ((32, 1280, 256, 2, Config(32, 16, 3, 4, 2)), ("fp4", "int4 with zeros")),
]
"""With the formats that are not left to the slow tests: each of them, by more than one shape."""


@interpreted
@pytest.mark.parametrize(
    ("kind", "columns", "depth", "group", "rows", "config"),
    [
        (kind, *shape) if kind in quick else slow(kind, *shape)
        for shape, quick in INTERPRETED_SHAPES
        for kind in FORMATS
    ],
)
def test_interpreted(
    kind: str, columns: int, depth: int, group: int, rows: int, config: Config
) -> None:
    check(kind, columns, depth, group, rows, config, F16, "cpu", 1e-3)


@interpreted
@pytest.mark.parametrize("kind", ["nf4", "int4 with zeros"])
@pytest.mark.parametrize(
    ("widths", "rows", "splits", "biased"),
    [((96, 32, 64), 5, 1, True), ((40, 96, 32), 3, 2, True), ((64, 64), 9, 2, False)],
)
def test_interpreted_together(
    kind: str, widths: tuple[int, ...], rows: int, splits: int, biased: bool
) -> None:
    config = Config(32, 32, splits, 2, 2)
    check_together(kind, widths, 512, rows, config, F16, "cpu", 1e-3, biased=biased)


@interpreted
def test_interpreted_bfloat16() -> None:
    # The interpreter truncates to bfloat16 where a GPU rounds.
    check("nf4", 64, 512, 64, 3, Config(64, 32, 2, 4, 2), BF16, "cpu", 2e-2, biased=False)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_tile(kind: str, group: int, dtype: torch.dtype) -> None:
    bound = 5e-3 if dtype == BF16 else 1e-3
    for rows in (1, 3, 16, 31, 64, 100, 128):
        configs = list(candidates(1000, 2048, rows, **HOPPER))
        for config in {(c.columns, c.words, c.warps): c for c in configs}.values():
            check(kind, 1000, 2048, group, rows, config, dtype, "cuda", bound)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("columns", "depth"), [(28672, 8192), (4096, 4096), (14336, 4096)])
def test_real_sizes(columns: int, depth: int) -> None:
    for rows in (1, 2, 4, 8, 16, 32, 64):
        config = next(candidates(columns, depth, rows, **HOPPER))
        for kind in ("nf4", "int4"):
            check(kind, columns, depth, 64, rows, config, BF16, "cuda", 5e-3, biased=False)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["nf4", "int4 with zeros"])
@pytest.mark.parametrize("widths", [(4096, 1024, 1024), (14336, 14336), (1000, 40, 2000)])
def test_weights_of_a_launch(kind: str, widths: tuple[int, ...]) -> None:
    for rows in (1, 8, 16, 32, 64, 128):
        for config in candidates(sum(widths), 4096, rows, **HOPPER):
            for biased in (False, True):
                check_together(kind, widths, 4096, rows, config, BF16, "cuda", 5e-3, biased=biased)


@pytest.mark.gpu
@needs_cuda
def test_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda", 0)
    products = [
        Product("nf4", 64, (4096, 1024, 1024), 4096, biased=True),
        Product("fp4", 64, (4096,), 2048),
    ]
    tune(device, products, 16, BF16)
    wanted = [problem for _, problem in problems(products, 16, BF16)]
    (file,) = tmp_path.glob("headrace/*.json")
    measured = load(file)
    assert measured.keys() == set(wanted)
    assert all(choice.microseconds > 0 for choice in measured.values())
    before = file.stat().st_mtime_ns
    tune(torch.device("cuda"), products, 16, BF16)
    assert file.stat().st_mtime_ns == before
    first = next(iter(measured))
    found = choices(device).choose(first.kind, 64, (first.columns, first.depth), first.rows, BF16)
    assert found == measured[first] or measured[first].path == "dense"


def test_table_is_the_formats_own() -> None:
    for dtype in (BF16, F16):
        raw = table("nf4", dtype).view(torch.uint8).view(2, 16)
        assert torch.equal(
            raw.T.contiguous().view(dtype).view(16),
            functional.get_4bit_type("nf4", device="cpu").to(dtype),
        )


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_every_register_is_written(kind: str) -> None:
    asm = decoding(kind, BF16, False).asm
    assert all(f"fma.rn.bf16x2 ${i}, " in asm for i in range(8))


@pytest.mark.parametrize("depth", [128, 896, 2048, 4096, 8192, 11008, 28672])
@pytest.mark.parametrize("columns", [256, 4096, 28672])
def test_candidates_fit(columns: int, depth: int) -> None:
    for rows in BUCKETS:
        for limits in (HOPPER, {"processors": 28, "shared": 101376}):
            found = list(candidates(columns, depth, rows, **limits))
            assert found
            assert len(found) == len(set(found))
            assert all(fits(config, depth) for config in found)
            assert all(shared_bytes(config, rows) <= limits["shared"] for config in found)


def test_supported() -> None:
    assert supports(64, 4096, 1, BF16)
    assert not supports(64, 4096, 129, BF16)
    assert not supports(64, 2880, 1, BF16)  # K is no multiple of 128
    assert not supports(64, 4096, 1, torch.float32)
    assert [bucket(rows) for rows in (1, 8, 9, 17, 128)] == [8, 8, 16, 32, 128]
