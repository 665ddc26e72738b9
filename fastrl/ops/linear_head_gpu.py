"""linear_logprobs and linear_cross_entropy on a GPU: the library multiplies, row kernels do what lies between.

A chunk of rows at a time: logits = x @ weight.T with the product's float32 sums as they are (bfloat16 logits would
quantise log-probs at 0.03); the row kernel reads them and writes the gradient of every row's log-prob with respect to
its logits, in the dtype to multiply in; direction = gradient @ weight. Chunks share one workspace, whose size is
bounded by WORKSPACE_BYTES and does not depend on the GPU. A LoRA adapter and a bias are further columns, multiplied
first, so that the product with the weight adds to what they wrote: [scaling * x @ lora_a.T, 1] @ [lora_b, bias].T.

With a mask, the kept rows are selected before anything is multiplied; their number is the one value that the host waits
for. Inside a CUDA graph capture nothing may wait: all rows are multiplied, and the row kernels skip the dropped ones.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastrl.checks import debugging
from fastrl.ops.backend import address, launch_cuda, rows, triton_kernel
from fastrl.reference.token_logprobs import check_range

# Bytes of a chunk's logits and their gradients. 1024 rows of a vocabulary of 128256 with gradients in 16 bits, 2048
# without: the weight is read once for so many rows, and products of so many rows occupy a large GPU.
WORKSPACE_BYTES = 1 << 30
MIN_ROWS = 128  # of a chunk; all chunks but the last are multiples of it
GRADIENT_ROWS = 8192  # of a chunk where a trained head's logits are formed again, a block of the vocabulary at a time


class Rows(NamedTuple):
    """Rows that are multiplied."""

    hidden: torch.Tensor  # (M, H)
    inputs: torch.Tensor | None  # (M, k): scaling * hidden @ lora_a.T, and ones; what Head.columns is multiplied with
    token_ids: torch.Tensor
    mask: torch.Tensor | None  # for the row kernels; None if all rows are kept

    def span(self, begin: int, end: int) -> Rows:
        return Rows(*(None if tensor is None else tensor[begin:end] for tensor in self))  # type: ignore[arg-type]


class Head(NamedTuple):
    """The head's parameters, or a block of its vocabulary."""

    weight: torch.Tensor  # (V, H)
    columns: torch.Tensor | None  # (V, k): lora_b, bias, zeros up to a multiple of 8, so that rows are aligned
    rank: int  # columns of lora_b

    def block(self, begin: int, end: int) -> Head:
        return Head(self.weight[begin:end], None if self.columns is None else self.columns[begin:end], self.rank)


def forward(
    backend, hidden, weight, token_ids, mask, bias, lora_a, lora_b, scaling, temperature, softcap,
    logprobs, row_stats, entropy, direction, entropy_direction,
    upstream=None, dweight=None, dbias=None, dlora_b=None,
):  # fmt: skip
    """See linear_head_cpu.forward. A token id outside the vocabulary makes its row NaN; FASTRL_DEBUG=1 raises."""
    outputs = (logprobs, row_stats, entropy, direction, entropy_direction)
    head = _head(weight, bias, lora_b)
    kept, batch = _select(hidden, token_ids, mask, head, lora_a, scaling)
    if debugging():
        check_range(_where(batch.mask, batch.token_ids), len(weight), "linear_logprobs")
    count = len(batch.token_ids)
    found = [o if o is None or kept is None else o.new_empty((count, *o.shape[1:])) for o in outputs]
    totals = _Totals(head, dweight, dbias, dlora_b)
    copies = 2 if entropy_direction is not None else int(direction is not None or upstream is not None)
    logits, *gradients = _workspace(count, len(weight), copies, hidden)
    for begin, end in _spans(count, len(logits)):
        size = end - begin
        part, results = batch.span(begin, end), [None if o is None else o[begin:end] for o in found]
        padded = len(logits) if batch_invariant() else size
        _multiply_head(head, part, logits[:padded])
        row_kernel(
            backend, logits[:size], part.token_ids, part.mask, temperature, softcap, *results[:3],
            *(gradient[:size] for gradient in gradients), *[None] * (2 - copies),
        )  # fmt: skip
        for gradient, out in zip(gradients, results[3:], strict=False):
            if out is not None:
                _direction(head, gradient[:padded], lora_a, scaling, out)
        if upstream is not None:
            totals.add(gradients[0][:size], part)
    if upstream is not None:
        totals.finish(upstream)
    if kept is not None:
        for output, result in zip(outputs, found, strict=True):
            if output is not None:
                output.zero_().index_copy_(0, kept, result)


def backward_weights(
    backend, hidden, weight, token_ids, mask, bias, lora_a, lora_b, scaling, temperature, softcap,
    row_stats, logprobs, entropy, dlogprobs, dentropy, dweight, dbias, dlora_b,
):  # fmt: skip
    """See linear_head_cpu.backward_weights.

    Blocks of the vocabulary outside, chunks of rows inside: of up to GRADIENT_ROWS rows, the product itself sums a
    block's gradient over all rows in float32 and rounds it once, and nothing as large as the weight is kept beside it.
    """
    head = _head(weight, bias, lora_b)
    kept, batch = _select(hidden, token_ids, mask, head, lora_a, scaling)
    per_row = [
        tensor if tensor is None or kept is None else tensor.index_select(0, kept)
        for tensor in (row_stats, logprobs, entropy, dlogprobs, dentropy)
    ]
    count = len(batch.token_ids)
    at_most = min(max(count, 1), GRADIENT_ROWS)
    columns = WORKSPACE_BYTES // (at_most * _element_bytes(1, hidden)) // MIN_ROWS * MIN_ROWS
    blocks = list(_spans(len(weight), max(columns, MIN_ROWS)))
    logits, gradient = _workspace_of(at_most, blocks[0][1], 1, hidden, may_shrink=True)
    spans = list(_spans(count, len(logits)))
    for begin, end in blocks:
        block = head.block(begin, end)
        dw, db, dl = (None if g is None else g[begin:end] for g in (dweight, dbias, dlora_b))
        totals = _Totals(block, dw, db, dl, chunks=len(spans))
        for start, stop in spans:
            part = batch.span(start, stop)
            z, dz = logits[: stop - start, : end - begin], gradient[: stop - start, : end - begin]
            _multiply_head(block, part, z)
            gradient_kernel(
                backend, z, part.token_ids, part.mask, begin, *(None if t is None else t[start:stop] for t in per_row),
                temperature, softcap, dz,
            )  # fmt: skip
            totals.add(dz, part)
        totals.finish()


def backward_hidden(direction, entropy_direction, mask, dlogprobs, dentropy, dinputs):
    """See linear_head_cpu.backward_hidden; the directions of dropped rows are 0."""
    by_logprob = direction, _where(mask, dlogprobs)[:, None]
    if dentropy is None:
        torch.mul(*by_logprob, out=dinputs)
    else:
        torch.add(torch.mul(*by_logprob), entropy_direction * _where(mask, dentropy)[:, None], out=dinputs)


def batch_invariant() -> bool:
    """Whether FASTRL_BATCH_INVARIANT=1 asks for rows whose bits do not depend on the other rows of the call.

    A library picks its kernel, and with it the order of a row's sums, by the shape of the product. In this mode every
    product has the same shape: chunks of as many rows as the vocabulary and dtype allow, with or without gradients, the
    last one filled up with zeros. What remains to the library is that a kernel sums all rows in one order, which holds
    for kernels that split the inner dimension evenly. A few rows then cost as much as a chunk.
    """
    return os.environ.get("FASTRL_BATCH_INVARIANT", "") not in ("", "0")


def _select(hidden, token_ids, mask, head, lora_a, scaling) -> tuple[torch.Tensor | None, Rows]:
    """The indices of the kept rows, None if no row is left out, and the rows that are multiplied."""
    kept = None
    if mask is not None and _capturing(hidden):
        hidden = _where(mask[:, None], hidden)
    elif mask is not None:
        kept = mask.nonzero()[:, 0]  # waits for the GPU
        if len(kept) == len(mask):
            kept = None
        else:
            hidden, token_ids = hidden.index_select(0, kept), token_ids.index_select(0, kept)
        mask = None
    return kept, Rows(hidden, _inputs(head, hidden, lora_a, scaling), token_ids, mask)


def _capturing(tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _where(mask, tensor):
    return tensor if mask is None else torch.where(mask, tensor, 0)


def _head(weight, bias, lora_b) -> Head:
    parts = [part for part in (lora_b, None if bias is None else bias[:, None]) if part is not None]
    if not parts:
        return Head(weight, None, 0)
    columns = torch.cat([part.to(weight.dtype) for part in parts], 1)
    return Head(weight, F.pad(columns, (0, -columns.shape[1] % 8)), 0 if lora_b is None else lora_b.shape[1])


def _inputs(head, hidden, lora_a, scaling):
    if head.columns is None:
        return None
    inputs = hidden.new_ones(len(hidden), head.columns.shape[1])  # the columns of zeros take ones as well
    if lora_a is not None:
        inputs[:, : head.rank] = torch.mm(hidden, lora_a.to(hidden.dtype).t()).mul_(scaling)
    return inputs


def _multiply_head(head, batch, logits):
    """logits = hidden @ weight.T + inputs @ columns.T; rows of `logits` beyond the batch's are of zeros."""
    missing = (0, 0, 0, len(logits) - len(batch.hidden))
    hidden = F.pad(batch.hidden, missing) if missing[3] else batch.hidden
    if batch.inputs is None:
        _multiply(hidden, head.weight.t(), logits)
    else:
        _multiply(F.pad(batch.inputs, missing) if missing[3] else batch.inputs, head.columns.t(), logits)
        _add_product(hidden, head.weight.t(), logits)


def _direction(head, gradient, lora_a, scaling, out):
    """out (n, H + r) = gradient @ [weight, lora_b], and what reaches hidden through the adapter added to it."""
    size, width = out.shape
    if head.rank == 0 and len(gradient) == size:
        return _multiply(gradient, head.weight, out)
    # In float32 where two products are added; of all rows where the chunk is filled up.
    full = out.new_empty(len(gradient), width, dtype=out.dtype if head.rank == 0 else torch.float32)
    hidden, inner = full.split([width - head.rank, head.rank], 1)
    _multiply(gradient, head.weight, hidden)
    if head.rank > 0:
        _multiply(gradient, head.columns[:, : head.rank], inner)
        hidden.addmm_(inner, lora_a.float(), alpha=scaling)
    out.copy_(full[:size])


class _Totals:
    """The parameters' gradients dlogits.T @ [hidden, inputs], summed in float32 over chunks of rows."""

    def __init__(self, head, dweight, dbias, dlora_b, chunks=None):
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (gradient, its sum)
        self.weight = self.columns = None
        self.empty = True
        if dweight is not None:  # the product rounds one chunk itself
            in_place = chunks == 1 or dweight.dtype == torch.float32
            self.weight = dweight if in_place else torch.empty_like(dweight, dtype=torch.float32)
            self.outputs.append((dweight, self.weight))
        if dbias is not None or dlora_b is not None:
            self.columns = torch.empty_like(head.columns, dtype=torch.float32)
            of_lora_b, of_bias = self.columns[:, : head.rank], self.columns[:, head.rank]
            self.outputs += [(g, t) for g, t in ((dlora_b, of_lora_b), (dbias, of_bias)) if g is not None]

    def add(self, dlogits, batch):
        for total, x in ((self.weight, batch.hidden), (self.columns, batch.inputs)):
            if total is not None:
                (_multiply if self.empty else _add_product)(dlogits.t(), x, total)
        self.empty = False

    def finish(self, factor=None):
        """Hands the sums, times a 0-d tensor if given, to the gradients that they belong to."""
        for gradient, total in self.outputs:
            if self.empty:
                gradient.zero_()
            elif factor is not None:
                torch.mul(total, factor, out=gradient)
            elif gradient is not total:
                gradient.copy_(total)


def _multiply(a, b, out):
    """out = a @ b, of 16-bit matrices also in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # torch has that on GPUs alone
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(a, b, out):
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


def _workspace(count, vocab, copies, like):
    """Buffers for a chunk of at most `count` rows: see `_workspace_of`. Their length is the chunk's."""
    element = 4 + 2 * like.element_size() if batch_invariant() else _element_bytes(copies, like)
    at_most = max(MIN_ROWS, WORKSPACE_BYTES // (vocab * element))
    at_most = 1 << (at_most.bit_length() - 1)
    if batch_invariant():
        return _workspace_of(at_most, vocab, copies, like)
    return _workspace_of(min(at_most, count), vocab, copies, like, may_shrink=True)


def _element_bytes(copies, like):
    """Bytes of a logit and its gradients; the first of float32 gradients takes the place of the logits."""
    return 4 + like.element_size() * copies - (4 if copies and like.dtype == torch.float32 else 0)


def _workspace_of(count, columns, copies, like, may_shrink=False):
    """float32 logits (count, columns) and `copies` matrices for their gradients in the dtype of `like`.

    A row takes a multiple of 64 elements, so that every row is aligned whatever the vocabulary. If memory is short and
    the rows may be fewer, their number is halved down to MIN_ROWS.
    """
    stride = -(-columns // 64) * 64
    in_place = copies > 0 and like.dtype == torch.float32
    while True:
        try:
            logits = torch.empty(count, stride, dtype=torch.float32, device=like.device)
            others = [
                torch.empty(count, stride, dtype=like.dtype, device=like.device) for _ in range(copies - in_place)
            ]
            return [buffer[:, :columns] for buffer in [logits] * (1 + in_place) + others]
        except torch.OutOfMemoryError as error:
            if not may_shrink or count <= MIN_ROWS:
                raise torch.OutOfMemoryError(_no_memory(count, columns, copies, like)) from error
        count = max(MIN_ROWS, count // 2)


def _no_memory(count, columns, copies, like):
    asked = count * columns * _element_bytes(copies, like) >> 20
    free = torch.cuda.mem_get_info(like.device)[0] >> 20 if like.is_cuda else 0
    return (
        f"linear head: workspace: expected {asked} MiB for {count} rows of {columns} logits, got {free} MiB free on "
        f"{like.device}; free memory on the device, e.g. with a smaller batch or torch.cuda.empty_cache()"
    )


def _spans(length: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Spans that cover range(length), none longer than the first; nearly equal multiples of MIN_ROWS where that may be.

    In batch-invariant mode all but the last are `at_most` long.
    """
    step = at_most
    if length > at_most and not batch_invariant():
        step = -(-length // -(-length // at_most))
        step = min(at_most, -(-step // MIN_ROWS) * MIN_ROWS)
    for begin in range(0, length, max(step, 1)):
        yield begin, min(begin + step, length)


def on_each_backend(function) -> dict[str, Callable[..., None]]:
    """`function`, whose first argument is the backend of the row kernels, as an op's table of kernels."""
    return {backend: functools.partial(function, backend) for backend in _ROW_KERNELS}


def row_kernel(backend, *args) -> None:
    """See linear_head_rows in kernels/linear_head.py."""
    _ROW_KERNELS[backend](*args)


def gradient_kernel(backend, *args) -> None:
    """See linear_head_gradient in kernels/linear_head.py."""
    _GRADIENT_KERNELS[backend](*args)


def _rows_cuda(logits, token_ids, mask, temperature, softcap, logprobs, row_stats, entropy, out, entropy_out):
    launch_cuda(
        "linear_head_rows", logits, rows(logits), address(token_ids), address(mask), *logits.shape, 1.0 / temperature,
        softcap, address(logprobs), address(row_stats), address(entropy), _rows_or_none(out),
        _rows_or_none(entropy_out),
    )  # fmt: skip


def _gradient_cuda(
    logits, token_ids, mask, begin, row_stats, logprobs, entropy, dlogprobs, dentropy, temperature, softcap, out
):
    launch_cuda(
        "linear_head_gradient", logits, rows(logits), address(token_ids), address(mask), begin, *logits.shape,
        address(row_stats), address(logprobs), address(None if dentropy is None else entropy), address(dlogprobs),
        address(dentropy), 1.0 / temperature, softcap, rows(out),
    )  # fmt: skip


def _rows_or_none(tensor):
    return (0, 0, 1, 0, 0) if tensor is None else rows(tensor)


_ROW_KERNELS = {"cuda": _rows_cuda, "triton": triton_kernel("linear_head", "linear_head_rows")}
_GRADIENT_KERNELS = {"cuda": _gradient_cuda, "triton": triton_kernel("linear_head", "linear_head_gradient")}
