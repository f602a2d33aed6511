"""Few rows times 4-bit weights, on CUDA: out = x W^T, on the bytes as bitsandbytes stores them.

The weight is the left operand (out^T = W x^T): its decoded values go from registers to the tensor
cores, and few rows cost a narrow right operand. A program owns BLOCK_N output columns and a part of
K; parts are summed afterwards in a fixed order, so that results do not change from run to run.
Weights that multiply the same rows share a launch: each program finds out which is its own.

A step reads [BLOCK_N, WORDS] words of eight codes and decodes them to eight planes of
[BLOCK_N, WORDS] values, see decode_4bit; the scale is multiplied in before the product, as in
dequantizing. Runs on CPUs with TRITON_INTERPRET=1, where the decoding is arithmetic instead of PTX.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import AsyncCompileMode

from headrace.runtime.matmul.configs import Codes, Config, Product, bucket
from headrace.runtime.matmul.decode_4bit import WORD, decoding, magic, table

SUM_BLOCK, ORDER_BLOCK = 512, 1024
"""Elements that a program sums, and puts in order."""


@triton.jit(do_not_specialize=["rows"])
def _order_kernel(
    x, out, rows, row_stride, depth, AFFINE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [padded rows, K]: each row in the order of the decoded planes, zero beyond the last row."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane = at // WORDS % 8
    word = at // (8 * WORDS) * WORDS + at % WORDS
    i = plane % 4
    place = 4 * (word % 2) + (i ^ 1) if AFFINE else 2 * i + word % 2
    k = 16 * (word // 2) + 8 * (plane // 4) + place
    filled = tl.where(row < rows, depth, 0)
    values = tl.load(x + row.to(tl.int64) * row_stride + k, mask=at < filled, other=0.0)
    tl.store(out + row.to(tl.int64) * depth + at, values, mask=at < depth)


@triton.jit
def _group(step, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """The first group of a row's words from WORDS * step on."""
    if 8 * WORDS >= GROUP:
        return step * (8 * WORDS // GROUP)
    else:
        return step // (GROUP // (8 * WORDS))


@triton.jit
def _widen(scale, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """[BLOCK_N, GROUPS] -> [BLOCK_N, WORDS], each repeated."""
    wide = tl.broadcast_to(scale[:, :, None], (BLOCK_N, GROUPS, WORDS // GROUPS))
    return tl.reshape(wide, (BLOCK_N, WORDS))


@triton.jit
def _planes(
    words, scale, minus, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, ZEROS: tl.constexpr
):  # fmt: skip
    """Eight times [BLOCK_N, WORDS] values from [BLOCK_N, WORDS] words, by PTX.

    It takes two neighbouring words at a time, which are a thread's in every layout that the load of
    rows of words, and the tensor cores' left operand, have.
    """
    if ZEROS:
        return tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words, scale, minus], (scale.dtype,) * 8, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words, scale], (scale.dtype,) * 8, is_pure=True, pack=2
        )


@triton.jit
def _arithmetic(
    words, scale, zero, table_at, PLANE: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What the PTX does, for the interpreter: one plane [BLOCK_N, WORDS]."""
    first, second = tl.split(tl.reshape(words, (BLOCK_N, WORDS // 2, 2)))
    source = first if PLANE < 4 else second
    i: tl.constexpr = PLANE % 4
    if AFFINE:
        code = tl.join(source >> (4 * i), source >> (4 * i + 16)) & 15
        code = tl.reshape(code, (BLOCK_N, WORDS))
        value = code.to(tl.float32) + zero
    else:
        code = tl.join(source >> (8 * i + 4), source >> (8 * i)) & 15
        code = tl.reshape(code, (BLOCK_N, WORDS))
        low = tl.load(table_at.to(tl.pointer_type(tl.uint8)) + code).to(tl.uint16)
        high = tl.load(table_at.to(tl.pointer_type(tl.uint8)) + 16 + code).to(tl.uint16)
        value = (low | (high << 8)).to(DTYPE, bitcast=True).to(tl.float32)
    return (value * scale.to(tl.float32)).to(DTYPE)


@triton.jit
def _decoded(
    words, scale, minus, table_at, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    AFFINE: tl.constexpr, ZEROS: tl.constexpr, MAGIC: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, 8 * WORDS] values from [BLOCK_N, WORDS] words: one plane beside the other.

    In the operand's layout planes differ in registers only, so that putting them side by side moves
    nothing, and one product of a step is many instructions that do not wait for each other.
    """
    if ASM != "":
        p = _planes(words, scale, minus, ASM, CONSTRAINTS, ZEROS)
    else:
        DTYPE: tl.constexpr = scale.dtype
        zero = minus.to(tl.float32) + MAGIC if ZEROS else -8.0
        p = (
            _arithmetic(words, scale, zero, table_at, 0, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 1, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 2, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 3, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 4, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 5, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 6, AFFINE, BLOCK_N, WORDS, DTYPE),
            _arithmetic(words, scale, zero, table_at, 7, AFFINE, BLOCK_N, WORDS, DTYPE),
        )
    low = tl.join(tl.join(p[0], p[1]), tl.join(p[2], p[3]))
    high = tl.join(tl.join(p[4], p[5]), tl.join(p[6], p[7]))
    planes = tl.permute(tl.join(low, high), (0, 4, 3, 2, 1))
    return tl.reshape(planes, (BLOCK_N, 8 * WORDS))


@triton.jit
def _of_tile(
    x, packed, scales, zeros, biases, widths,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's weight, its N, which of its tiles, the column of all products that it begins with, and how
    many columns there are."""
    tile = tl.program_id(0)
    packed_at, scales_at, columns = packed[0], scales[0], widths[0]
    zeros_at = zeros[0] if ZEROS else scales_at
    bias_at = biases[0] if BIAS else x
    first, total = 0, widths[0]
    begin, programs = 0, tl.cdiv(widths[0], BLOCK_N)
    for i in tl.static_range(1, COUNT):
        here = tile >= programs
        packed_at = tl.where(here, packed[i], packed_at)
        scales_at = tl.where(here, scales[i], scales_at)
        if ZEROS:
            zeros_at = tl.where(here, zeros[i], zeros_at)
        if BIAS:
            bias_at = tl.where(here, biases[i], bias_at)
        columns = tl.where(here, widths[i], columns)
        first = tl.where(here, total, first)
        begin = tl.where(here, programs, begin)
        total += widths[i]
        programs += tl.cdiv(widths[i], BLOCK_N)
    return packed_at, scales_at, zeros_at, bias_at, columns, tile - begin, first, total


@triton.jit(do_not_specialize=["rows", "splits"])
def _matmul_kernel(
    x, packed, scales, zeros, biases, widths, table_at, out, rows, depth, scales_a_row, splits,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, AFFINE: tl.constexpr, ZEROS: tl.constexpr,
    MAGIC: tl.constexpr, GROUP: tl.constexpr, PARTIAL: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    WORDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one of COUNT products, from one part of K; x [BLOCK_M, K] is in the order
    of planes.

    The first five after x are tuples, one entry a weight; `widths` are their N. `depth` is K / 8, in
    words. `out` holds one [rows, N] after another, and that once for each part.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    part = tl.program_id(1)
    packed_at, scales_at, zeros_at, bias_at, columns, tile, first, total = _of_tile(
        x, packed, scales, zeros, biases, widths, ZEROS, BIAS, COUNT, BLOCK_N
    )
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    word = tl.arange(0, WORDS)
    steps = depth // WORDS
    # Columns past the end repeat the last one and are not stored.
    row = n if EVEN else tl.minimum(n, columns - 1)
    words_at = packed_at + row[:, None].to(tl.int64) * depth + word[None, :]
    of_row = row[:, None] * scales_a_row + tl.arange(0, GROUPS)[None, :]
    x_at = x + m[:, None] * (8 * depth) + tl.arange(0, 8 * WORDS)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # A thread has under four bytes of zero points, which cannot be copied asynchronously: read a step
    # ahead nothing waits for them. Where a step has one group, that would cost a better layout.
    AHEAD: tl.constexpr = ZEROS and GROUPS > 1
    start = part * steps // splits
    if AHEAD:
        zero = tl.load(zeros_at + of_row + _group(start, GROUP, WORDS))
    for step in range(start, (part + 1) * steps // splits):
        words = tl.load(words_at + step * WORDS)
        scale = tl.load(scales_at + of_row + _group(step, GROUP, WORDS))
        scale = _widen(scale.to(DTYPE), GROUPS, BLOCK_N, WORDS)
        minus = scale
        if ZEROS:
            if not AHEAD:
                zero = tl.load(zeros_at + of_row + _group(step, GROUP, WORDS))
            minus = _widen((-MAGIC - zero.to(tl.float32)).to(DTYPE), GROUPS, BLOCK_N, WORDS)
        if AHEAD:
            after = _group(tl.minimum(step + 1, steps - 1), GROUP, WORDS)
            zero = tl.load(zeros_at + of_row + after)
        left = _decoded(
            words, scale, minus, table_at, ASM, CONSTRAINTS, AFFINE, ZEROS, MAGIC, BLOCK_N, WORDS
        )  # fmt: skip
        right = tl.load(x_at + 8 * WORDS * step)
        if ASM == "":
            # The interpreter's products take bfloat16 for integers.
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, tl.trans(right), acc)
    if BIAS:
        bias = tl.load(bias_at + row).to(tl.float32)
        acc += tl.where(part == 0, bias, 0.0)[:, None]
    keep = (m < rows)[None, :] & (n < columns)[:, None]
    to = out + rows * first + m[None, :] * columns + n[:, None]
    if PARTIAL:
        to += part * rows * total
    tl.store(to, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["elements", "splits"])
def _sum_kernel(parts, out, elements, splits, BLOCK: tl.constexpr):
    """The parts of K in ascending order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(splits):
        total += tl.load(parts + part * elements + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def matmul(x: Tensor, codes: Codes, bias: Tensor | None, config: Config) -> Tensor:
    """x [..., K] times `codes` [N, K], plus bias [N]: [..., N] in the type of x.

    `supports` and `fits` (in configs) say what may be asked for.
    """
    return matmuls(x, [codes], None if bias is None else [bias], config)[0]


def matmuls(
    x: Tensor, weights: Sequence[Codes], biases: Sequence[Tensor] | None, config: Config
) -> tuple[Tensor, ...]:
    """x [..., K] times each of `weights` [N, K], which differ in nothing but N, in one launch.

    All have a bias [N] or none has. The products share their memory.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows, widths = len(flat), [codes.shape[0] for codes in weights]
    ordered = _ordered(flat, bucket(rows), weights[0].kind == "int4", config.words)
    elements = rows * sum(widths)
    out = x.new_empty(elements)
    tiles = sum(triton.cdiv(width, config.columns) for width in widths)
    run = _matmul_kernel[(tiles, config.splits)]
    if config.splits == 1:
        _launch(run, ordered, weights, biases, out, rows, config)
    else:
        parts = out.new_empty(config.splits * elements, dtype=torch.float32)
        _launch(run, ordered, weights, biases, parts, rows, config)
        grid = (triton.cdiv(elements, SUM_BLOCK),)
        _sum_kernel[grid](parts, out, elements, config.splits, BLOCK=SUM_BLOCK, num_warps=4)
    pieces = out.split([rows * width for width in widths])
    return tuple(p.view(*x.shape[:-1], n) for p, n in zip(pieces, widths, strict=True))


def _ordered(x: Tensor, rows: int, affine: bool, words: int) -> Tensor:
    """x [M, K] as [rows, K], in the order of planes of `words` words; see decode_4bit."""
    if x.stride(1) != 1:
        x = x.contiguous()
    depth, block = x.shape[1], ORDER_BLOCK
    out = x.new_empty(rows, depth)
    _order_kernel[(rows, triton.cdiv(depth, block))](
        x, out, len(x), x.stride(0), depth, AFFINE=affine, WORDS=words, BLOCK=block, num_warps=4
    )
    return out


def compile_ahead(
    device: torch.device,
    jobs: Iterable[tuple[Product, int, Config]],
    dtype: torch.dtype,
    threads: int,
) -> None:
    """Compile what products run for so many rows, in threads. What fails fails again when it runs.

    Triton releases the interpreter's lock for most of the time, and what it compiles depends on
    types, sizes and alignment, not on values: tensors of a few bytes will do.
    """
    x = torch.empty(1, dtype=dtype, device=device)
    parts = torch.empty(1, dtype=torch.float32, device=device)
    packed = torch.empty(4, dtype=torch.uint8, device=device)
    run = partial(_matmul_kernel.warmup, grid=(1,))
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for product, rows, config in jobs:
            scales = torch.empty(1, dtype=product.scales, device=device)
            zeros = packed if product.zeros else None
            weights = [
                Codes(product.kind, packed, scales, product.group, (width, product.depth), zeros)
                for width in product.widths
            ]
            whole = config.splits == 1
            biases = [x] * len(weights) if product.biased else None
            _launch(run, x, weights, biases, x if whole else parts, rows, config)


def _launch(
    run: Callable[..., object], ordered: Tensor, weights: Sequence[Codes],
    biases: Sequence[Tensor] | None, out: Tensor, rows: int, config: Config,
) -> None:  # fmt: skip
    first = weights[0]
    depth, widths = first.shape[1], tuple(codes.shape[0] for codes in weights)
    how = decoding(first.kind, ordered.dtype, first.zeros is not None)
    asm = how.asm if ordered.is_cuda else ""
    look_up = not how.affine and not asm
    run(
        ordered,
        tuple(codes.packed.view(-1).view(torch.int32) for codes in weights),
        tuple(codes.scales for codes in weights),
        tuple(codes.zeros for codes in weights) if how.zeros else None,
        None if biases is None else tuple(biases),
        widths,
        table(first.kind, ordered.dtype) if look_up else None,
        out, rows, depth // WORD, depth // first.group, config.splits,
        ASM=asm, CONSTRAINTS=how.constraints,
        AFFINE=how.affine, ZEROS=how.zeros, MAGIC=magic(ordered.dtype), GROUP=first.group,
        PARTIAL=config.splits > 1, EVEN=all(n % config.columns == 0 for n in widths),
        BIAS=biases is not None, COUNT=len(weights),
        BLOCK_N=config.columns, BLOCK_M=bucket(rows), WORDS=config.words,
        GROUPS=max(1, WORD * config.words // first.group),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
