"""Random bytes in every format that a store holds, as fast as they can be written.

A pool of each kind is drawn once, on the GPU where there is one, and read from random places on.
Scales are such that activations stay of order one: weights have a standard deviation of
0.02 / sqrt(layers), norms are one, biases zero.
"""

import json
from collections.abc import Iterator, Sequence
from math import sqrt
from random import Random
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.quantize import STATE_BYTES, encode

POOL_BYTES = 64 << 20
CHUNK_BYTES = 8 << 20


class RandomWeights:
    """The pools. Any thread may read from them."""

    def __init__(self, layers: int, seed: int = 0) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator(device).manual_seed(seed)
        given: dict[str, Any] = {"generator": generator, "device": device}
        std = 0.02 / sqrt(layers)
        words = torch.randint(-(2**31), 2**31, (POOL_BYTES // 4,), dtype=torch.int32, **given)
        normal = torch.randn(POOL_BYTES // 4, **given) * std
        # Around 1, so that neighbouring groups differ as those of real weights do.
        spread = torch.rand(POOL_BYTES // 16, **given) + 0.5
        sample = encode("x", torch.ones(1, 64, dtype=torch.bfloat16), "nf4")
        self._code = sample["x.quant_map"]
        self._state = json.loads(bytes(sample["x.quant_state.bitsandbytes__nf4"].tolist()))
        self._pools = {
            "noise": _bytes_of(words),
            "bf16": _bytes_of(normal.bfloat16()),
            # Uniform codes have the table's root mean square, uniform int8 that of a ramp.
            "absmax": _bytes_of(spread * (std / float(self._code.square().mean().sqrt()))),
            "scale": _bytes_of(spread * (std * sqrt(3))),
            # Uniform codes 0 ... 15 have a standard deviation of sqrt((16 ** 2 - 1) / 12).
            "int4 scale": _bytes_of((spread * (std / sqrt(21.25))).half()),
        }

    def state(self, shape: Sequence[int]) -> dict[str, Any]:
        """What bitsandbytes saves beside a 4-bit weight of this logical shape."""
        return {**self._state, "shape": list(shape)}

    def part(
        self, weight: str, fmt: str, part: Part, shape: Sequence[int], random: Random
    ) -> Iterator[memoryview]:
        """The bytes of one stored tensor, a bounded number at a time."""
        nbytes = part.entry.nbytes
        if fmt == "raw":
            assert part.entry.dtype == "BF16", part
            if len(shape) > 1:
                yield from self._from_pool("bf16", nbytes, random)
                return
            fill = 1.0 if weight.endswith("weight") else 0.0
            yield _bytes_of(torch.full(tuple(shape), fill, dtype=torch.bfloat16))
        elif part.role == "code":
            yield _bytes_of(self._code)
        elif part.role == "state":
            yield memoryview(json.dumps(self.state(shape)).encode().ljust(STATE_BYTES))
        elif part.role == "layout":
            yield memoryview(bytes(nbytes))
        elif part.role == "zero":
            yield memoryview(b"\x08" * nbytes)
        else:
            pool = "noise" if part.role == "data" else part.role
            pool = "int4 scale" if (fmt, pool) == ("int4", "scale") else pool
            yield from self._from_pool(pool, nbytes, random)

    def _from_pool(self, name: str, nbytes: int, random: Random) -> Iterator[memoryview]:
        pool = self._pools[name]
        while nbytes:
            size = min(nbytes, CHUNK_BYTES, len(pool))
            start = random.randrange((len(pool) - size) // 4 + 1) * 4
            yield pool[start : start + size]
            nbytes -= size


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data
