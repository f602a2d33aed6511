"""bitsandbytes, imported without the compiler that it would bring along.

It wraps four functions in torch.compile as it is imported, which loads TorchDynamo and Inductor: a
second of processor time in every process. Only one of them is ever called here, for rows that its
kernel cannot read: uncompiled it gives the same bits, and needs no compiler's seconds for each shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without_compiler() -> Iterator[None]:
    compiles: Any = torch.compile

    def keep(function: Any = None, **_: object) -> Any:
        return function or keep

    torch.compile = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiles


with _without_compiler():
    from bitsandbytes import functional
    from bitsandbytes.cextension import lib

__all__ = ["functional", "lib"]
