"""Rounding that looks at inputs, against what the papers' algorithms say, done slowly."""

import pytest
import torch

from headrace.runtime.bnb import functional as bnb
from headrace.runtime.calibration.awq import channel_scales, output_error, search_scales
from headrace.runtime.calibration.gptq import Factor, gptq
from headrace.runtime.calibration.grids import (
    affine_grid,
    output_errors,
    row_grid,
    table_grid,
    weighted_squares,
)
from headrace.runtime.calibration.observed import Moments

NF4 = bnb.get_4bit_type("nf4", device="cpu")


def correlated(rows, columns, tokens=2000, seed=0):
    """A matrix and the second moments of inputs that share most of what they are made of."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    mixing = torch.randn(columns // 4, columns, generator=random)
    size = torch.rand(columns, generator=random) * 4 + 0.1
    x = torch.randn(tokens, columns // 4, generator=random) @ mixing
    x = (x + torch.randn(tokens, columns, generator=random)) * size
    return weight, x.T @ x / tokens, x


def grids(weight):
    return {
        "int4": affine_grid(weight, 32),
        "int8": row_grid(weight),
        "nf4": table_grid(weight, NF4, 64),
    }


def textbook(weight, gram, grid):
    """Optimal Brain Quantization in a fixed order: after each column, H^-1 is worked out anew, without it."""
    w, h = weight.double().clone(), gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    values = torch.empty_like(weight)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        column, *others = left
        _, values[:, column] = grid.nearest(column, w[:, column].float())
        error = (w[:, column] - values[:, column]) / inverse[0, 0]
        w[:, others] -= error[:, None] * inverse[0, 1:]
        left = others
    return values


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("block", [16, 128])
def test_gptq_rounds_as_its_paper_says(kind, block):
    weight, gram, _ = correlated(24, 64)
    grid = grids(weight)[kind]
    codes, _ = gptq(weight, Factor.of(gram), grid, block=block)
    values = grid.values(codes)
    torch.testing.assert_close(values, textbook(weight, gram, grid), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4"])
def test_gptq_changes_outputs_less_than_rounding_to_nearest(kind):
    weight, gram, x = correlated(64, 128)
    grid = grids(weight)[kind]
    codes, share = gptq(weight, Factor.of(gram), grid)
    values = grid.values(codes)
    nearest = grid.round(weight)[1]
    error = (x @ (values - weight).T).square().sum()
    assert error < 0.5 * (x @ (nearest - weight).T).square().sum()
    damped = error + len(x) * 0.01 * gram.diagonal().mean() * (values - weight).square().sum()
    whole = (x @ weight.T).square().sum() + len(x) * 0.01 * gram.diagonal().mean() * (
        weight.square().sum()
    )
    assert share == pytest.approx((damped / whole).item(), rel=1e-3)
    assert torch.equal(grid.round(values)[0], codes.to(grid.round(values)[0].dtype))


def test_columns_without_input_are_rounded_to_nearest():
    weight, gram, _ = correlated(8, 64)
    gram[5], gram[:, 5] = 0, 0
    grid = affine_grid(weight, 32)
    values = grid.values(gptq(weight, Factor.of(gram), grid)[0])
    assert torch.equal(values[:, 5], grid.round(weight)[1][:, 5])
    values = grid.values(gptq(weight, Factor.of(torch.zeros_like(gram)), grid)[0])
    assert torch.equal(values, grid.round(weight)[1])


def test_inputs_of_too_few_tokens_are_damped():
    weight, _, x = correlated(8, 256)
    few = x[:10]
    grid = affine_grid(weight, 64)
    values = grid.values(gptq(weight, Factor.of(few.T @ few / 10), grid)[0])
    error = (few @ (values - weight).T).square().sum()
    assert error < 0.1 * (few @ (grid.round(weight)[1] - weight).T).square().sum()
    with pytest.raises(ValueError, match="no finite numbers"):
        Factor.of(torch.full((256, 256), torch.nan))


@pytest.mark.parametrize("shape", [(3, 64), (6, 40)])
def test_nf4_grid_is_bitsandbytes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(
        weight.reshape(-1), 64, "nf4", torch.uint8
    )
    grid = table_grid(weight, NF4, 64)
    codes, _ = grid.round(weight)
    flat = codes.reshape(-1)
    assert torch.equal(grid.scale, absmax)
    assert torch.equal((flat[::2] << 4 | flat[1::2]).to(torch.uint8), packed.view(-1))
    for column in range(shape[1]):
        assert torch.equal(grid.nearest(column, weight[:, column])[0], codes[:, column])


def test_searched_ranges_cost_no_more_than_whole_ones():
    weight, gram, _ = correlated(16, 128)
    weight[3, 7] = 9.0
    for errors in (weighted_squares(gram.diagonal(), 64), output_errors(gram, 64)):
        for make in (
            lambda e: affine_grid(weight, 64, errors=e),
            lambda e: table_grid(weight, NF4, 64, e),
        ):
            whole, searched = make(None), make(errors)
            cost = [
                errors((grid.round(weight)[1] - weight).view(-1, 64), 0)
                for grid in (whole, searched)
            ]
            assert bool((cost[1] <= cost[0] * 1.0001).all())
            assert cost[1].sum() < 0.95 * cost[0].sum()
    # The two differ in what they know of inputs: blocks of one column are told alike.
    alone = output_errors(torch.diag(gram.diagonal()), 64)((weight / 9).view(-1, 64), 0)
    apart = weighted_squares(gram.diagonal(), 64)((weight / 9).view(-1, 64), 0)
    torch.testing.assert_close(alone, apart, rtol=1e-4, atol=1e-4)


def test_scales_are_searched_for_the_outputs():
    weight, gram, x = correlated(64, 128)
    loud = torch.ones(128)
    loud[::16] = 30.0
    x = x * loud
    gram = x.T @ x / len(x)

    def rounding(w):
        return affine_grid(w, 64).round(w)[1]

    found = search_scales([(weight[:40], rounding), (weight[40:], rounding)], gram, x.abs().mean(0))
    assert found.alpha > 0
    scaled = (x / found.scales) @ rounding(weight * found.scales).T
    error = (scaled - x @ weight.T).square().sum(1).mean()
    nearest = (x @ (rounding(weight) - weight).T).square().sum(1).mean()
    torch.testing.assert_close(error.item(), found.error, rtol=1e-2, atol=0)
    torch.testing.assert_close(nearest.item(), found.error_without, rtol=1e-2, atol=0)
    assert error < 0.8 * nearest
    assert output_error(weight, weight, gram) == 0


def test_scales_of_channels_without_input_are_finite():
    magnitude = torch.tensor([0.0, 1.0, 4.0])
    scales = channel_scales(magnitude, 0.5)
    assert torch.equal(scales, torch.tensor([1.0, 1.0, 2.0]) / 2**0.5)
    assert torch.equal(channel_scales(torch.zeros(3), 0.5), torch.ones(3))


def test_factors_of_many_columns_are_made_where_they_lie():
    x = torch.randn(3000, 1500, generator=torch.Generator().manual_seed(4)).double()
    gram = (x.T @ x / len(x)).float()
    before = gram.clone()
    factor = Factor.of(gram)
    assert torch.equal(gram, before)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(1500)
    ordered = damped[factor.order][:, factor.order].double()
    lower = torch.linalg.cholesky(ordered)
    torch.testing.assert_close(
        factor.inverse.double() @ lower, torch.eye(1500, dtype=torch.float64), rtol=0, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_on_cuda(dtype):
    x = torch.randn(5000, 2500, generator=torch.Generator().manual_seed(5)).to(dtype)
    moments = Moments(2500, torch.device("cuda"))
    for some in x.cuda().split(1700):
        moments.add(some)
    gram, magnitude = moments.take_means()
    wide = x.double()
    torch.testing.assert_close(gram.cpu().double(), wide.T @ wide / 5000, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        magnitude.cpu().double(), wide.abs().mean(dim=0), rtol=1e-4, atol=1e-5
    )
