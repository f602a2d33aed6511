"""What the device reads from and writes to host memory itself."""

import pytest
import torch
from interpreter import interpreted


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_gather(dtype: torch.dtype) -> None:
    from headrace.runtime.zero_copy import gather

    table, tokens = torch.randn(97, 1500).to(torch.float16), torch.tensor([5, 0, 96, 5])
    out = torch.empty(4, 1500, dtype=dtype)
    gather(table, tokens, out)
    assert torch.equal(out, table[tokens].to(dtype))


@interpreted
def test_interpreted_store() -> None:
    from headrace.runtime.zero_copy import store

    x = torch.arange(3000).view(1500, 2).T
    out = torch.zeros(2, 1500, dtype=torch.int64)
    store(x, out)
    assert torch.equal(out, x)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 9, 5000])
def test_read_back(count: int) -> None:
    from headrace.runtime.zero_copy import read_back

    x = torch.arange(count, device="cuda")
    for i in range(3):  # the host's memory is used again
        assert read_back(x + i) == list(range(i, count + i))


@pytest.mark.gpu
def test_reading_back_waits_for_no_copies() -> None:
    from headrace.runtime.zero_copy import read_back

    size, copies = 256 << 20, 8
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    x = torch.arange(9, device="cuda")
    read_back(x)  # compiles
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(copies):
            target.copy_(source, non_blocking=True)
        end = torch.cuda.Event()
        end.record()
    assert read_back(x) == list(range(9))
    assert not end.query(), "it waited for all that was queued"
    end.synchronize()
