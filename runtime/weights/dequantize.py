"""4-bit bytes to values, written where the caller says.

bitsandbytes has no such form for CPUs: its operator allocates every result, and touching fresh
pages costs more than the work (8192 x 2048 to float32: 32 ms, of which the kernel is 5).
"""

import ctypes

import torch
from torch import Tensor

from headrace.runtime.bnb import lib

_KERNEL_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def dequantize_4bit(
    packed: Tensor, scales: Tensor, blocksize: int, kind: str, shape: tuple[int, ...], out: Tensor
) -> Tensor:
    """`packed` uint8 [elements / 2, 1] times `scales` float32 [blocks] into `out` of `shape`.

    On CPUs each row begins a block of scales, so rows must be whole blocks or a single one.
    """
    columns = shape[-1]
    dtype = _KERNEL_TYPES.get(out.dtype)
    if packed.is_cuda:
        torch.ops.bitsandbytes.dequantize_4bit.out(
            packed, scales, blocksize, kind, shape, out.dtype, out=out
        )
    elif dtype is None or columns % 2 or blocksize >= 2048:
        # Where bitsandbytes, too, leaves its vector kernel: it would be wrong.
        operator = torch.ops.bitsandbytes.dequantize_4bit
        out.copy_(operator(packed, scales, blocksize, kind, shape, out.dtype))
    else:
        assert packed.is_contiguous() and scales.is_contiguous() and out.is_contiguous()
        kernel = getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{dtype}")
        kernel(
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(scales.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_longlong(blocksize),
            ctypes.c_longlong(out.numel() // columns),
            ctypes.c_longlong(columns),
        )
    return out
