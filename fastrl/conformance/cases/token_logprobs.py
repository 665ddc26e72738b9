"""Log-probs and entropies from logits."""

from __future__ import annotations

import gc
import weakref

import torch

from fastrl.conformance.compare import (
    close,
    compiled,
    double,
    expect,
    finite,
    gradients,
    layouts,
    naive_logprobs,
    same_bits,
    second_backward_of,
    short,
)

VOCABULARIES = (1, 2, 127, 129, 1000, 32001, 50257)


def per_token_gradients(token_logprobs):
    """T1, pitfall 31: an upstream of its own for each token reaches that token's logits."""
    inputs = {"logits": torch.randn(7, 33), "token_ids": torch.randint(33, (7,))}
    upstream = torch.randn(7)
    _, truth = gradients(naive_logprobs, double(inputs), upstream)
    _, got = gradients(token_logprobs, inputs, upstream)
    close(got["logits"], truth["logits"], "logits (7, 33) float32, random upstream: gradient")


def odd_vocabularies(token_logprobs):
    """T4, pitfall 23: any vocabulary size; a log-prob is never above 0."""
    for vocab in VOCABULARIES:
        logits, top = torch.randn(5, vocab), torch.randint(vocab, (5,))
        logits[torch.arange(3), top[:3]] = logits.amax(1)[:3] + torch.tensor([1.0, 12.0, 40.0])
        given = f"logits (5, {vocab}) float32"
        got = token_logprobs(logits, top)
        close(got, naive_logprobs(logits.double(), top), given, rtol=1e-6, atol=5e-5)
        expect((got <= 0).all(), given, "log-probs <= 0", float(got.max()))


def gradient_near_probability_one(token_logprobs):
    """T3: 1 - p keeps its digits in the gradient where p is 0.99, 0.999 or 0.9999."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(3, 2, dtype=dtype)
        logits[:, 0] = torch.tensor([4.59375, 6.90625, 9.1875])  # exact in bfloat16
        inputs = {"logits": logits, "token_ids": torch.zeros(3, dtype=torch.long)}
        _, truth = gradients(naive_logprobs, double(inputs), torch.ones(3))
        _, got = gradients(token_logprobs, inputs, torch.ones(3))
        close(got["logits"], truth["logits"], f"logits [z, 0] {short(dtype)}: gradient", rtol=0.01, atol=0)


def very_negative_rows(token_logprobs):
    """T5: rows whose logits are all far below 0."""
    logits, ids = torch.full((2, 300), -1e4), torch.tensor([0, 299])
    close(token_logprobs(logits, ids), torch.full((2,), -5.703782), "300 logits of -10000", atol=2e-3)
    got = token_logprobs(torch.full((2, 300), -3e38), ids)
    finite(got, "300 logits of -3e38")


def banned_tokens(token_logprobs):
    """T6: a whole block of -inf logits, wherever it is, changes nothing; a banned token has log-prob -inf, and no
    gradient is NaN."""
    for start in (0, 1000, 3096):
        logits, ids = torch.randn(3, 4096), torch.tensor([start + 5, 2048, 700])
        logits[:, start : start + 1000] = -torch.inf
        inputs = {"logits": logits, "token_ids": ids}
        given = f"logits (3, 4096) float32, -inf in [{start}, {start + 1000}), token ids {ids.tolist()}"
        truth, _ = gradients(naive_logprobs, double(inputs), torch.ones(3))
        got, found = gradients(token_logprobs, inputs, torch.ones(3))
        close(got, truth, given)
        finite(found["logits"], f"{given}: gradient")


def entropy_of_banned_tokens(entropy):
    """T6, T20: banned tokens (-inf) add nothing to the entropy."""
    logits = torch.randn(3, 64)
    kept = logits[:, :40].double().log_softmax(-1)
    logits[:, 40:] = -torch.inf
    close(entropy(logits), -(kept.exp() * kept).sum(-1), "logits (3, 64) float32, -inf in [40, 64): entropy")


def entropy_of_logits(entropy):
    """T16, pitfall 35: the entropy of float32 and bfloat16 logits is that of the same numbers in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(9, 1000) * 4).to(dtype)
        truth = logits.double().log_softmax(-1)
        close(entropy(logits), -(truth.exp() * truth).sum(-1), f"logits (9, 1000) {short(dtype)}: entropy", atol=5e-5)


def common_offset(token_logprobs):
    """T7: adding the same number to all logits changes nothing."""
    logits, ids = torch.randint(-40, 40, (5, 257)) / 8, torch.randint(257, (5,))
    for offset in (1e4, -1e4):
        truth = naive_logprobs(logits.double(), ids)
        close(token_logprobs(logits + offset, ids), truth, f"logits (5, 257) float32 + {offset:g}", atol=2e-5)


def token_out_of_range(token_logprobs):
    """T9: a token id outside the vocabulary is an error or no finite number, never a log-prob."""
    for token in (-1, 33, 10**6):
        try:
            got = token_logprobs(torch.randn(4, 33), torch.tensor([0, token, 1, 2]))
        except (IndexError, RuntimeError, ValueError):
            continue
        expect(not torch.isfinite(got[1]), f"token id {token}, vocabulary 33", "an error, NaN or inf", float(got[1]))


def any_layout(token_logprobs):
    """T10, T21: strided, transposed and unaligned tensors give what contiguous ones give."""
    logits, ids = torch.randn(2, 6, 35), torch.randint(35, (2, 6))
    truth = naive_logprobs(logits.double(), ids)
    for name, same in layouts(logits):
        close(token_logprobs(same, ids), truth, f"logits (2, 6, 35) as {name}")
    for name, same in layouts(ids):
        close(token_logprobs(logits, same), truth, f"token ids (2, 6) as {name}")


def many_rows(token_logprobs):
    """T12, pitfall 45: more than 65,535 rows, as one long sequence."""
    logits, ids = torch.randn(1, 70001, 3), torch.randint(3, (1, 70001))
    close(token_logprobs(logits, ids), naive_logprobs(logits.double(), ids), "logits (1, 70001, 3) float32")


def second_backward(token_logprobs):
    """T13, pitfall 25: logits are not written to, and a second backward gives the first's gradient or raises."""
    logits, ids = torch.randn(5, 40, requires_grad=True), torch.arange(5)
    before = logits.detach().clone()
    second_backward_of(token_logprobs(logits, ids).sum(), logits, before, "logits (5, 40) float32")
    second_backward_of(token_logprobs(logits * 1.0, ids).sum(), logits, before, "logits (5, 40) float32, not a leaf")


def temperature_leaves_the_logits_alone(token_logprobs):
    """pitfall 25: dividing by a temperature does not change the caller's logits."""
    logits, ids = torch.randn(5, 40), torch.arange(5)
    before = logits.clone()
    got = token_logprobs(logits, ids, temperature=0.7)
    same_bits(before, logits, "logits (5, 40) float32 after a call with temperature 0.7")
    close(got, naive_logprobs(before.double() / 0.7, ids), "logits (5, 40) float32, temperature 0.7")


def a_row_does_not_depend_on_its_batch(token_logprobs):
    """T15: a row has the same bits alone and in any batch."""
    logits, ids = torch.randn(64, 1001), torch.randint(1001, (64,))
    for count in (1, 7, 63):
        same_bits(
            token_logprobs(logits, ids)[:count],
            token_logprobs(logits[:count].clone(), ids[:count].clone()),
            f"the first {count} of 64 rows of 1001 float32 logits",
        )


def two_runs_are_equal(token_logprobs):
    """pitfall 44: the same call gives the same bits, gradients too."""
    inputs = {"logits": torch.randn(64, 1001), "token_ids": torch.randint(1001, (64,))}
    first, second = (gradients(token_logprobs, inputs, torch.ones(64)) for _ in range(2))
    same_bits(first[0], second[0], "logits (64, 1001) float32 twice")
    same_bits(first[1]["logits"], second[1]["logits"], "logits (64, 1001) float32 twice: gradient")


def half_precision_logits(token_logprobs):
    """T16, pitfall 35: log-probs of bfloat16 logits are as exact as those of the same numbers in float32."""
    logits, ids = (torch.randn(32, 2000) * 4).bfloat16(), torch.randint(2000, (32,))
    truth = naive_logprobs(logits.double(), ids)
    close(token_logprobs(logits, ids), truth, "logits (32, 2000) bfloat16", rtol=1e-6, atol=2e-5)


def gradients_have_their_inputs_dtype(token_logprobs):
    """T30: the gradient of bfloat16 logits is that of float64, rounded to bfloat16 once."""
    inputs = {"logits": torch.randn(6, 50).bfloat16(), "token_ids": torch.randint(50, (6,))}
    upstream = torch.tensor([0.5, 1.0, 2.0, -1.0, 0.25, 4.0])
    _, truth = gradients(naive_logprobs, double(inputs), upstream)
    _, got = gradients(token_logprobs, inputs, upstream)
    expect(got["logits"].dtype == torch.bfloat16, "logits bfloat16: gradient", "bfloat16", got["logits"].dtype)
    close(got["logits"], truth["logits"], "logits (6, 50) bfloat16: gradient", rtol=0.02, atol=1e-6)


def compiles(token_logprobs):
    """T32: torch.compile(fullgraph=True) traces it, and the result is the same."""
    logits, ids = torch.randn(4, 50), torch.randint(50, (4,))
    compiled(token_logprobs, (logits, ids), "logits (4, 50) float32")


def softcap_after_banning(token_logprobs):
    """T35: a banned token stays banned under a softcap."""
    logits, ids = torch.randn(3, 40), torch.tensor([0, 1, 2])
    logits[:, 20:] = -torch.inf
    truth = naive_logprobs(5 * torch.tanh(logits[:, :20].double() / 5), ids)
    close(token_logprobs(logits, ids, softcap=5.0), truth, "logits (3, 40) float32, -inf in [20, 40), softcap 5")


def nothing_is_kept_alive(token_logprobs):
    """T36, pitfall 28: after backward the logits are freed."""
    logits = torch.randn(5, 40)
    alive = weakref.ref(leaf := logits.requires_grad_())
    token_logprobs(leaf, torch.arange(5)).sum().backward()
    del logits, leaf
    gc.collect()
    expect(alive() is None, "logits (5, 40) after backward, deleted by the caller", "freed", "still alive")


def improbable_tokens_keep_their_gradient(token_logprobs):
    """T37: a token of probability 1e-14 gets its gradient as exactly as one of 1e-1."""
    logits = -torch.arange(130).div(4).expand(3, 130).contiguous()
    inputs = {"logits": logits, "token_ids": torch.tensor([0, 1, 2])}
    _, truth = gradients(naive_logprobs, double(inputs), torch.ones(3))
    _, got = gradients(token_logprobs, inputs, torch.ones(3))
    close(got["logits"], truth["logits"], "logits 0 to -32 float32: gradient", rtol=5e-5, atol=0)


def gradient_through_a_view(token_logprobs):
    """pitfall 24: logits that are a view of something that is trained pass the gradient on."""
    flat = torch.randn(6 * 20, requires_grad=True)
    got = token_logprobs(flat.view(6, 20), torch.arange(6))
    expect(got.requires_grad, "logits = x.view(6, 20), x trained", "requires_grad", False)
    got.sum().backward()
    truth = flat.detach().double().requires_grad_()
    naive_logprobs(truth.view(6, 20), torch.arange(6)).sum().backward()
    assert flat.grad is not None and truth.grad is not None
    close(flat.grad, truth.grad, "logits = x.view(6, 20): gradient of x")
