"""fastrl.integrations.verl: the oracle is verl's formulas in plain torch, and verl itself where it is installed."""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rollouts import MASK, critic_batch, gradient, poisoned, policy_batch

from fastrl.integrations import hosts, verl
from fastrl.ops import ppo_advantages

KEPT = MASK.bool()


class Config(SimpleNamespace):
    """The part of verl's ActorConfig that the policy loss reads."""

    def get(self, key, default=None):
        return getattr(self, key, default)


def config(low=0.2, high=0.2, dual_clip=3.0, **counts):
    return Config(
        clip_ratio=0.2, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual_clip, global_batch_info=counts
    )


def restated_gae(token_level_rewards, values, response_mask, gamma, lam):
    """Steps over dropped tokens; whitened by the unbiased variance; what stands in dropped slots is not of interest."""
    advantages = torch.zeros_like(values)
    for row in range(len(values)):
        next_value = next_advantage = 0.0
        for t in reversed(response_mask[row].nonzero().flatten().tolist()):
            delta = token_level_rewards[row, t] + gamma * next_value - values[row, t]
            advantages[row, t] = next_advantage = delta + gamma * lam * next_advantage
            next_value = values[row, t]
    kept = advantages[response_mask.bool()]
    return (advantages - kept.mean()) / (kept.var() + 1e-8).sqrt(), advantages + values


def restated_agg_loss(
    loss, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
):
    rows = [row[keep.bool()] for row, keep in zip(loss, mask, strict=True) if keep.any()]
    if mode == "token-mean":
        return sum(row.sum() for row in rows) / (batch_num_tokens or sum(map(len, rows))) * dp_size
    if mode == "token-sum":
        return sum(row.sum() for row in rows) * dp_size
    of_row = torch.mean if mode == "seq-mean-token-mean" else torch.sum
    total = sum(map(of_row, rows)) / (global_batch_size or len(rows)) * dp_size
    return total / (loss_scale_factor or mask.shape[1]) if mode == "seq-mean-token-sum-norm" else total


def restated_policy_loss(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    log_ratio = (log_prob - old_log_prob).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped, clipped = (
        -advantages * r for r in (ratio, ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high))
    )
    once = torch.maximum(unclipped, clipped)
    bound = -config.clip_ratio_c * advantages
    loss = torch.where(advantages < 0, torch.minimum(once, bound), once)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    kept = response_mask.bool()
    metrics = {
        "actor/pg_clipfrac": (clipped > unclipped)[kept].float().mean().item(),
        "actor/ppo_kl": -log_ratio[kept].mean().item(),
        "actor/pg_clipfrac_lower": ((once > bound) & (advantages < 0))[kept].float().mean().item(),
    }
    return restated_agg_loss(loss, response_mask, loss_agg_mode, **config.global_batch_info), metrics


def restated_logprobs(logits, labels, inplace_backward=True):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


RESTATED = {
    "compute_gae_advantage_return": restated_gae,
    "compute_policy_loss_vanilla": restated_policy_loss,
    "logprobs_from_logits": restated_logprobs,
}


@pytest.fixture(params=["restated", *(["installed"] if find_spec("verl") else [])])
def theirs(request):
    """Functions by verl's names: of this file, and of verl."""
    if request.param == "restated":
        return SimpleNamespace(**RESTATED)
    core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    functional = pytest.importorskip("verl.utils.torch_functional", exc_type=ImportError)
    functions = {name: getattr(core, name, None) or getattr(functional, name) for name in RESTATED}
    return SimpleNamespace(**functions)


@pytest.mark.parametrize("name, function", RESTATED.items())
def test_a_function_takes_the_arguments_of_verls(name, function):
    ours = inspect.signature(getattr(verl, name)).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_advantages_and_returns_are_verls_on_kept_tokens(theirs, gamma, lam, dtype):
    rewards, values = critic_batch()
    if dtype is torch.bool and theirs.compute_gae_advantage_return is not restated_gae:
        pytest.skip("verl subtracts its mask from 1, which torch refuses for bool")
    mask = MASK.to(dtype)
    ours = verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    for got, want in zip(ours, theirs.compute_gae_advantage_return(rewards, values, mask, gamma, lam), strict=True):
        torch.testing.assert_close(got[KEPT], want[KEPT], rtol=1e-5, atol=1e-6)
        assert (got[~KEPT] == 0).all() and not got.requires_grad


def test_advantages_are_whitened_by_the_unbiased_variance_and_those_of_ppo_advantages_by_that_of_n():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    ours, _ = verl.compute_gae_advantage_return(rewards, values, mask, 1.0, 1.0)
    zero = torch.zeros(1, 3)
    population = ppo_advantages(zero, zero, values, rewards[:, -1], mask, gae_lambda=1.0).advantages
    torch.testing.assert_close(ours, population * (2 / 3) ** 0.5)


def test_what_stands_in_dropped_slots_changes_nothing():
    rewards, values = critic_batch()
    clean = verl.compute_gae_advantage_return(rewards, values, MASK, 0.9, 0.5)
    dirty = verl.compute_gae_advantage_return(poisoned(rewards), poisoned(values), MASK, 0.9, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    logprobs, old, advantages = policy_batch()
    for mode in verl.LOSS_AGG_MODES:
        loss, metrics = verl.compute_policy_loss_vanilla(old, logprobs, advantages, MASK, mode, config())
        again = poisoned(logprobs).requires_grad_()
        same, same_metrics = verl.compute_policy_loss_vanilla(
            poisoned(old), again, poisoned(advantages), MASK, mode, config()
        )
        assert torch.equal(loss, same) and metrics == same_metrics
        assert torch.equal(gradient(loss, logprobs), gradient(same, again))


@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_tokens_than_a_variance_needs_are_refused_as_by_verl(theirs, kept):
    mask = torch.zeros_like(MASK)
    mask[0, :kept] = 1
    with pytest.raises(ValueError, match="at least 2 kept tokens"):
        verl.compute_gae_advantage_return(*critic_batch(), mask, 1.0, 0.95)
    if theirs.compute_gae_advantage_return is not restated_gae:
        with pytest.raises(ValueError):
            theirs.compute_gae_advantage_return(*critic_batch(), mask, 1.0, 0.95)


GLOBAL = {"dp_size": 4, "batch_num_tokens": 90, "global_batch_size": 20}
COUNTS = [{}, GLOBAL, {"loss_scale_factor": 100}]


@pytest.mark.parametrize("mode", verl.LOSS_AGG_MODES)
@pytest.mark.parametrize("counts", COUNTS, ids=["own", "global", "scaled"])
@pytest.mark.parametrize("bounds", [(0.2, 0.2, 3.0), (0.2, 0.28, 10.0), (0.3, 0.1, 1.5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_gradients_and_metrics_are_verls(theirs, mode, counts, bounds, weighted):
    logprobs, old, advantages = policy_batch()
    weights = torch.rand(MASK.shape, generator=torch.Generator().manual_seed(2)) * 2 if weighted else None
    arguments = (old, logprobs, advantages, MASK.bool(), mode, config(*bounds, **counts), weights)
    loss, metrics = verl.compute_policy_loss_vanilla(*arguments)
    want, want_metrics = theirs.compute_policy_loss_vanilla(*arguments)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(want, logprobs), rtol=1e-5, atol=1e-7)
    assert metrics == pytest.approx(want_metrics, rel=1e-5)
    assert metrics["actor/pg_clipfrac"] > 0


def test_log_ratios_are_bounded_as_verls(theirs):
    logprobs, old, advantages = policy_batch()
    with torch.no_grad():
        logprobs[0, 0] = old[0, 0] + 21
        logprobs[0, 1] = old[0, 1] - 21
    results = [
        function(old, logprobs, advantages, MASK.bool(), "token-mean", config())
        for function in (verl.compute_policy_loss_vanilla, theirs.compute_policy_loss_vanilla)
    ]
    (loss, metrics), (want, want_metrics) = results
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(want, logprobs), rtol=1e-5, atol=1e-7)
    assert metrics == pytest.approx(want_metrics, rel=1e-5)


def test_a_bound_that_is_not_set_is_clip_ratio():
    logprobs, old, advantages = policy_batch()
    loss, _ = verl.compute_policy_loss_vanilla(old, logprobs, advantages, MASK, config=config(None, None))
    assert torch.equal(loss, verl.compute_policy_loss_vanilla(old, logprobs, advantages, MASK, config=config())[0])


def test_one_nan_that_is_kept_makes_the_loss_nan_with_two_bounds_too():
    logprobs, old, advantages = policy_batch()
    advantages[0, 0] = torch.nan
    for settings in (config(), config(0.2, 0.3)):
        assert verl.compute_policy_loss_vanilla(old, logprobs, advantages, MASK, config=settings)[0].isnan()


@pytest.mark.parametrize("mode", verl.LOSS_AGG_MODES)
def test_a_batch_without_a_token_has_loss_and_gradient_0(mode):
    logprobs, old, advantages = policy_batch()
    loss, metrics = verl.compute_policy_loss_vanilla(old, logprobs, advantages, 0 * MASK, mode, config())
    assert loss == 0 and (gradient(loss, logprobs) == 0).all() and set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_agg_mode": "token-median"}, "loss_agg_mode: expected one of token-mean, .*, got 'token-median'"),
        ({"config": None}, "config: expected verl's ActorConfig, got None"),
        ({"config": config(dp_size=2)}, "batch_num_tokens: expected the count over all ranks with dp_size 2"),
        (
            {"config": config(dp_size=2), "loss_agg_mode": "seq-mean-token-sum"},
            "global_batch_size: expected the count over all ranks",
        ),
        ({"config": config(dual_clip=1.0)}, "dual_clip: expected a number above 1"),
    ],
)
def test_what_verl_refuses_is_refused_by_name(changes, message):
    logprobs, old, advantages = policy_batch()
    with pytest.raises(ValueError, match=message):
        verl.compute_policy_loss_vanilla(old, logprobs, advantages, MASK, **{"config": config(), **changes})


def test_logprobs_and_their_gradient_are_verls(theirs):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 40, generator=g).requires_grad_()
    labels = torch.randint(40, (3, 5), generator=g)
    upstream = torch.randn(3, 5, generator=g)
    results = [f(logits, labels) for f in (verl.logprobs_from_logits, theirs.logprobs_from_logits)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(r, logits, upstream)[0] for r in results), rtol=1e-4, atol=1e-6)


def test_logprobs_of_half_precision_are_float32():
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(4)
    got = verl.logprobs_from_logits(logits, labels, inplace_backward=False)
    torch.testing.assert_close(got, restated_logprobs(logits.float(), labels))


@pytest.fixture
def host(monkeypatch):
    """A verl of three modules with the functions that `patch` looks at; the third imported one of them by name."""

    def module(name, **content):
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def agg_loss(loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None,
                 loss_scale_factor=None):  # fmt: skip
        raise NotImplementedError

    for package in ("verl", "verl.trainer", "verl.workers"):
        module(package)
    losses = {}
    core = module(
        "verl.trainer.ppo.core_algos",
        compute_gae_advantage_return=restated_gae,
        compute_policy_loss_vanilla=restated_policy_loss,
        agg_loss=agg_loss,
        ADV_ESTIMATOR_REGISTRY={"gae": restated_gae},
        POLICY_LOSS_REGISTRY=losses,
        register_policy_loss=lambda name: lambda function: losses.setdefault(name, function),
    )
    module("verl.trainer.ppo", core_algos=core)
    functional = module("verl.utils.torch_functional", logprobs_from_logits=restated_logprobs)
    module("verl.utils", torch_functional=functional)
    worker = module("verl.workers.engine", its_name=restated_logprobs)
    monkeypatch.setattr(hosts, "version", lambda package: "0.9.1")
    yield SimpleNamespace(core=core, functional=functional, worker=worker)
    verl.unpatch()


def in_place(host):
    core = host.core
    return [
        core.compute_gae_advantage_return, core.ADV_ESTIMATOR_REGISTRY["gae"], host.functional.logprobs_from_logits,
        host.worker.its_name, core.POLICY_LOSS_REGISTRY.get("fastrl"),
    ]  # fmt: skip


VERLS = [restated_gae, restated_gae, restated_logprobs, restated_logprobs, None]
OURS = [
    verl.compute_gae_advantage_return, verl.compute_gae_advantage_return, verl.logprobs_from_logits,
    verl.logprobs_from_logits, verl.compute_policy_loss_vanilla,
]  # fmt: skip


def test_a_patch_reaches_every_place_and_is_taken_back_whole(host):
    assert in_place(host) == VERLS
    for _ in range(2):  # twice is once
        verl.patch()
        assert in_place(host) == OURS
    for _ in range(2):
        verl.unpatch()
        assert in_place(host) == VERLS


@pytest.mark.parametrize(
    "place, name",
    [("core", "compute_gae_advantage_return"), ("core", "agg_loss"), ("functional", "logprobs_from_logits")],
)
def test_other_arguments_are_refused_and_nothing_is_changed(host, place, name):
    setattr(getattr(host, place), name, lambda surprise: None)
    before = in_place(host)
    with pytest.raises(
        RuntimeError, match=f"verl's {name}: expected the arguments .*; got surprise.*nothing was changed"
    ):
        verl.patch()
    assert in_place(host) == before


def test_a_version_that_was_not_tested_is_patched_with_one_warning(host, monkeypatch):
    monkeypatch.setattr(hosts, "version", lambda package: "0.12.0")
    with pytest.warns(UserWarning, match="verl 0.12.0 was not tested") as warned:
        verl.patch()
        verl.patch()
    assert len(warned) == 1 and in_place(host) == OURS


def test_without_verl_patch_says_what_to_install(monkeypatch):
    def missing(package):
        raise hosts.PackageNotFoundError(package)

    monkeypatch.setattr(hosts, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="verl is not installed: pip install 'verl>=0.7.0,<=0.9.1'"):
        verl.patch()
    verl.unpatch()


def test_verls_own_trainer_computes_the_same_patched():
    """Through verl's compute_advantage and get_policy_loss_fn, with its ActorConfig, as its trainer and workers do."""
    trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer", exc_type=ImportError)
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    settings = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28)
    settings.global_batch_info.update(GLOBAL, loss_scale_factor=None)
    rewards, values = critic_batch()
    logprobs, old, _ = policy_batch()

    def results(loss_mode):
        batch = {"token_level_rewards": rewards, "values": values, "response_mask": MASK}
        data = SimpleNamespace(batch=batch, non_tensor_batch={})
        batch = trainer.compute_advantage(data, core_algos.AdvantageEstimator.GAE, 1.0, 0.95, config={}).batch
        loss_of = core_algos.get_policy_loss_fn(loss_mode)
        arguments = {"log_prob": logprobs, "old_log_prob": old, "advantages": batch["advantages"]}
        loss, metrics = loss_of(**arguments, response_mask=KEPT, loss_agg_mode="token-mean", config=settings)
        kept = [batch[key][KEPT] for key in ("advantages", "returns")]
        return [*kept, loss, gradient(loss, logprobs), torch.tensor(list(metrics.values()))], list(metrics)

    (before, names), own = results("vanilla"), core_algos.compute_gae_advantage_return
    verl.patch()
    try:
        assert core_algos.compute_gae_advantage_return is not own
        after, same_names = results("fastrl")
    finally:
        verl.unpatch()
    assert names == same_names
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert core_algos.compute_gae_advantage_return is own and core_algos.get_adv_estimator_fn("gae") is own
    with pytest.raises(ValueError):
        core_algos.get_policy_loss_fn("fastrl")
