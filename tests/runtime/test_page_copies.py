"""Pages are copied by their numbers, on CUDA by a kernel, here too in Triton's interpreter."""

import numpy as np
import pytest
import torch
from interpreter import DEVICES

from headrace.runtime.kv.page_copies import PageIds, copy_by_kernel, copy_pages

FROM, TO = [8, 0, 3, 4], [1, 6, 0, 2]


def pages(count: int, words: int) -> torch.Tensor:
    """Rows that lie apart, as the pages of a layer in host slots do."""
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 1 << 60, (count, words + 300)))[:, 100 : words + 100]


def ids(*, pinned: bool) -> PageIds:
    both = (np.array(numbers, dtype=np.int32) for numbers in (FROM, TO))
    return PageIds.of(*both, pinned=pinned)


def copied(source: torch.Tensor) -> torch.Tensor:
    want = torch.zeros(7, source.shape[1], dtype=source.dtype)
    want[TO] = source[FROM]
    return want


def test_by_indexing() -> None:
    source = pages(9, 64).view(torch.uint8)
    dest = torch.zeros(7, 512, dtype=torch.uint8)
    copy_pages(source, dest, ids(pinned=False))
    assert torch.equal(dest, copied(source))
    copy_pages(source, dest, PageIds.of(*np.zeros((2, 0), np.int32), pinned=False))
    assert torch.equal(dest, copied(source))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("over_link", [False, True])
@pytest.mark.parametrize("words", [8, 1024, 2100])
def test_by_a_kernel(words: int, over_link: bool, device: str) -> None:
    source, on_cuda = pages(9, words).view(torch.uint8), device == "cuda"
    there = source.to(device)
    if over_link and on_cuda:  # rows of pinned memory that lie apart
        whole = torch.empty(9, words * 8 + 4096, dtype=torch.uint8, pin_memory=True)
        there = whole[:, 64 : words * 8 + 64].copy_(source)
    dest = torch.zeros(7, words * 8, dtype=torch.uint8, device=device)
    copy_by_kernel(there, dest, ids(pinned=on_cuda), over_link=over_link)
    assert torch.equal(dest.cpu(), copied(source))
