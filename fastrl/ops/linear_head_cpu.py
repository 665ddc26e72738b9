"""linear_logprobs on the CPU: the library multiplies blocks of logits, csrc/cpu/linear_head.cpp does what lies between.

Flash attention's scheme, with the head's weight as keys and values. A chunk of rows sweeps the vocabulary in blocks:
logits = x @ block.T; exponentials relative to a running maximum, in place; sums += exponentials @ block. Only one block
of logits exists at a time and it stays in the cache, so the multiplications run faster than on whole matrices.
A bias and a LoRA adapter are further columns: [x, scaling * x @ lora_a.T, 1] @ [weight, lora_b, bias].T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastrl.checks import check_range
from fastrl.ops.cpu_products import multiply_dtype, spans
from fastrl.ops.native import _C, row_layout

# Rows and bytes of a block of logits. Measured at M = 2048, H = 576, V = 49152 in bfloat16 on Zen 5 with 32 MiB of L3:
# 512 to 2048 rows and 1 to 8 MiB are within 5 % of each other on one thread; larger blocks wait less often for other
# threads, smaller chunks need less memory for the running sums (rows x H in fp32).
CHUNK_ROWS = 512
BLOCK_BYTES = 4 << 20
# Logits of a chunk of rows that are kept where they form the gradients of a trained head without being computed again.
# Where all rows fit into this, or into what a sum over chunks would take, there is one chunk and no such sum.
KEPT_BYTES = 32 << 20


class Head(NamedTuple):
    """The head's parameters as one matrix (V, K), K = H (+ r) (+ 1), read a block at a time."""

    weight: torch.Tensor
    lora_b: torch.Tensor | None
    bias: torch.Tensor | None
    dtype: torch.dtype  # to multiply in

    def columns(self) -> list[torch.Tensor]:
        bias = None if self.bias is None else self.bias[:, None]
        return [part for part in (self.weight, self.lora_b, bias) if part is not None]

    def block(self, begin: int, end: int) -> torch.Tensor:
        return self._join([part[begin:end] for part in self.columns()])

    def select(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._join([part.index_select(0, token_ids) for part in self.columns()])

    def inputs(self, hidden: torch.Tensor, lora_a: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """What the matrix is multiplied with: (M, K)."""
        parts = [hidden.to(self.dtype)]
        if lora_a is not None:
            parts.append(torch.mm(parts[0], lora_a.to(self.dtype).t()).mul_(scaling))
        if self.bias is not None:
            parts.append(hidden.new_ones(len(hidden), 1))
        return self._join(parts).contiguous()

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        parts = [part.to(self.dtype) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def forward(
    hidden, weight, token_ids, mask, bias, lora_a, lora_b, scaling, temperature, softcap,
    logprobs, row_stats, entropy, top1, direction, entropy_direction,
    upstream=None, dweight=None, dbias=None, dlora_b=None,
):  # fmt: skip
    """Fills the outputs, 0 where masked; those that are None are not needed.

    If `upstream` (0-d) of every log-prob is known, the gradients of the parameters are formed here as well: a chunk's
    exponentials are kept until its sums are complete, so no logits are computed again.

    A direction (M, H + r) is the gradient of log-prob or entropy with respect to hidden, and to the adapter's
    scaling * hidden @ lora_a.T.
    """
    outputs = (logprobs, row_stats, entropy, top1, direction, entropy_direction)
    kept = _kept(mask)
    token_ids = _take(token_ids, kept)
    check_range(token_ids, len(weight), "linear_logprobs")
    head = Head(weight, lora_b, bias, multiply_dtype(hidden.dtype))
    x = head.inputs(_take(hidden, kept), lora_a, scaling)
    if kept is not None:
        for output in outputs:
            if output is not None:
                output.zero_()
    parameters = ParameterGradient(dweight, dbias, dlora_b, hidden.shape[1], x) if upstream is not None else None
    for begin, end in spans(len(x), CHUNK_ROWS if parameters is None else parameters.chunk_rows):
        results = _forward_chunk(
            x[begin:end], head, token_ids[begin:end], temperature, softcap, entropy is not None, top1 is not None,
            direction is not None, entropy_direction is not None, upstream, parameters,
        )  # fmt: skip
        for output, result in zip(outputs, results, strict=True):
            if output is None:
                continue
            if output is direction or output is entropy_direction:
                result = _through_adapter(result, hidden.shape[1], lora_a, scaling)[:, : output.shape[1]]
            if kept is None:
                output[begin:end] = result
            else:
                output[kept[begin:end]] = result.to(output.dtype)
        del results, result  # before the next chunk allocates its own
    if parameters is not None:
        parameters.finish(empty=len(x) == 0)


def _forward_chunk(
    x, head, token_ids, temperature, softcap, with_entropy, with_top1, with_direction, with_entropy_direction,
    upstream, parameters,
):  # fmt: skip
    """log-probs, statistics, entropy, top1 and fp32 directions (n, K) of a chunk of rows; adds to the parameters'
    gradient if it is given."""
    n, width = x.shape
    threads = torch.get_num_threads()
    targets = head.select(token_ids)
    sweeps = _floats(n, 6)
    top1 = torch.zeros(n, dtype=torch.bool) if with_top1 else None
    _C.linear_head_begin(row_layout(x), row_layout(targets), n, width, softcap, sweeps, threads)
    sums = x.new_zeros(n, width, dtype=torch.float32) if with_direction else None
    weighted = x.new_zeros(n, width, dtype=torch.float32) if with_entropy_direction else None
    copies = 2 if with_direction and with_entropy else 1  # a sweep for the entropy writes two blocks
    columns = min(_block_columns(x), len(head.weight))
    blocks = x.new_empty(copies, n * columns) if parameters is None else None
    kept = []
    products = x.new_empty(1 if weighted is None else 2, n, width if with_direction else 0)
    for begin, end in spans(len(head.weight), columns):
        block = head.block(begin, end)
        size = n * (end - begin)
        exponentials = x.new_empty(copies, size) if blocks is None else blocks[:, :size]
        exponentials = exponentials.view(copies, n, end - begin)  # first the logits
        torch.mm(x, block.t(), out=exponentials[0])
        _C.linear_head_sweep(
            row_layout(exponentials[0]), token_ids, begin, n, end - begin, 1.0 / temperature, softcap,
            with_entropy, with_direction or parameters is not None, row_layout(exponentials[-1]), sweeps, top1,
            threads,
        )  # fmt: skip
        if parameters is not None:
            kept.append((begin, end, exponentials[0], sweeps[:, 1].clone()))
        if with_direction:
            for i, product in enumerate(products):
                torch.mm(exponentials[i], block, out=product)
            _C.linear_head_fold(
                row_layout(products[0]), row_layout(products[-1]), sweeps, n, width, sums, weighted, threads
            )
    logprobs, entropy, row_stats, factors = (_floats(*shape) for shape in ((n,), (n,), (n, 2), (2, n, 3)))
    _C.linear_head_finish(sweeps, n, 1.0 / temperature, softcap, logprobs, row_stats, entropy, factors[0], factors[1])
    if parameters is not None:
        parameters.add(x, token_ids, kept, sweeps[:, 1], upstream * factors[0], temperature)
    for i, result in ((1, weighted), (0, sums)):  # the entropy's direction reads both sums, so it is made first
        if result is not None:
            _C.linear_head_direction(
                row_layout(targets), sums, weighted if i else None, factors[i], n, width, result, threads
            )
    return logprobs, row_stats, entropy, top1, sums, weighted


class ParameterGradient:
    """Gradients of the parameters that multiply a logit each, formed from a chunk's exponentials.

    Chunks are summed in fp32, in a matrix (V, K), and rounded once; if one chunk holds all rows, each block of the
    vocabulary is finished at once and there is no such matrix.
    """

    def __init__(self, dweight, dbias, dlora_b, width, x):
        self.outputs = (dweight, dbias, dlora_b)
        self.width = width
        self.first = 0 if dweight is not None else width  # column of x from which gradients are needed
        self.vocab = next(len(output) for output in self.outputs if output is not None)
        row_bytes = self.vocab * x.element_size()
        self.chunk_rows = min(CHUNK_ROWS, max(64, KEPT_BYTES // row_bytes))
        columns = x.shape[1] - self.first
        if len(x) * row_bytes <= max(KEPT_BYTES, 4 * self.vocab * columns):
            self.chunk_rows, self.total = max(len(x), 1), None
        elif dweight is not None and dweight.dtype == torch.float32 and dweight.shape[1] == columns:
            self.total = dweight.zero_()
        else:
            self.total = x.new_zeros(self.vocab, columns, dtype=torch.float32)

    def add(self, x, token_ids, kept, last_max, factors, temperature):
        """+= dlogits.T @ x. dlogits of a block are its exponentials times a factor of the row, which x takes on."""
        x = x[:, self.first :]
        targets = x.float() * factors[:, :1]
        for begin, end, exponentials, block_max in kept:
            rescale = torch.where(block_max == -torch.inf, 0, ((block_max - last_max) / temperature).exp())
            part = x * (factors[:, 1] * rescale)[:, None].to(x.dtype)
            block = torch.mm(exponentials.t(), part)
            if self.total is not None:
                self.total[begin:end] += block
                continue
            hits = ((token_ids >= begin) & (token_ids < end)).nonzero()[:, 0]  # rows whose target is in this block
            ids, places = (token_ids[hits] - begin).unique(return_inverse=True)
            block[ids] = block[ids].float().index_add_(0, places, targets[hits]).to(block.dtype)
            self._write(begin, end, block)
        if self.total is not None:
            self.total.index_add_(0, token_ids, targets)

    def finish(self, *, empty):
        if empty:
            for output in self.outputs:
                if output is not None:
                    output.zero_()
        elif self.total is not None and self.total is not self.outputs[0]:
            self._write(0, self.vocab, self.total)

    def _write(self, begin, end, total):
        _split(total, self.width, self.first, *(None if t is None else t[begin:end] for t in self.outputs))


def _split(total, width, first, dweight, dbias, dlora_b):
    """Hands the columns of the joint gradient to the parameters they belong to."""
    if dweight is not None:
        dweight.copy_(total[:, :width])
    if dlora_b is not None:
        dlora_b.copy_(total[:, width - first : width - first + dlora_b.shape[1]])
    if dbias is not None:
        dbias.copy_(total[:, -1])


def _through_adapter(direction, width, lora_a, scaling):
    """Adds to the gradient of hidden, the first `width` columns, what reaches it through the adapter."""
    if lora_a is not None:
        inner = direction[:, width : width + len(lora_a)]
        direction[:, :width].addmm_(inner, lora_a.float(), alpha=scaling)
    return direction


def backward_weights(
    hidden, weight, token_ids, mask, bias, lora_a, lora_b, scaling, temperature, softcap,
    row_stats, logprobs, entropy, dlogprobs, dentropy, dweight, dbias, dlora_b,
):  # fmt: skip
    """Fills the gradients of the parameters that multiply a logit each; those that are None are not needed.

    Blocks of the vocabulary outside, chunks of rows inside: a block's gradient is summed over all rows in fp32 before
    it is rounded once, whatever the number of chunks.
    """
    kept = _kept(mask)
    inputs = (token_ids, row_stats, logprobs, entropy, dlogprobs, dentropy)
    per_row = [None if tensor is None else _take(tensor, kept) for tensor in inputs]
    head = Head(weight, lora_b, bias, multiply_dtype(hidden.dtype))
    x = head.inputs(_take(hidden, kept), lora_a, scaling)
    width = hidden.shape[1]
    first = 0 if dweight is not None else width  # column of x from which gradients are needed
    chunks = list(spans(len(x), CHUNK_ROWS))
    columns = _block_columns(x[: chunks[0][1]]) if chunks else len(weight)
    for begin, end in spans(len(weight), columns):
        block = head.block(begin, end)
        total = x.new_zeros(end - begin, x.shape[1] - first, dtype=torch.float32)
        for start, stop in chunks:
            logits = torch.mm(x[start:stop], block.t())
            ids, *floats = (None if tensor is None else tensor[start:stop] for tensor in per_row)
            _C.linear_head_gradient(
                row_layout(logits), ids, begin, *logits.shape, *floats, 1.0 / temperature, softcap,
                torch.get_num_threads(),
            )  # fmt: skip
            total += torch.mm(logits.t(), x[start:stop, first:])
        _split(total, width, first, *(None if t is None else t[begin:end] for t in (dweight, dbias, dlora_b)))


def backward_hidden(direction, entropy_direction, mask, dlogprobs, dentropy, dinputs):
    """dinputs = dlogprobs * direction + dentropy * entropy_direction, row by row; 0 where masked."""
    _C.linear_head_scale(
        row_layout(direction), None if dentropy is None else row_layout(entropy_direction), mask, dlogprobs, dentropy,
        *direction.shape, row_layout(dinputs), torch.get_num_threads(),
    )  # fmt: skip


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _kept(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Indices of the kept rows; None if all are."""
    return None if mask is None or bool(mask.all()) else mask.nonzero()[:, 0]


def _take(tensor: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return tensor if kept is None else tensor.index_select(0, kept)


def _block_columns(x: torch.Tensor) -> int:
    return max(64, BLOCK_BYTES // (max(len(x), 1) * x.element_size()) // 64 * 64)
