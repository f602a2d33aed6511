"""Quantized keys and values: errors are within half a step, and rotation changes no score."""

import pytest
import torch

from headrace.runtime.kv.codes import Rotation, dequantize, quantize
from headrace.scheduler.kv_format import FORMATS

CPU = torch.device("cpu")
STEPS = {"int8": 127, "int4": 15}
ROUNDED = 2.0**-11
"""What a float16 may be off by, relative to it."""


@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("name", STEPS)
def test_errors_are_within_half_a_step(name: str, scale: float, dim: int) -> None:
    fmt = FORMATS[name]
    x = torch.randn(50, 3, dim, generator=torch.Generator().manual_seed(dim)) * scale
    x[0, 0] += 5 * scale  # all of one sign
    x[1, 1, 3] = 40 * scale  # an outlier
    codes, scales = quantize(x, fmt)
    assert codes.shape == (50, 3, fmt.code_bytes(dim)) and codes.element_size() == 1
    assert scales.shape == (50, 3, fmt.scales) and scales.dtype == torch.float16
    width = x.amax(-1) - x.amin(-1) if name == "int4" else x.abs().amax(-1)
    largest = x.abs().amax(-1)
    bound = width / STEPS[name] / 2 + 2 * ROUNDED * largest + 1e-6
    error = (dequantize(codes, scales, fmt) - x).abs().amax(-1)
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("name", STEPS)
def test_zeros_and_equal_numbers_come_back(name: str) -> None:
    x = torch.zeros(3, 16)
    x[1], x[2] = 0.5, 1e-9
    found = dequantize(*quantize(x, FORMATS[name]), FORMATS[name])
    torch.testing.assert_close(found, x, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("name", STEPS)
def test_a_key_is_quantized_alone(name: str) -> None:
    x = torch.randn(70, 2, 64)
    codes, scales = quantize(x, FORMATS[name])
    for i in (0, 33, 69):
        one, its = quantize(x[i : i + 1], FORMATS[name])
        assert torch.equal(one[0], codes[i]) and torch.equal(its[0], scales[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192])
def test_rotation_keeps_scores(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(9, dim, generator=generator).to(dtype) for _ in range(2))
    rotation = Rotation.of(dim, dtype, CPU)
    exact = rotation.into.double() @ rotation.back.double()
    assert torch.equal(exact, torch.eye(dim, dtype=torch.float64))
    found = rotation.queries(q).double() @ rotation.keys(k).double().mT
    bound = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(found, q.double() @ k.double().mT, atol=bound, rtol=bound)


def test_rotation_spreads_an_outlier() -> None:
    k = torch.zeros(1, 128)
    k[0, 5] = 8.0
    assert Rotation.of(128, torch.float32, CPU).keys(k).abs().max() == 1.0
