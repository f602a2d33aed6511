"""Rows of the embedding table: from host memory, to wherever they are needed."""

import pytest
import torch

from headrace.runtime.embedding import EmbeddingTable

TOKENS = torch.tensor([5, 0, 96, 5])


def table(dtype: torch.dtype, width: int = 1500) -> torch.Tensor:
    return torch.randn(97, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    with EmbeddingTable(values, device, dtype) as rows:
        wanted = values[TOKENS].to(dtype)
        tokens = TOKENS.pin_memory() if device.type == "cuda" else TOKENS
        got = rows.rows(tokens)
        assert got.dtype == dtype and got.device.type == device.type
        assert torch.equal(got.cpu(), wanted)
        onto = torch.zeros_like(got)
        assert rows.rows(tokens, onto) is onto
        assert torch.equal(onto.cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cpu(dtype: torch.dtype) -> None:
    check(table(torch.bfloat16), dtype, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(dtype: torch.dtype) -> None:
    values = table(torch.bfloat16)
    for _ in range(2):  # what was pinned can be pinned again when it was closed
        check(values, dtype, torch.device("cuda", 0))


@pytest.mark.gpu
def test_a_row_that_changes_is_read_again() -> None:
    values, tokens = table(torch.float32), TOKENS.pin_memory()
    with EmbeddingTable(values, torch.device("cuda", 0), torch.float32) as rows:
        first = rows.rows(tokens).cpu()
        values += 1.0
        assert torch.equal(rows.rows(tokens).cpu(), first + 1.0)
