"""What linear_head_gpu.py computes with: chunks of rows, their workspace, and products with float32 results."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch

# Bytes of a chunk's logits and their gradients. 2048 rows of a vocabulary of 128256, or 1024 where gradients of 16 bits
# have memory of their own: the weight is read once for so many, and products of so many occupy a large GPU.
WORKSPACE_BYTES = 1 << 30
MIN_ROWS = 128  # of a chunk; all chunks but the last are multiples of it
BLOCK_ROWS = 8192  # at most, of a chunk that goes with a block of the vocabulary


def batch_invariant() -> bool:
    """Whether FASTRL_BATCH_INVARIANT=1 asks for rows whose bits do not depend on the other rows of the call.

    A library picks its kernel, and with it the order of a row's sums, by the shape of the product. In this mode every
    product has the same shape: chunks of as many rows as the vocabulary and dtype allow, with or without gradients, the
    last one filled up with zeros. What remains to the library is that a kernel sums all rows in one order, which holds
    for kernels that split the inner dimension evenly. A few rows then cost as much as a chunk.
    """
    return os.environ.get("FASTRL_BATCH_INVARIANT", "") not in ("", "0")


def workspace(count, vocab, copies, like, in_place=False):
    """Buffers for a chunk of at most `count` rows: see `_buffers`. Their length is the chunk's."""
    element = 4 + 2 * like.element_size() if batch_invariant() else _element_bytes(copies, like, in_place)
    at_most = max(MIN_ROWS, WORKSPACE_BYTES // (vocab * element))
    at_most = 1 << (at_most.bit_length() - 1)
    if batch_invariant():
        return _buffers(at_most, vocab, copies, like, in_place)
    return _buffers(min(at_most, count), vocab, copies, like, in_place, may_shrink=True)


def block_workspace(count, vocab, like):
    """Logits and one gradient of a chunk of at most `count` rows and a block of the vocabulary: see `_buffers`."""
    at_most = min(max(count, 1), BLOCK_ROWS)
    columns = WORKSPACE_BYTES // (at_most * _element_bytes(1, like, in_place=False)) // MIN_ROWS * MIN_ROWS
    (_, columns), *_ = spans(vocab, max(columns, MIN_ROWS))
    return _buffers(at_most, columns, 1, like, may_shrink=True)


def _copies_within(copies, like, in_place):
    """How many of a row's gradients lie in the memory of its logits: of float32 ones the first, of 16 bits both."""
    return min(copies, 1) if like.dtype == torch.float32 else copies * in_place


def _element_bytes(copies, like, in_place):
    """Bytes of a logit and its gradients."""
    return 4 + like.element_size() * (copies - _copies_within(copies, like, in_place))


def _buffers(count, columns, copies, like, in_place=False, may_shrink=False):
    """float32 logits (count, columns) and `copies` matrices for their gradients in the dtype of `like`.

    A row takes a multiple of 64 elements, so that every row is aligned whatever the vocabulary. `in_place`: gradients
    of 16 bits take the memory of their logits, one behind the other. If memory is short and the rows may be fewer,
    their number is halved down to MIN_ROWS.
    """
    stride = -(-columns // 64) * 64
    within = _copies_within(copies, like, in_place)
    dtypes = [torch.float32] + [like.dtype] * (copies - within)
    while True:
        buffers: list[torch.Tensor] = []
        try:
            for dtype in dtypes:
                buffers.append(torch.empty(count, stride, dtype=dtype, device=like.device))
            parts = list(buffers[0].view(like.dtype).split(stride, 1)) if within else []
            return [buffer[:, :columns] for buffer in (buffers[0], *parts[:within], *buffers[1:])]
        except torch.OutOfMemoryError as error:
            if not may_shrink or count <= MIN_ROWS:
                raise torch.OutOfMemoryError(_no_memory(count, columns, dtypes, like)) from error
        buffers.clear()  # what was had of them counts in the next attempt
        count = max(MIN_ROWS, count // 2)


def _no_memory(count, columns, dtypes, like):
    asked = count * columns * sum(dtype.itemsize for dtype in dtypes) >> 20
    free = torch.cuda.mem_get_info(like.device)[0] >> 20 if like.is_cuda else 0
    return (
        f"linear head: workspace: expected {asked} MiB for {count} rows of {columns} logits, got {free} MiB free on "
        f"{like.device}; free memory on the device, e.g. with a smaller batch or torch.cuda.empty_cache()"
    )


def spans(length: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Spans that cover range(length), none longer than the first; nearly equal multiples of MIN_ROWS where that may be.

    In batch-invariant mode all but the last are `at_most` long.
    """
    step = at_most
    if length > at_most and not batch_invariant():
        step = -(-length // -(-length // at_most))
        step = min(at_most, -(-step // MIN_ROWS) * MIN_ROWS)
    for begin in range(0, length, max(step, 1)):
        yield begin, min(begin + step, length)


def multiply(a, b, out):
    """out = a @ b, of 16-bit matrices also in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # torch has that on GPUs alone
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(a, b, out):
    """out += a @ b, of 16-bit matrices also in float32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    elif not out.is_cuda:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)
    elif _adds_to_float32():
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@functools.cache
def _adds_to_float32() -> bool:
    """Whether this torch adds a product of 16-bit matrices to a float32 one; the first with out_dtype do not."""
    x = torch.zeros(8, 8, dtype=torch.bfloat16, device="cuda")
    total = x.float()
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
