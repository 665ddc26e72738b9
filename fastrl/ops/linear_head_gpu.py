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
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastrl.checks import capturing, check_range, debugging
from fastrl.ops.linear_head_chunks import (
    MIN_ROWS,
    add_product,
    batch_invariant,
    block_workspace,
    multiply,
    spans,
    workspace,
)
from fastrl.ops.native import ask_cuda, launch_cuda, row_layout, triton_kernel


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
    logprobs, row_stats, entropy, top1, direction, entropy_direction,
    upstream=None, dweight=None, dbias=None, dlora_b=None,
):  # fmt: skip
    """See linear_head_cpu.forward. A token id outside the vocabulary makes its row NaN; FASTRL_DEBUG=1 raises."""
    outputs = (logprobs, row_stats, entropy, top1, direction, entropy_direction)
    head = _head(weight, bias, lora_b)
    kept, batch = _select(hidden, token_ids, mask, head, lora_a, scaling)
    if debugging():
        check_range(_where(batch.mask, batch.token_ids), len(weight), "linear_logprobs")
    count = len(batch.token_ids)
    if kept is not None:
        for output in outputs:
            if output is not None:
                output.zero_()
    totals = _Totals(head, dweight, dbias, dlora_b)
    copies = 2 if entropy_direction is not None else int(direction is not None or upstream is not None)
    # The kernel reads a whole row before it writes any of it.
    in_place = copies > 0 and backend == "cuda" and ask_cuda("linear_head_on_chip", hidden, len(weight))
    logits, *gradients = workspace(count, len(weight), copies, hidden, in_place)
    for begin, end in spans(count, len(logits)):
        size = end - begin
        part, at = batch.span(begin, end), None if kept is None else kept[begin:end]
        results = [None if o is None else _rows_at(o, at, begin, end) for o in outputs]
        padded = len(logits) if batch_invariant() else size
        _multiply_head(head, part, logits[:padded])
        row_kernel(
            backend, logits[:size], part.token_ids, part.mask, temperature, softcap, *results[:4],
            *(gradient[:size] for gradient in gradients), *[None] * (2 - copies),
        )  # fmt: skip
        for gradient, out in zip(gradients, results[4:], strict=False):
            if out is not None:
                _direction(head, gradient[:padded], lora_a, scaling, out)
        if at is not None:  # a chunk's directions are still in the cache
            for output, result in zip(outputs, results, strict=True):
                if output is not None:
                    output.index_copy_(0, at, result)
        if upstream is not None:
            totals.add(gradients[0][:size], part)
    if upstream is not None:
        totals.finish(upstream)


def backward_weights(
    backend, hidden, weight, token_ids, mask, bias, lora_a, lora_b, scaling, temperature, softcap,
    row_stats, logprobs, entropy, dlogprobs, dentropy, dweight, dbias, dlora_b,
):  # fmt: skip
    """See linear_head_cpu.backward_weights.

    Blocks of the vocabulary outside, chunks of rows inside: of up to BLOCK_ROWS rows, the product itself sums a
    block's gradient over all rows in float32 and rounds it once, and nothing as large as the weight is kept beside it.
    """
    head = _head(weight, bias, lora_b)
    kept, batch = _select(hidden, token_ids, mask, head, lora_a, scaling)
    per_row = [
        tensor if tensor is None or kept is None else tensor.index_select(0, kept)
        for tensor in (row_stats, logprobs, entropy, dlogprobs, dentropy)
    ]
    count = len(batch.token_ids)
    logits, gradient = block_workspace(count, len(weight), hidden)
    chunks = list(spans(count, len(logits)))
    for begin, end in spans(len(weight), logits.shape[1]):
        block = head.block(begin, end)
        dw, db, dl = (None if g is None else g[begin:end] for g in (dweight, dbias, dlora_b))
        totals = _Totals(block, dw, db, dl, chunks=len(chunks))
        for start, stop in chunks:
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


def _select(hidden, token_ids, mask, head, lora_a, scaling) -> tuple[torch.Tensor | None, Rows]:
    """The indices of the kept rows, None if no row is left out, and the rows that are multiplied."""
    kept = None
    if mask is not None and capturing(hidden):
        hidden = _where(mask[:, None], hidden)
    elif mask is not None:
        kept = mask.nonzero()[:, 0]  # waits for the GPU
        if len(kept) == len(mask):
            kept = None
        else:
            hidden, token_ids = hidden.index_select(0, kept), token_ids.index_select(0, kept)
        mask = None
    return kept, Rows(hidden, _inputs(head, hidden, lora_a, scaling), token_ids, mask)


def _rows_at(output, at, begin, end):
    """Where a chunk's results go: into the output, or into memory of their own if its rows lie scattered in there."""
    return output[begin:end] if at is None else output.new_empty((end - begin, *output.shape[1:]))


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
        at_once, lora_a = MIN_ROWS if batch_invariant() else len(hidden), lora_a.to(hidden.dtype)
        for begin, end in spans(len(hidden), at_once):
            down = torch.mm(_filled_up(hidden[begin:end], at_once), lora_a.t())
            torch.mul(down[: end - begin], scaling, out=inputs[begin:end, : head.rank])
    return inputs


def _filled_up(matrix, rows):
    """So many rows, the missing ones of zeros."""
    missing = rows - len(matrix)
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _multiply_head(head, batch, logits):
    """logits = hidden @ weight.T + inputs @ columns.T; rows of `logits` beyond the batch's are of zeros."""
    hidden = _filled_up(batch.hidden, len(logits))
    if batch.inputs is None:
        multiply(hidden, head.weight.t(), logits)
    else:
        multiply(_filled_up(batch.inputs, len(logits)), head.columns.t(), logits)
        add_product(hidden, head.weight.t(), logits)


def _direction(head, gradient, lora_a, scaling, out):
    """out (n, H + r) = gradient @ [weight, lora_b], and what reaches hidden through the adapter added to it."""
    size, width = out.shape
    if head.rank == 0 and len(gradient) == size:
        return multiply(gradient, head.weight, out)
    # In float32 where two products are added; of all rows where the chunk is filled up.
    full = out.new_empty(len(gradient), width, dtype=out.dtype if head.rank == 0 else torch.float32)
    hidden, inner = full.split([width - head.rank, head.rank], 1)
    multiply(gradient, head.weight, hidden)
    if head.rank > 0:
        multiply(gradient, head.columns[:, : head.rank], inner)
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
                (multiply if self.empty else add_product)(dlogits.t(), x, total)
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


def on_each_backend(function) -> dict[str, Callable[..., None]]:
    """`function`, whose first argument is the backend of the row kernels, as an op's table of kernels."""
    return {backend: functools.partial(function, backend) for backend in _ROW_KERNELS}


def row_kernel(backend, *args) -> None:
    """See linear_head_rows in kernels/linear_head.py."""
    _ROW_KERNELS[backend](*args)


def gradient_kernel(backend, *args) -> None:
    """See linear_head_gradient in kernels/linear_head.py."""
    _GRADIENT_KERNELS[backend](*args)


def _rows_cuda(logits, token_ids, mask, temperature, softcap, logprobs, row_stats, entropy, top1, out, entropy_out):
    launch_cuda(
        "linear_head_rows", logits, row_layout(logits), token_ids, mask, *logits.shape, 1.0 / temperature, softcap,
        logprobs, row_stats, entropy, top1, *(None if o is None else row_layout(o) for o in (out, entropy_out)),
    )  # fmt: skip


def _gradient_cuda(
    logits, token_ids, mask, begin, row_stats, logprobs, entropy, dlogprobs, dentropy, temperature, softcap, out
):
    launch_cuda(
        "linear_head_gradient", logits, row_layout(logits), token_ids, mask, begin, *logits.shape, row_stats, logprobs,
        None if dentropy is None else entropy, dlogprobs, dentropy, 1.0 / temperature, softcap, row_layout(out),
    )  # fmt: skip


_ROW_KERNELS = {"cuda": _rows_cuda, "triton": triton_kernel("linear_head", "linear_head_rows")}
_GRADIENT_KERNELS = {"cuda": _gradient_cuda, "triton": triton_kernel("linear_head", "linear_head_gradient")}
