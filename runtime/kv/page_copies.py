"""Copies of many pages at once, by their numbers, where the pages of either side lie in any order.

On CUDA a kernel does it, which reads host memory itself, as long as that is pinned, and the numbers, too:
a copy engine would be told of each page, which takes longer than a small page takes over the link, and
would have the pages wait behind whole layers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WORD_BYTES = 8
"""Pages are copied in words of so many bytes, and their sizes and places are multiples of them."""


class PageIds(NamedTuple):
    """Page source[i] goes to page dest[i]: int32 [n] each, on the host and pinned for CUDA."""

    source: Tensor
    dest: Tensor

    @classmethod
    def of(cls, source: np.ndarray, dest: np.ndarray, *, pinned: bool) -> "PageIds":
        count = len(source)
        # Both begin where a kernel that was compiled for aligned addresses can read them.
        both = torch.empty((2, -(-count // 4) * 4), dtype=torch.int32, pin_memory=pinned)[:, :count]
        both.numpy()[:] = source, dest
        return cls(both[0], both[1])

    def __len__(self) -> int:
        return len(self.source)


def copy_pages(source: Tensor, dest: Tensor, ids: PageIds, *, over_link: bool = False) -> None:
    """dest[ids.dest] = source[ids.source], of byte vectors: uint8 [pages, bytes of a page].

    Rows may lie apart. On CUDA it is queued on the current stream, and `ids` stay with the caller until
    it is done; `over_link`: with no more programs than keep a link busy.
    """
    if not len(ids.source):
        return
    if dest.is_cuda:
        copy_by_kernel(source, dest, ids, over_link=over_link)
    else:
        dest.numpy()[ids.dest.numpy()] = source.numpy()[ids.source.numpy()]


def copy_by_kernel(source: Tensor, dest: Tensor, ids: PageIds, *, over_link: bool) -> None:
    """What copy_pages does on CUDA."""
    # Imported where it is needed: installations without a GPU have no Triton.
    from headrace.runtime.kv.page_copies_triton import launch

    words = source.view(torch.int64), dest.view(torch.int64)
    launch(*words, ids.source, ids.dest, over_link=over_link)
