"""ppo_loss's GPU kernels against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from gpus import HAS_GPU
from oracle import assert_as_accurate

from fastrl.kernels import ppo_loss as kernels
from fastrl.ops import ppo_loss

NAMES = ["logprobs", "values", "old_logprobs", "old_values", "advantages", "returns", "mask"]


def case(rows, steps, device, seed=0):
    """Inputs by name, with log-ratios and value steps on both sides of their clips; entropy."""
    g = torch.Generator().manual_seed(seed)
    old_logprobs, old_values, advantages, returns, a, b, entropy = torch.randn(7, rows, steps, generator=g).unbind()
    mask = torch.rand(rows, steps, generator=g) > 0.3
    tensors = old_logprobs + 0.3 * a, old_values + 0.3 * b, old_logprobs, old_values, advantages, returns, mask
    inputs = {name: t.to(device) for name, t in zip(NAMES, tensors, strict=True)}
    return inputs, entropy.abs().to(device)


def gradients(inputs, entropy=None, upstream=1.0, **options):
    """loss, stats and the gradients of logprobs, values, entropy."""
    inputs = dict(inputs)
    leaves = [t.detach().clone().requires_grad_() for t in (inputs["logprobs"], inputs["values"])]
    inputs["logprobs"], inputs["values"] = leaves
    if entropy is not None:
        entropy = entropy.detach().clone().requires_grad_()
        leaves.append(entropy)
    loss, stats = ppo_loss(**inputs, entropy=entropy, **options)
    (loss * upstream).backward()
    return loss.detach(), stats, *(t.grad for t in leaves)


def doubled(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def check(gpu_backend, inputs, entropy, **options):
    actual = gradients(inputs, entropy, backend=gpu_backend, **options)
    eager = gradients(inputs, entropy, backend="reference", **options)
    truth = gradients(doubled(inputs), entropy.double(), backend="reference", **options)
    for i, name in ((0, "loss"), (2, "dlogprobs"), (3, "dvalues"), (4, "dentropy")):
        assert_as_accurate(actual[i], eager[i], truth[i], name)
    for name, a, t in zip(truth[1]._fields, actual[1], truth[1], strict=True):
        torch.testing.assert_close(a, t, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("steps", [1, 2, 3, 31, 32, 33, 100, 1023])
@pytest.mark.parametrize(("vf_clip_coef", "dual_clip"), [(None, None), (0.2, 1.5)])
def test_matches_float64(gpu_backend, device, steps, vf_clip_coef, dual_clip):
    """T38: loss, statistics and all gradients, sizes around a warp and a block, any upstream."""
    inputs, entropy = case(3, steps, device)
    check(gpu_backend, inputs, entropy, vf_clip_coef=vf_clip_coef, dual_clip=dual_clip, ent_coef=0.01, upstream=-1.7)


@pytest.mark.slow
def test_many_blocks(gpu_backend, device, monkeypatch):
    """Several blocks of tokens; on triton more than are added at once."""
    if gpu_backend == "triton":
        monkeypatch.setattr("fastrl.kernels.ppo_loss.BLOCK", 16)
        monkeypatch.setattr("fastrl.kernels.ppo_loss.AT_ONCE", 16)
    inputs, entropy = case(*((5, 130) if gpu_backend == "triton" else (33, 130)), device)
    check(gpu_backend, inputs, entropy, ent_coef=0.01)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("denominator", [None, 7, torch.tensor(11.0)], ids=str)
def test_denominators(gpu_backend, device, rows, denominator):
    """pitfalls 11, 16: the kept tokens, a number, or a tensor, which is not read on the host."""
    inputs, entropy = case(rows, 65, device)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(device)
    check(gpu_backend, inputs, entropy, denominator=denominator, ent_coef=0.1)


def test_gradients_only_where_asked(gpu_backend, device):
    inputs, _ = case(3, 10, device)
    values = inputs["values"].clone().requires_grad_()
    ppo_loss(**{**inputs, "values": values}, backend=gpu_backend)[0].backward()
    want = gradients(inputs, backend=gpu_backend)[3]
    assert torch.equal(values.grad, want)
    assert not ppo_loss(**inputs, backend=gpu_backend)[0].requires_grad


def test_before_any_update(gpu_backend, device):
    """pitfall 1: ratio 1, KL 0, nothing clipped, and at the tie the whole gradient -A and V - G."""
    inputs, _ = case(5, 40, device)
    inputs["logprobs"], inputs["values"] = inputs["old_logprobs"].clone(), inputs["old_values"].clone()
    _, stats, dlogprobs, dvalues = gradients(inputs, vf_coef=0.5, denominator=1, backend=gpu_backend)
    assert stats.ratio_mean == 1 and stats.ratio_max == 1
    assert stats.approx_kl == 0 and stats.clip_frac == 0 and stats.vf_clip_frac == 0
    mask = inputs["mask"]
    assert torch.equal(dlogprobs, torch.where(mask, -inputs["advantages"], 0))
    torch.testing.assert_close(dvalues, torch.where(mask, 0.5 * (inputs["values"] - inputs["returns"]), 0))


@pytest.mark.parametrize("log_ratio", [-200.0, -20.5, -20.0, -1.0, 0.0, 1.0, 20.0, 20.5, 200.0, 3e38])
def test_extreme_log_ratios(gpu_backend, device, log_ratio):
    """T19: finite loss, gradients never NaN, 0 outside +-20; at 20 it is still -A r; dropped slots do not care."""
    inputs, _ = case(2, 40, device)
    inputs["mask"][:] = True
    inputs["mask"][1, 20:] = False
    inputs["logprobs"] = inputs["old_logprobs"].zero_() + log_ratio
    inputs["advantages"] = torch.where(torch.arange(40, device=device) % 2 == 0, 1.0, -1.0).expand(2, 40)
    loss, stats, dlogprobs, _ = gradients(inputs, denominator=1, backend=gpu_backend)
    assert torch.isfinite(loss) and torch.isfinite(dlogprobs).all()
    assert all(torch.isfinite(s) for s in stats) and stats.approx_kl >= 0
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    assert stats.ratio_max.item() == pytest.approx(ratio, rel=1e-5)
    for column, advantage in ((0, 1.0), (1, -1.0)):
        constant = abs(log_ratio) > 20 or (ratio > 1.2 if advantage > 0 else ratio < 0.8)
        want = 0.0 if constant else -advantage * ratio
        assert dlogprobs[0, column].item() == pytest.approx(want, rel=1e-5)
    assert (dlogprobs[1, 20:] == 0).all()


@pytest.mark.parametrize("steps", [32, 700])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_may_hold_anything(gpu_backend, device, steps, poison):
    """T20, pitfalls 9, 10, 38, 39: poison where the mask drops; loss, statistics and gradients as without it."""
    inputs, entropy = case(6, steps, device)
    clean = gradients(inputs, entropy, ent_coef=0.1, backend=gpu_backend)
    mask = inputs["mask"]
    for name in NAMES[:-1]:
        inputs[name][~mask] = poison
    entropy[~mask] = poison
    result = gradients(inputs, entropy, ent_coef=0.1, backend=gpu_backend)
    assert torch.equal(result[0], clean[0]) and torch.equal(torch.stack(result[1]), torch.stack(clean[1]))
    for got, want in zip(result[2:], clean[2:], strict=True):
        assert torch.equal(got, want) and (got[~mask] == 0).all()
    inputs["mask"] = mask & False
    loss, stats, *grads = gradients(inputs, entropy, ent_coef=0.1, backend=gpu_backend)
    assert loss == 0 and (torch.stack(stats) == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("name", ["logprobs", "values", "old_logprobs", "advantages", "returns", "entropy"])
def test_nan_in_a_kept_slot_is_seen(gpu_backend, device, name):
    inputs, entropy = case(3, 40, device)
    inputs["mask"][:] = True
    (entropy if name == "entropy" else inputs[name])[1, 5] = torch.nan
    loss, stats, dlogprobs, dvalues, _ = gradients(inputs, entropy, ent_coef=0.1, backend=gpu_backend)
    assert loss.isnan()
    if name in ("logprobs", "old_logprobs", "advantages"):
        assert dlogprobs[1, 5].isnan() and stats.policy_loss.isnan()
        assert name == "advantages" or stats.ratio_max.isnan()
    elif name != "entropy":
        assert dvalues[1, 5].isnan() and stats.value_loss.isnan()
    assert dlogprobs.isnan().sum() + dvalues.isnan().sum() <= 1


def test_repeatable_at_any_alignment(gpu_backend, device):
    """T10, T15, pitfall 44: same bits on every run, and with inputs that start at any element."""
    inputs, entropy = case(5, 999, device)
    want = gradients(inputs, entropy, ent_coef=0.1, backend=gpu_backend)
    shifted = {n: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for n, t in inputs.items()}
    for again in (inputs, shifted):
        got = gradients(again, entropy, ent_coef=0.1, backend=gpu_backend)
        assert torch.equal(want[0], got[0]) and torch.equal(torch.stack(want[1]), torch.stack(got[1]))
        assert all(torch.equal(w, g) for w, g in zip(want[2:], got[2:], strict=True))


@pytest.mark.parametrize("gpu_backend", ["triton"], indirect=True)
def test_triton_adds_in_one_order_at_any_alignment(gpu_backend, device, monkeypatch):
    """T10: its layouts follow the alignment of addresses, so it never gets an address that is no multiple of 16."""
    launches = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, tensor, *args, **options: launches.append(args))
    inputs, entropy = case(5, 999, device)
    shifted = {n: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for n, t in inputs.items()}
    ppo_loss(**shifted, entropy=entropy, backend=gpu_backend)
    assert all(a.data_ptr() % 16 == 0 for args in launches for a in args if isinstance(a, torch.Tensor))


def test_nothing_to_explain(gpu_backend, device):
    """Returns that differ by rounding alone have an explained variance of 0."""
    returns = torch.full((7, 1), 0.3, device=device)
    rest = dict.fromkeys(("logprobs", "old_logprobs", "old_values", "advantages"), torch.zeros(7, 1, device=device))
    values, mask = torch.linspace(0, 1, 7, device=device)[:, None], torch.ones(7, 1, dtype=torch.bool, device=device)
    for scale in (1.0, 1e4, -3e-4):
        _, stats = ppo_loss(**rest, values=values, returns=scale * returns, mask=mask, backend=gpu_backend)
        assert stats.explained_variance.item() == 0


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(gpu_backend, device, shape):
    inputs = dict.fromkeys(NAMES, torch.empty(shape, device=device))
    inputs["mask"] = torch.empty(shape, dtype=torch.bool, device=device)
    loss, stats, dlogprobs, _ = gradients(inputs, backend=gpu_backend)
    assert loss == 0 and (torch.stack(stats) == 0).all() and dlogprobs.shape == shape


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_large(gpu_backend, device):
    """Many blocks, more than the count has; the last one is not full."""
    inputs, entropy = case(8191, 1025, device)
    got = gradients(inputs, entropy, ent_coef=0.1, backend=gpu_backend)
    truth = gradients(doubled(inputs), entropy.double(), ent_coef=0.1, backend="reference")
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(got[1]), torch.stack(truth[1]), rtol=1e-4, atol=1e-5)
    for g, t in zip(got[2:], truth[2:], strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-9)
