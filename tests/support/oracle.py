"""What the op tests share: accuracy against float64, stride variants, poison."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# What rounding the result itself costs, relative to its size.
ROUNDING = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14, torch.bool: 0.0}

GPU_TANH = (
    2.0**-22
)  # error of a soft-capped logit on a GPU, in softcaps: its tanh comes from an approximate exponential


def assert_as_accurate(actual, eager, truth, name="result", slack=0.0):
    """The largest error against the float64 truth is at most twice that of same-dtype eager torch, plus rounding.

    `actual`: the kernel's result; `eager`: plain torch in the same dtype; `truth`: the reference on float64 copies;
    `slack`: relative to the result, where one number cannot tell how much eager loses: its errors may cancel.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(truth.shape)}"
    actual64, eager64, truth64 = actual.double(), eager.double(), truth.double()
    finite = torch.isfinite(truth64)
    same = (actual64 == truth64) | (actual64.isnan() & truth64.isnan())
    assert same[~finite].all(), f"{name}: non-finite values differ"
    if not finite.any():
        return
    scale = truth64[finite].abs().max().clamp(min=1.0)
    error = (actual64 - truth64)[finite].abs().max()
    eager_error = (eager64 - truth64)[finite].nan_to_num(0).abs().max()
    bound = 2 * eager_error + (4 * ROUNDING[actual.dtype] + slack) * scale
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (eager {eager_error:.3e})"


def arg_max_cases(vocab, dtype):
    """(logits (54, vocab), token ids): equals, NaN, infinities, rows of nothing but -inf, logits that a softcap makes
    equal, each with the tokens of `near_arg_max`."""
    g = torch.Generator().manual_seed(vocab)
    rows = torch.randint(-2, 3, (9, vocab), generator=g).float()
    rows[1] = 0
    rows[2] = -torch.inf
    rows[3, ::3] = -torch.inf
    rows[4, [vocab // 2, -1]] = torch.nan
    rows[5] = torch.nan
    rows[6, [vocab // 3, -1]] = torch.inf
    rows[7] = 1000 + 8 * (torch.arange(vocab) % 2)
    logits = rows.to(dtype).repeat_interleave(6, 0)
    return logits, near_arg_max(logits)


def near_arg_max(logits):
    """Of each row in turn the first and last token, a middle one, the arg max, the last of those equal to it, any."""
    count, vocab = logits.shape
    top, last = logits.argmax(-1), torch.full((count,), vocab - 1)
    any_token = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(count))
    chosen = [0 * last, last, last // 2, top, last - logits.flip(-1).argmax(-1), any_token]
    return torch.stack(chosen)[torch.arange(count) % 6, torch.arange(count)]


def strided_variants(tensor):
    """The same values in layouts that a caller may hand over: contiguous, sliced, transposed, padded, expanded-free."""
    yield "contiguous", tensor.clone()
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan") if tensor.is_floating_point() else 0)
    wide = wide.to(tensor.dtype)
    wide[..., 1:-2] = tensor
    yield "inner slice", wide[..., 1:-2]
    if tensor.ndim >= 2:
        yield "transposed", tensor.transpose(0, 1).contiguous().transpose(0, 1)
        yield "last dimension strided", tensor.transpose(-1, 0).contiguous().transpose(-1, 0)
        longer = torch.cat([tensor, tensor], 0)[1::2] if tensor.shape[0] > 1 else None
        if longer is not None and longer.shape[0] == tensor.shape[0]:
            doubled = tensor.repeat_interleave(2, 0)
            yield "every second row", doubled[::2]
