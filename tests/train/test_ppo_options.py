"""PPO's options: each reaches its op, gradients add up, state survives, and contradictions are refused at once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import reported, tiny_run
from safetensors.torch import load_file

from fastrl.commands.export import export
from fastrl.data import Prompt
from fastrl.data.batches import sft_batch
from fastrl.data.templates import record_template, recorded_template
from fastrl.models import load_policy, load_tokenizer, response_logprobs
from fastrl.train import ppo, ppo_state, ppo_update
from fastrl.train.experience import make_experience
from fastrl.train.losses import sft_loss
from fastrl.train.ppo_state import PPOState, compute_advantages
from fastrl.train.ppo_update import minibatch_loss
from fastrl.train.ptx import load_ptx, ptx_batches, ptx_gradients
from fastrl.train.roles import load_roles, tune_roles


@pytest.fixture
def build(tmp_path, tiny_policy, tiny_scalar):
    _, cfg = tiny_run("ppo", tmp_path, tiny_policy, tiny_scalar)
    return lambda **changes: replace(cfg, **{"iterations": 2, "eval_every": 0, **changes})


def ready(cfg: ppo.PPOConfig, moved: float = 0.05):
    """Roles whose policy has left its reference, tokenizer, and the experience of 8 ragged responses."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(cfg.model)
    roles = tune_roles(load_roles(cfg.model, cfg.reward_model, tokenizer, tuner=cfg), cfg)
    with torch.no_grad():
        for parameter in trained(roles.policy):
            parameter.add_(torch.randn_like(parameter), alpha=moved)
    trajectory = ppo.sample(roles.policy, tokenizer, [Prompt([70 + i] * (1 + i), "") for i in range(8)], cfg, 1)
    scored = ppo.score_samples(roles, trajectory, cfg)
    shaped = compute_advantages(scored, trajectory.response_mask, cfg, PPOState())
    return roles, tokenizer, make_experience(trajectory, scored, shaped)


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(loss: torch.Tensor, model) -> torch.Tensor:
    found = torch.autograd.grad(loss, trained(model), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained(model), found, strict=True)]
    )


def loss_of(roles, experience, cfg) -> torch.Tensor:
    rows, kept = torch.arange(len(experience.returns)), int(experience.response_mask.sum())
    return minibatch_loss(rows, roles=roles, experience=experience, cfg=cfg, kl_coef=cfg.kl_coef, kept=kept, parts=[])


# --- options reach their ops


def test_every_option_reaches_its_op(build, monkeypatch):
    """The settings' names and numbers, all unlike the defaults."""
    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def spied(*arguments, **options):
            seen[name] = options
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, spied)

    spy(ppo_state, "ppo_advantages")
    spy(ppo_update, "ppo_loss")
    for_advantages = {"kl_clip": 3.0, "score_clip": 2.5, "gamma": 0.9, "gae_lambda": 0.8, "kl_estimator": "k2"}
    for_loss = {"clip_coef": 0.3, "vf_clip_coef": None, "vf_coef": 0.7, "ent_coef": 0.02, "dual_clip": 2.0}
    flags = {"center_advantages": False, "scale_advantages": False}
    cfg = build(iterations=1, epochs=1, kl_coef=0.125, **for_advantages, **for_loss, **flags)
    ppo.main(cfg)
    assert seen["ppo_advantages"] == {**for_advantages, "kl_coef": 0.125, "center": False, "scale": False}
    entropy = seen["ppo_loss"].pop("entropy")
    assert entropy.requires_grad and (entropy.detach() >= 0).all()
    assert {**for_loss, "denominator": seen["ppo_loss"]["denominator"]} == seen["ppo_loss"]
    ppo.main(replace(cfg, ent_coef=0.0))
    assert seen["ppo_loss"]["entropy"] is None  # it costs a pass of its own in the head


# --- gradients


def test_the_entropy_bonus_is_of_the_updates_own_pass(build):
    cfg = build(temperature=0.8, kl_coef=0.0)
    roles, _, e = ready(cfg)
    plain, bonus = (gradient(loss_of(roles, e, replace(cfg, ent_coef=c)), roles.policy) for c in (0.0, 0.5))
    _, entropy = response_logprobs(
        roles.policy, e.input_ids, e.attention_mask, e.response_mask, temperature=0.8, return_entropy=True
    )
    expected = gradient(entropy.sum() / e.response_mask.sum(), roles.policy)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(bonus - plain, -0.5 * expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_adds_its_gradient(build, estimator):
    """Against lines of torch, on the log-probs of the update's pass and the reference's; the critic's is the same."""
    cfg = build(temperature=0.8, kl_estimator=estimator, kl_coef=0.5)
    roles, _, e = ready(cfg)
    in_reward, in_loss = loss_of(roles, e, cfg), loss_of(roles, e, replace(cfg, kl_in="loss"))
    logprobs = response_logprobs(roles.policy, e.input_ids, e.attention_mask, e.response_mask, temperature=0.8)
    d = (logprobs - e.ref_logprobs)[e.response_mask]
    penalty = 0.5 * (d**2 / 2 if estimator == "k2" else torch.exp(-d) - 1 + d).mean()
    torch.testing.assert_close(in_loss - in_reward, penalty)
    expected = gradient(penalty, roles.policy)
    assert expected.norm() > 1e-3
    got = gradient(in_loss, roles.policy) - gradient(in_reward, roles.policy)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)


def test_the_kl_is_in_the_reward_or_in_the_loss(build):
    """In the loss it leaves rewards alone, and is reported all the same; pitfall 21."""
    cfg = build(kl_coef=0.5, kl_estimator="k3", epochs=1, eval_every=0)
    for kl_in in ("reward", "loss"):
        cfg = replace(cfg, kl_in=kl_in, output=f"{cfg.output}_{kl_in}")
        ppo.main(cfg)
        last = [r for r in reported(cfg.output) if r["kind"] == "train"][-1]
        assert last["kl_k3"] > 0
        penalty = 0.5 * last["kl_k3"] if kl_in == "reward" else 0
        assert last["reward"] == pytest.approx(last["score"] - penalty, abs=1e-5)


@pytest.mark.parametrize("size", [1, 5])
def test_the_gradient_with_ptx_is_the_sum_of_both(build, size):
    """The SFT loss is the mean over supervised tokens, whatever the micro-batches."""
    cfg = build(kl_coef=0.0, ptx_coef=3.0, ptx_max_length=64, micro_batch_size=size)
    cfg = replace(cfg, ptx_data=cfg.data)
    roles, tokenizer, e = ready(cfg)
    examples = load_ptx(cfg, roles.policy, tokenizer)[:5]
    assert len({len(x.input_ids) for x in examples}) > 1
    targets = sum(sum(x.loss_mask[1:]) for x in examples)
    whole = sft_loss(roles.policy, sft_batch(examples, tokenizer.pad_token_id), denominator=targets)
    expected = gradient(loss_of(roles, e, cfg), roles.policy) + 3.0 * gradient(whole, roles.policy)
    loss_of(roles, e, cfg).backward()
    part = ptx_gradients(roles.policy, examples, cfg, tokenizer.pad_token_id)
    torch.testing.assert_close(part, 3.0 * whole.detach())
    together = torch.cat([p.grad.flatten() for p in trained(roles.policy)])
    torch.testing.assert_close(together, expected, atol=2e-6, rtol=1e-4)


def test_ptx_takes_plain_texts_and_names_of_columns(build, tmp_path):
    """As InstructGPT's: every token but the first is a target, whatever template the policy was trained with."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": "once upon"}) + "\n" for _ in range(4)))
    cfg = build(ptx_data=str(path), ptx_template="none", ptx_columns="text=body", ptx_max_length=64)
    roles, tokenizer, _ = ready(cfg)
    assert record_template(tokenizer) == "chat"
    (example, *_) = load_ptx(cfg, roles.policy, tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("once upon")
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)
    assert recorded_template(tokenizer) == "chat"


def test_adams_epsilon_is_torchs(build):
    """pitfall 40: a first step is rate * g / (|g| + eps). TensorFlow adds eps before the correction of the bias, as if
    it were eps / sqrt(1 - 0.999) here: give `adam_eps` 32 times the value for its first steps."""
    cfg = build(adam_eps=1e-3, learning_rate=0.1, schedule="constant")
    roles, *_ = ready(cfg)
    learner, critic = ppo_update.make_learners(roles, cfg)
    gradients = [torch.randn_like(p) * 1e-3 for p in trained(roles.policy)]
    before = [p.detach().clone() for p in trained(roles.policy)]
    for parameter, gradient_of in zip(trained(roles.policy), gradients, strict=True):
        parameter.grad = gradient_of.clone()
    learner.optimizer.step()
    for parameter, start, g in zip(trained(roles.policy), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.1 * g / (g.abs() + 1e-3), atol=1e-5, rtol=1e-4)
    assert [group["eps"] for group in critic.optimizer.param_groups] == [1e-3]


# --- what iterations hand on


def test_the_coefficient_follows_the_reported_kl(build):
    """pitfall 22: from record to record by the controller's formula, from the `kl_k1` that stands in the record."""
    cfg = build(iterations=3, epochs=1, kl_coef=0.1, kl_target=0.3, kl_horizon=20, learning_rate=1e-2)
    ppo.main(cfg)
    records = [r for r in reported(cfg.output) if r["kind"] == "train"]
    coef = 0.1
    for record in records:
        assert record["kl_coef"] == pytest.approx(coef, rel=1e-9)
        assert record["reward"] == pytest.approx(record["score"] - coef * record["kl_k1"], abs=1e-5)
        coef *= 1 + min(max(record["kl_k1"] / 0.3 - 1, -0.2), 0.2) * 5 / 20
    assert len({r["kl_coef"] for r in records}) == 3


def test_scores_are_normalised_by_all_of_the_run(build, monkeypatch):
    """Those of the iteration included, held-out ones not; what is reported as `score` stays the reward model's."""
    seen = []
    original = ppo.score_samples

    def score_samples(roles, trajectory, *rest):
        scored = original(roles, trajectory, *rest)
        seen.append(scored.scores)
        return scored

    monkeypatch.setattr(ppo, "score_samples", score_samples)
    cfg = build(score_norm=True, kl_coef=0.0)
    ppo.main(cfg)
    records = reported(cfg.output)
    assert [r["kind"] for r in records] == ["eval", "train", "train", "eval"]
    for record, scores in zip(records, seen, strict=True):
        assert record["score"] == pytest.approx(float(scores.mean()), abs=1e-6)
    both = torch.cat(seen[1:3])
    known = [seen[1], both, both]
    for record, among, scores in zip(records[1:], known, seen[1:], strict=True):
        normalised = (scores - among.mean()) / among.std(correction=0)
        assert record["reward"] == pytest.approx(float(normalised.mean()), abs=1e-5)


def test_long_responses_lose_score(build):
    cfg = build(iterations=1, length_penalty=0.5, length_free=3, kl_coef=0.0, no_stop_score=2.0)
    ppo.main(cfg)
    record = reported(cfg.output)[1]
    assert record["stopped"] == 0 and record["score"] == 2.0  # all of 5 tokens
    assert record["reward"] == pytest.approx(2.0 - 0.5 * 2)


def test_ptx_batches_are_those_of_their_iteration():
    """Every example once before any comes again; an iteration's do not depend on where the run began."""
    cfg = ppo.PPOConfig(
        model="", reward_model="", data="", epochs=2, batch_size=5, minibatch_size=3, ptx_batch_size=2, seed=3
    )
    examples = list(range(7))
    stream = ptx_batches(examples, cfg, 0)
    iterations = [next(stream) for _ in range(5)]
    assert [[len(step) for step in iteration] for iteration in iterations] == [[2, 2, 2, 2]] * 5
    order = [example for iteration in iterations for step in iteration for example in step]
    assert sorted(order[:7]) == sorted(order[7:14]) == examples and order[:7] != order[7:14]
    for done in range(5):
        assert next(ptx_batches(examples, cfg, done)) == iterations[done]
    assert list(ptx_batches([], cfg, 0)) == []


# --- the best policy


@pytest.mark.parametrize(("scores", "best"), [((0.0, 1.0, 1.0), 1), ((3.0, 2.0, 1.0), 0)])
def test_the_best_policy_is_kept(build, monkeypatch, tmp_path, scores, best):
    """By held-out score, the first of equal ones, the untrained policy among them; an ordinary folder."""
    summarise, remaining = ppo.summarise, iter(scores)

    def scripted(trajectory, given, stats, estimator):
        metrics = summarise(trajectory, given, stats, estimator)
        held_out = len(trajectory.stopped) != 5
        return metrics | {"score": next(remaining)} if held_out else metrics

    monkeypatch.setattr(ppo, "summarise", scripted)
    cfg = build(eval_every=1, keep_best=True, learning_rate=1e-2)
    final = ppo.main(cfg)
    evaluations = [r for r in reported(cfg.output) if r["kind"] == "eval"]
    assert [r["best_step"] for r in evaluations] == [0, *([best] * 2)]
    assert (final["best_step"], final["best_score"]) == (best, max(scores))
    kept = load_file(Path(cfg.output) / "best/adapter_model.safetensors")
    if best:
        step = load_file(Path(cfg.output) / f"checkpoints/step-00000{best}/adapter_model.safetensors")
        assert all(torch.equal(value, step[name]) for name, value in kept.items())
    else:
        assert all((value == 0).all() for name, value in kept.items() if "lora_B" in name)
    assert not (Path(cfg.output) / "best/critic").exists()
    load_policy(str(Path(cfg.output) / "best"))  # as chat does
    export(str(Path(cfg.output) / "best"), tmp_path / "exported")


def test_an_earlier_runs_best_is_put_aside_with_it(build):
    cfg = build(iterations=1, epochs=1, keep_best=True)
    ppo.main(cfg)
    ppo.main(replace(cfg, keep_best=False))
    assert not (Path(cfg.output) / "best").exists() and Path(f"{cfg.output}.previous/best").exists()


# --- odd input


def test_responses_that_all_reach_the_limit_are_told_once(build, capsys):
    cfg = build()
    ppo.main(cfg)
    assert all(r["stopped"] == 0 for r in reported(cfg.output))
    told = "warning: all 5 responses reached max_new_tokens 5 without a stop token"
    assert capsys.readouterr().out.count(told) == 1


def test_a_response_is_never_empty(build, monkeypatch):
    """One that stops at once is its stop token, which is scored and learned from."""
    monkeypatch.setattr(ppo, "stop_ids", lambda *_: list(range(259)))
    cfg = build(iterations=1)
    metrics = ppo.main(cfg)
    train = reported(cfg.output)[1]
    assert metrics["response_tokens"] == train["response_tokens"] == 1 and train["stopped"] == 1
    assert all(math.isfinite(value) for value in train.values() if isinstance(value, float))


def test_fewer_prompts_than_a_batch_are_answered_several_times(build, tmp_path):
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(3)))
    cfg = build(data=str(path), batch_size=8, minibatch_size=8, iterations=1)
    answers = []

    def sample(policy, tokenizer, prompts, cfg, iteration):
        trajectory = original(policy, tokenizer, prompts, cfg, iteration)
        answers.append((len(prompts), {tuple(row) for row in trajectory.responses.tolist()}))
        return trajectory

    original = ppo.sample
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ppo, "sample", sample)
        ppo.main(cfg)
    assert [count for count, _ in answers] == [1, 8, 1]
    assert all(len(different) > 3 for count, different in answers if count == 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_in": "loss"}, "kl_estimator: expected k2 or k3 with kl_in loss, got k1, whose gradient is 0"),
        ({"kl_in": "los"}, "kl_in: expected one of reward, loss, got 'los'; did you mean 'loss'?"),
        ({"kl_in": "loss", "kl_estimator": "k2", "kl_clip": 1.0}, "kl_clip: expected kl_in reward, where it clips"),
        ({"kl_target": 0.0}, "kl_target: expected a number above 0"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef: expected a number above 0 with kl_target"),
        ({"kl_target": 6.0, "kl_horizon": 4}, "kl_horizon: expected at least batch_size 5, got 4"),
        ({"kl_horizon": 500}, "kl_horizon: expected kl_target beside it, got 500 alone, which changes nothing"),
        ({"length_free": 2}, "length_free: expected length_penalty beside it, got 2 alone"),
        ({"length_penalty": 1.0, "length_free": 5}, "length_free: expected less than max_new_tokens 5, got 5"),
        ({"ptx_coef": 27.8}, "ptx_coef: expected ptx_data beside it, got 27.8 alone"),
        ({"ptx_columns": "prompt=q"}, "ptx_columns: expected ptx_data beside it"),
        ({"dual_clip": 1.0}, "dual_clip: expected a number above 1"),
        ({"gamma": 1.5}, "gamma: expected a number of at least 0 and of at most 1, got 1.5"),
        ({"ptx_data": "nowhere.jsonl", "ptx_max_length": 64}, "nowhere.jsonl"),
        ({"ptx_data": "nowhere.jsonl"}, "ptx_max_length: expected at most 256 tokens, the model's context, got 512"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(build, changes, message):
    cfg = build(**changes)
    with pytest.raises((ValueError, OSError), match=message):
        ppo.main(cfg)
    assert not Path(cfg.output).exists()
