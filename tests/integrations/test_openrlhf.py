"""fastrl.integrations.openrlhf: the oracle is its formulas in plain torch, and OpenRLHF where it is installed."""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rollouts import MASK, WITHOUT_HOLES, critic_batch, gradient, poisoned, policy_batch

from fastrl.integrations import hosts, openrlhf
from fastrl.ops import gae

KEPT = MASK.bool()


def restated_logprobs(logits, labels, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def mean(values, mask):
    return values[mask.bool()].mean()


class PolicyLoss(torch.nn.Module):
    """OpenRLHF's, of the type "ppo" without corrections; of another type it returns the type."""

    def __init__(
        self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type="ppo",
        is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio",
        is_correction_threshold=(0.5, 5.0),
    ):  # fmt: skip
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss, self.policy_loss_type = token_level_loss, policy_loss_type
        self.is_correction_level = is_correction_level

    def forward(
        self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
        batch_num_tokens=None, global_batch_size=None,
    ):  # fmt: skip
        if self.policy_loss_type != "ppo" or self.is_correction_level != "off":
            return f"{self.policy_loss_type}, {self.is_correction_level}"
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        log_ratio = log_probs - old_log_probs
        ratio = log_ratio.clamp(-20, 20).exp()
        gain = ratio * advantages
        clipped = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
        least = torch.minimum(gain, clipped)
        if self.dual_clip is not None:
            least = torch.where(advantages < 0, torch.maximum(least, self.dual_clip * advantages), least)
        rows = [-row[keep.bool()] for row, keep in zip(least, mask, strict=True) if keep.any()]
        if self.token_level_loss:
            total, own, count = torch.cat(rows).sum(), int(mask.sum()), batch_num_tokens
        else:
            total, own, count = sum(row.mean() for row in rows), len(rows), global_batch_size
        loss = total / own if count is None else total / count * dp_size
        return loss, mean((clipped < gain).float(), mask), -mean(log_ratio, mask).detach(), None, None


class RemoteExperienceMaker:
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
        if action_mask is not None:
            values, rewards = values * action_mask, rewards * action_mask
        steps, advantage = values.shape[1], torch.zeros(len(values))
        columns = []
        for t in reversed(range(steps)):
            next_value = values[:, t + 1] if t + 1 < steps else 0
            advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lambd * advantage
            columns.insert(0, advantage)
        advantages = torch.stack(columns, dim=1)
        return advantages, advantages + values


@pytest.fixture(params=["restated", *(["installed"] if find_spec("openrlhf") else [])])
def theirs(request):
    """log_probs_from_logits, PolicyLoss and RemoteExperienceMaker: of this file, and of OpenRLHF."""
    if request.param == "restated":
        return SimpleNamespace(
            log_probs_from_logits=restated_logprobs, PolicyLoss=PolicyLoss, RemoteExperienceMaker=RemoteExperienceMaker
        )
    utils = pytest.importorskip("openrlhf.models.utils", exc_type=ImportError)
    loss = pytest.importorskip("openrlhf.models.loss", exc_type=ImportError)
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker", exc_type=ImportError)
    return SimpleNamespace(
        log_probs_from_logits=utils.log_probs_from_logits,
        PolicyLoss=loss.PolicyLoss,
        RemoteExperienceMaker=maker.RemoteExperienceMaker,
    )


def test_functions_take_the_arguments_of_openrlhfs():
    names = [list(inspect.signature(f).parameters) for f in (openrlhf.log_probs_from_logits, restated_logprobs)]
    assert names[0] == names[1]
    ours = inspect.signature(openrlhf.get_advantages_and_returns).parameters
    assert ["self", *ours] == list(inspect.signature(RemoteExperienceMaker.get_advantages_and_returns).parameters)


@pytest.mark.parametrize("gamma, lambd", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), None], ids=["int", "bool", "none"])
def test_advantages_and_returns_are_openrlhfs_in_every_slot(theirs, gamma, lambd, mask):
    rewards, values = critic_batch()
    want = theirs.RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, mask, gamma, lambd)
    got = openrlhf.get_advantages_and_returns(values, rewards, mask, gamma, lambd)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_over_holes_openrlhfs_advantages_decay_and_those_of_gae_do_not():
    rewards, values = critic_batch()
    for gamma, lambd in ((1.0, 1.0), (1.0, 0.95)):
        ours, _ = openrlhf.get_advantages_and_returns(values, rewards, MASK, gamma, lambd)
        passed_over, _ = gae(rewards, values, KEPT, gamma=gamma, gae_lambda=lambd)
        same = torch.isclose(ours, passed_over, atol=1e-6) | ~KEPT
        assert same[WITHOUT_HOLES].all() and same[2].all() == (lambd == 1)


def test_what_stands_in_dropped_slots_changes_nothing():
    rewards, values = critic_batch()
    clean = openrlhf.get_advantages_and_returns(values, rewards, MASK, 0.9, 0.5)
    dirty = openrlhf.get_advantages_and_returns(poisoned(values), poisoned(rewards), MASK, 0.9, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    logprobs, old, advantages = policy_batch()
    again = poisoned(logprobs).requires_grad_()
    for by_token in (True, False):
        results = openrlhf.policy_loss(logprobs, old, advantages, MASK, token_level_loss=by_token)
        same = openrlhf.policy_loss(again, poisoned(old), poisoned(advantages), MASK, token_level_loss=by_token)
        assert all(torch.equal(a, b) for a, b in zip(results, same, strict=True))
        assert torch.equal(gradient(results[0], logprobs), gradient(same[0], again))


BOUNDS = [
    {},
    {"clip_eps_low": 0.2, "clip_eps_high": 0.28},
    {"clip_eps_low": 0.3, "clip_eps_high": 0.1, "dual_clip": 1.5},
    {"dual_clip": 3.0},
]
GLOBAL = {"dp_size": 4, "batch_num_tokens": torch.tensor(90.0), "global_batch_size": torch.tensor(20.0)}


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("counts", [{}, GLOBAL, {"dp_size": 4}], ids=["own", "global", "dp_size alone"])
def test_loss_gradients_and_statistics_are_openrlhfs(theirs, bounds, by_token, counts):
    logprobs, old, advantages = policy_batch()
    loss = theirs.PolicyLoss(**bounds, token_level_loss=by_token)
    want = loss(logprobs, old, advantages, MASK, **counts)
    got = openrlhf.policy_loss(logprobs, old, advantages, MASK, token_level_loss=by_token, **bounds, **counts)
    torch.testing.assert_close(got, tuple(want[:3]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(got[0], logprobs), gradient(want[0], logprobs), rtol=1e-5, atol=1e-7)


def test_without_a_mask_every_token_counts():
    logprobs, old, advantages = policy_batch()
    got, want = openrlhf.policy_loss(logprobs, old, advantages), PolicyLoss()(logprobs, old, advantages)
    torch.testing.assert_close(got, want[:3])


def test_a_batch_without_a_token_has_loss_and_gradient_0():
    logprobs, old, advantages = policy_batch()
    for by_token in (True, False):
        results = openrlhf.policy_loss(logprobs, old, advantages, 0 * MASK, token_level_loss=by_token)
        assert all(r == 0 for r in results) and (gradient(results[0], logprobs) == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_their_gradient_are_openrlhfs_and_the_logits_are_kept(theirs, temperature):
    g = torch.Generator().manual_seed(0)
    leaf = torch.randn(3, 5, 40, generator=g).requires_grad_()
    labels = torch.randint(40, (3, 5), generator=g)
    logits = leaf * 1  # OpenRLHF divides it in place
    got = openrlhf.log_probs_from_logits(logits, labels, temperature)
    assert torch.equal(logits, leaf)
    grad = gradient(got.sum(), leaf)
    want = theirs.log_probs_from_logits(leaf * 1, labels, temperature)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, gradient(want.sum(), leaf), rtol=1e-4, atol=1e-6)


@pytest.fixture
def host(monkeypatch):
    """An OpenRLHF of this file's parts; the actor imported the log-probs by name."""

    def module(name, **content):
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    for package in ("openrlhf", "openrlhf.trainer", "openrlhf.trainer.ppo_utils"):
        module(package)
    loss_class = type("PolicyLoss", (PolicyLoss,), {"forward": PolicyLoss.forward})
    maker = type("RemoteExperienceMaker", (), dict(vars(RemoteExperienceMaker)))
    utils = module("openrlhf.models.utils", log_probs_from_logits=restated_logprobs)
    loss = module("openrlhf.models.loss", PolicyLoss=loss_class)
    module("openrlhf.models", utils=utils, loss=loss)
    actor = module("openrlhf.models.actor", log_probs_from_logits=restated_logprobs)
    module("openrlhf.trainer.ppo_utils.experience_maker", RemoteExperienceMaker=maker)
    monkeypatch.setattr(hosts, "version", lambda package: "0.11.2")
    yield SimpleNamespace(utils=utils, loss=loss, actor=actor, maker=maker)
    openrlhf.unpatch()


def in_place(host):
    return [
        host.utils.log_probs_from_logits, host.actor.log_probs_from_logits, host.loss.PolicyLoss.forward,
        host.maker.get_advantages_and_returns,
    ]  # fmt: skip


def test_a_patch_reaches_every_place_and_is_taken_back_whole(host):
    before = in_place(host)
    for _ in range(2):  # twice is once
        openrlhf.patch()
        assert host.utils.log_probs_from_logits is host.actor.log_probs_from_logits is openrlhf.log_probs_from_logits
        assert not set(in_place(host)) & set(before)
    for _ in range(2):
        openrlhf.unpatch()
        assert in_place(host) == before


def test_a_patched_loss_and_experience_maker_give_the_same_and_leave_the_rest_to_openrlhf(host):
    logprobs, old, advantages = policy_batch()
    rewards, values = critic_batch()
    loss = host.loss.PolicyLoss(dual_clip=3.0)
    arguments = (values, rewards, MASK, 1.0, 0.95)
    want, want_advantages = loss(logprobs, old, advantages, MASK), host.maker().get_advantages_and_returns(*arguments)
    openrlhf.patch()
    got = loss(logprobs, old, advantages, MASK)
    torch.testing.assert_close(got[:3], want[:3], rtol=1e-5, atol=1e-6)
    assert got[3:] == (None, None)
    torch.testing.assert_close(host.maker().get_advantages_and_returns(*arguments), want_advantages)
    assert host.loss.PolicyLoss(policy_loss_type="gspo")(logprobs, old, advantages, MASK) == "gspo, off"
    assert host.loss.PolicyLoss(is_correction_level="token")(logprobs, old, advantages, MASK) == "ppo, token"


@pytest.mark.parametrize("place, name", [("utils", "log_probs_from_logits"), ("maker", "get_advantages_and_returns")])
def test_other_arguments_are_refused_and_nothing_is_changed(host, place, name):
    setattr(getattr(host, place), name, lambda surprise: None)
    before = in_place(host)
    with pytest.raises(RuntimeError, match=f"{name}: expected the arguments .*; got surprise.*nothing was changed"):
        openrlhf.patch()
    assert in_place(host) == before


def test_a_version_that_was_not_tested_is_patched_with_one_warning(host, monkeypatch):
    monkeypatch.setattr(hosts, "version", lambda package: "0.12.0")
    with pytest.warns(UserWarning, match="openrlhf 0.12.0 was not tested") as warned:
        openrlhf.patch()
        openrlhf.patch()
    assert len(warned) == 1 and host.utils.log_probs_from_logits is openrlhf.log_probs_from_logits


def test_without_openrlhf_patch_says_what_to_install(monkeypatch):
    def missing(package):
        raise hosts.PackageNotFoundError(package)

    monkeypatch.setattr(hosts, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="openrlhf is not installed: pip install 'openrlhf>="):
        openrlhf.patch()
    openrlhf.unpatch()


def test_openrlhfs_own_classes_compute_the_same_patched():
    loss = pytest.importorskip("openrlhf.models.loss", exc_type=ImportError)
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker", exc_type=ImportError)
    logprobs, old, advantages = policy_batch()
    rewards, values = critic_batch()
    modules = [loss.PolicyLoss(), loss.PolicyLoss(0.2, 0.28, 3.0, False), loss.PolicyLoss(policy_loss_type="gspo")]

    def results():
        losses = [module(logprobs, old, advantages, MASK)[0] for module in modules]
        of_maker = maker.RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, MASK, 1.0, 0.95)
        return [*losses, *(gradient(x, logprobs) for x in losses), *of_maker]

    before, forward = results(), loss.PolicyLoss.forward
    openrlhf.patch()
    try:
        assert loss.PolicyLoss.forward is not forward
        torch.testing.assert_close(results(), before, rtol=1e-5, atol=1e-6)
    finally:
        openrlhf.unpatch()
    assert loss.PolicyLoss.forward is forward
