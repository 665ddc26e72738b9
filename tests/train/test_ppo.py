"""PPO: alignment of log-probs, values and scores, the first ratio, learning, repeatability, what is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from torch.optim import SGD
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrl.checks import NonFiniteError
from fastrl.models import as_policy, base_model, load_tokenizer, response_logprobs
from fastrl.ops import PPOStats, ppo_loss
from fastrl.rollout import Trajectory
from fastrl.run.optim import Learner, make_schedule
from fastrl.run.run import Run
from fastrl.train import ppo, ppo_update
from fastrl.train.experience import (
    Experience,
    ScoredTrajectory,
    by_length,
    make_experience,
    map_rows,
    merge_stats,
    response_scores,
    select_rows,
)
from fastrl.train.ppo import PPOConfig, main, sample, score_samples
from fastrl.train.ppo_state import PPOState, compute_advantages, summarise
from fastrl.train.ppo_update import update
from fastrl.train.roles import load_roles, tune_roles

EOS, LIKED = 1, slice(130, 259)


@pytest.fixture(scope="session")
def letter_judge(tmp_path_factory, tiny_scalar) -> Path:
    """Reward model whose score depends on the last token alone: near 1 for half of the vocabulary, else near -1."""
    folder = tmp_path_factory.mktemp("judge") / "scalar"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_scalar)
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream carries the embedding unchanged
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = -embedding.norm(dim=1)
        embedding[LIKED, 0] *= -1
        model.score.weight.zero_()
        model.score.weight[0, 0] = 0.25
    model.save_pretrained(folder)
    load_tokenizer(tiny_scalar).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [{"prompt": "q" * (1 + i % 5) + str(i)} for i in range(200)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def config(tiny_policy, letter_judge, prompts, tmp_path):
    def build(**changes) -> PPOConfig:
        settings = {
            "model": str(tiny_policy),
            "reward_model": str(letter_judge),
            "data": str(prompts),
            "output": str(tmp_path / "run"),
            "iterations": 2,
            "batch_size": 8,
            "minibatch_size": 4,
            "micro_batch_size": 2,
            "epochs": 2,
            "max_new_tokens": 6,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "lora_rank": 4,
        }
        return PPOConfig(**{**settings, **changes})

    return build


TRAJECTORY = Trajectory(
    #                          P = 3     R = 4
    input_ids=torch.tensor([[70, 71, 72, 80, 81, 1, 0], [0, 0, 73, 82, 83, 84, 85], [0, 74, 75, 1, 0, 0, 0]]),
    attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool(),
    responses=torch.tensor([[80, 81, 1, 0], [82, 83, 84, 85], [1, 0, 0, 0]]),
    response_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool(),
    stopped=torch.tensor([True, False, True]),
)  # fmt: skip
SEQUENCES = [([70, 71, 72], [80, 81, 1]), ([73], [82, 83, 84, 85]), ([74, 75], [1])]


def ready(cfg: PPOConfig, *, jitter: float = 0.0):
    """Roles and tokenizer; `jitter` moves the trained models away from the frozen ones."""
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    roles = load_roles(cfg.model, cfg.reward_model, tokenizer, tuner=cfg, dtype=cfg.dtype)
    roles = tune_roles(roles, cfg)
    with torch.no_grad():
        for model in (roles.policy, roles.critic):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=jitter)
    return roles, tokenizer


def experience_of(roles, cfg: PPOConfig, trajectory: Trajectory) -> Experience:
    scored = score_samples(roles, trajectory, cfg)
    shaped = compute_advantages(scored, trajectory.response_mask, cfg, PPOState())
    return make_experience(trajectory, scored, shaped)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update_once(roles, experience: Experience, cfg: PPOConfig, rate: float) -> dict[str, float]:
    """The update of the first iteration, by plain gradient descent."""
    run = Run(cfg, "ppo")
    run.step = 1
    learners = []
    for model in (roles.policy, roles.critic):
        optimizer = SGD(trained(model), lr=rate)
        learners.append(
            Learner(model, optimizer, make_schedule(optimizer, kind="constant", warmup_steps=0, total_steps=1))
        )
    return update(run, roles, learners, experience, cfg, kl_coef=cfg.kl_coef)


# ---- the data flow ----


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("size", [1, 3], ids=["one by one", "at once"])
def test_alignment_against_sequences_one_by_one(config, tiny_policy, tiny_scalar, rank, size):
    """pitfalls 2, 3, 5, 6, 18, 33: every number equals that of plain transformers on the unpadded sequence."""
    cfg = config(reward_model=str(tiny_scalar), lora_rank=rank, micro_batch_size=size, temperature=0.7)
    roles, _ = ready(cfg, jitter=0.05)
    scored = score_samples(roles, TRAJECTORY, cfg)
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny_scalar).eval()
    with torch.no_grad():
        for row, (prompt, response) in enumerate(SEQUENCES):
            ids, length, start = torch.tensor([prompt + response]), len(response), len(prompt) - 1
            targets = torch.tensor(response)[:, None]
            policy, sft = (
                (model(input_ids=ids).logits[0, start:-1] / 0.7).log_softmax(-1)
                for model in (roles.policy.model, reference)
            )
            entropy = -(policy.exp() * policy).sum(-1)
            critic = base_model(roles.critic.model)
            values = critic.score(critic.model(input_ids=ids).last_hidden_state)[0, start:-1, 0]
            for name, expected in {
                "logprobs": policy.gather(1, targets)[:, 0],
                "ref_logprobs": sft.gather(1, targets)[:, 0],
                "entropy": entropy,
                "values": values,
            }.items():
                actual = getattr(scored, name)[row]
                torch.testing.assert_close(actual[:length], expected, atol=2e-5, rtol=1e-4)
                assert name == "values" or (actual[length:] == 0).all()
            expected = reward_model(input_ids=ids).logits[0, 0]
            torch.testing.assert_close(scored.scores[row], expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(scored.logprobs, scored.ref_logprobs, atol=1e-2)


def test_advantages_of_a_hand_computed_row(config):
    """pitfall 6: the score lands on the last kept token, the KL penalty on each, lambda 0 gives one-step errors."""
    cfg = config(kl_coef=0.5, gae_lambda=0.0)
    scored = ScoredTrajectory(
        scores=torch.tensor([2.0]),
        logprobs=torch.tensor([[-1.0, -2.0, 9.0]]),
        entropy=torch.zeros(1, 3),
        ref_logprobs=torch.tensor([[-2.0, -1.0, -9.0]]),
        values=torch.tensor([[0.5, 1.0, 7.0]]),
    )
    shaped = compute_advantages(scored, torch.tensor([[True, True, False]]), cfg, PPOState())
    torch.testing.assert_close(shaped.kl, torch.tensor([[1.0, -1.0, 0.0]]))
    torch.testing.assert_close(shaped.rewards, torch.tensor([[-0.5, 2.5, 0.0]]))
    # one-step errors: -0.5 + 1.0 - 0.5 = 0 and 2.5 - 1.0 = 1.5; returns add the values
    torch.testing.assert_close(shaped.returns, torch.tensor([[0.5, 2.5, 0.0]]))
    torch.testing.assert_close(shaped.advantages, torch.tensor([[-1.0, 1.0, 0.0]]), atol=1e-4, rtol=0)


def test_score_is_on_the_last_kept_token_when_eos_is_the_pad_token(tiny_scalar):
    """pitfall 5, pitfall 18: a response that ends with eos == pad is scored there, not before and not after."""
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny_scalar).eval()
    ids = TRAJECTORY.input_ids.masked_fill(~TRAJECTORY.attention_mask, EOS)
    scores = response_scores(reward_model, TRAJECTORY._replace(input_ids=ids), 3)
    with torch.no_grad():
        for row, (prompt, response) in enumerate(SEQUENCES):
            ids = torch.tensor([prompt + response])
            hidden = reward_model.model(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(scores[row], reward_model.score(hidden), atol=2e-5, rtol=1e-4)


def test_select_rows_drops_common_padding_only():
    part = select_rows(TRAJECTORY, torch.tensor([2, 0]))
    assert part.input_ids.tolist() == [[0, 74, 75, 1, 0, 0], [70, 71, 72, 80, 81, 1]]
    assert part.response_mask.tolist() == [[True, False, False], [True, True, True]]
    part = select_rows(TRAJECTORY, torch.tensor([2]))
    assert part.input_ids.tolist() == [[74, 75, 1]] and part.attention_mask.all()
    assert part.responses.tolist() == [[1]] and part.stopped.tolist() == [True]


def test_map_rows_puts_chunks_back_in_order():
    """pitfall 7: chunks are ordered by length, results are not."""
    lengths, tokens = map_rows(
        lambda part: [part.response_mask.sum(1), part.responses * part.response_mask], TRAJECTORY, 1
    )
    assert lengths.tolist() == [3, 4, 1]
    assert torch.equal(tokens, TRAJECTORY.responses * TRAJECTORY.response_mask)
    assert by_length(TRAJECTORY, torch.arange(3)).tolist() == [0, 1, 2]
    assert by_length(TRAJECTORY, torch.tensor([2, 0])).tolist() == [0, 2]


def test_metrics_ignore_masked_positions(config):
    """pitfall 9, pitfall 38, pitfall 39: NaN where masked changes no summary, advantage or loss statistic."""
    cfg = config(lora_rank=0, minibatch_size=3, micro_batch_size=3, epochs=1)
    results = []
    for poison in (0.0, math.nan):
        roles, _ = ready(cfg)
        scored = score_samples(roles, TRAJECTORY, cfg)
        mask = TRAJECTORY.response_mask
        logprobs, entropy, ref_logprobs, values = (torch.where(mask, x, poison) for x in scored[1:5])
        scored = scored._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
        shaped = compute_advantages(scored, mask, cfg, PPOState())
        experience = make_experience(TRAJECTORY, scored, shaped)
        summary = summarise(TRAJECTORY, scored.scores, shaped.stats, cfg.kl_estimator)
        results.append([summary, update_once(roles, experience, cfg, 1e-3)])
    assert results[0] == results[1]
    assert results[0][0]["response_tokens"] == pytest.approx(8 / 3)
    assert results[0][0]["stopped"] == pytest.approx(2 / 3)


def test_pooled_statistics_are_weighted_by_tokens():
    """pitfall 16: a micro-batch of one token counts as one token."""
    part = PPOStats(*torch.zeros(len(PPOStats._fields)))
    one = part._replace(tokens=torch.tensor(1.0), policy_loss=torch.tensor(8.0), ratio_max=torch.tensor(3.0))
    three = part._replace(tokens=torch.tensor(3.0), policy_loss=torch.tensor(4.0), ratio_max=torch.tensor(2.0))
    pooled = merge_stats([one, three])
    assert (pooled.tokens, pooled.policy_loss, pooled.ratio_max) == (4.0, 5.0, 3.0)


# ---- the update ----


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_ratio_is_one_on_the_first_minibatch(config, rank):
    """pitfall 1, pitfall 36: old and new log-probs agree, whatever the padding of the micro-batch."""
    cfg = config(lora_rank=rank, temperature=0.7, minibatch_size=8, epochs=1)
    roles, tokenizer = ready(cfg, jitter=0.05)
    prompts = [ppo.Prompt([70 + i] * (1 + i), "") for i in range(8)]
    experience = experience_of(roles, cfg, sample(roles.policy, tokenizer, prompts, cfg, 1))
    for rows in torch.arange(8).split(3):
        part = select_rows(experience, rows)
        logprobs = response_logprobs(
            roles.policy, part.input_ids, part.attention_mask, part.response_mask, temperature=0.7
        )
        ratio = (logprobs - part.old_logprobs)[part.response_mask].exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
        assert logprobs.requires_grad
    stats = update_once(roles, experience, cfg, 1e-3)
    assert stats["updates"] == 1 and 0 <= stats["first_approx_kl"] < 1e-7
    assert stats["clip_frac"] == 0


def test_merging_while_sampling_leaves_the_run_as_it_is(config):
    """In float32 the samples are the same; old log-probs are the unmerged model's, so the first ratio is still 1."""
    runs = [
        main(config(merge_adapter=merge, output=str(Path(config().output) / str(merge)))) for merge in (False, True)
    ]
    assert runs[1]["score"] == pytest.approx(runs[0]["score"], abs=1e-4)


def test_micro_batches_do_not_change_the_update(config):
    """pitfall 11, pitfall 16: one pass over 8 ragged rows and 8 over one give the same weights and statistics."""
    results = []
    for size in (8, 3, 1):
        cfg = config(lora_rank=0, minibatch_size=8, micro_batch_size=size, epochs=1)
        roles, tokenizer = ready(cfg)
        prompts = [ppo.Prompt([70 + i] * (1 + i), "") for i in range(8)]
        trajectory = sample(roles.policy, tokenizer, prompts, cfg, 1)
        experience = experience_of(roles, cfg, trajectory)
        stats = update_once(roles, experience, cfg, 0.1)
        weights = torch.cat([p.detach().flatten() for model in (roles.policy, roles.critic) for p in trained(model)])
        results.append((weights, stats))
    for weights, stats in results[1:]:
        torch.testing.assert_close(weights, results[0][0], atol=1e-5, rtol=1e-4)
        assert stats == pytest.approx(results[0][1], abs=1e-4)


def test_gradients_are_clipped_policy_and_critic_apart(config):
    cfg = config(lora_rank=0, max_grad_norm=0.01, minibatch_size=8, epochs=1)
    roles, tokenizer = ready(cfg)
    trajectory = sample(roles.policy, tokenizer, [ppo.Prompt([70, 71], "")] * 8, cfg, 1)
    experience = experience_of(roles, cfg, trajectory)
    before = [[p.detach().clone() for p in trained(model)] for model in (roles.policy, roles.critic)]
    stats = update_once(roles, experience, cfg, 1.0)
    assert stats["grad_norm"] > 0.01 and stats["critic_grad_norm"] > 0.01
    for model, old in zip((roles.policy, roles.critic), before, strict=True):
        moved = [(new.detach() - start).norm() for new, start in zip(trained(model), old, strict=True)]
        assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.slow
def test_target_kl_ends_the_updates_of_an_iteration(config):
    """pitfall 47: the first minibatch whose approx_kl is above the target is the last one."""
    counts = {}
    for target_kl in (None, 0.0005):
        cfg = config(target_kl=target_kl, learning_rate=0.05, iterations=1, epochs=4)
        main(cfg)
        counts[target_kl] = records(cfg)[1]["updates"]
    assert counts[None] == 8 and 2 <= counts[0.0005] < 8


@pytest.mark.parametrize("approx_kl, kl, updates", [(0.1, 0.1, 1), (4.9e5, -0.02, 4), (0.3, -0.7, 1), (0.01, 0.01, 4)])
def test_one_outlier_does_not_end_the_updates(config, monkeypatch, approx_kl, kl, updates):
    """Pitfall 47: one of 1000 tokens with a ratio of e^20 gives an approx_kl of 4.9e5 and a kl of -0.02; all tokens
    with a ratio of 2 have a kl of -0.7."""
    cfg = config(target_kl=0.05, epochs=2, minibatch_size=4)
    roles, tokenizer = ready(cfg, jitter=0.05)
    prompts = [ppo.Prompt([70 + i] * (1 + i), "") for i in range(8)]
    experience = experience_of(roles, cfg, sample(roles.policy, tokenizer, prompts, cfg, 1))

    def loss_with_ratio(logprobs, values, *rest, **options):
        loss, stats = ppo_loss(logprobs, values, *rest, **options)
        return loss * 0, stats._replace(approx_kl=torch.tensor(approx_kl), kl=torch.tensor(kl))

    monkeypatch.setattr(ppo_update, "ppo_loss", loss_with_ratio)
    stats = update_once(roles, experience, cfg, 1e-3)
    assert stats["updates"] == updates
    assert stats["ppo_kl"] == pytest.approx(kl)


# ---- whole runs ----


def records(cfg: PPOConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(cfg.output) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "length"), [(0, 2), (8, 1)], ids=["full", "lora"])
def test_a_learnable_reward_is_learned(config, rank, length):
    """pitfall 34: the judge likes half of the last tokens: the held-out score rises by far more than chance, and the
    KL to the reference, 0 before, grows: the reference is not the policy that is trained."""
    cfg = config(
        iterations=15,
        batch_size=64,
        minibatch_size=32,
        micro_batch_size=32,
        max_new_tokens=length,
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
        kl_coef=0.01,
        lora_rank=rank,
        eval_every=0,
    )
    main(cfg)
    first, last = records(cfg)[0], records(cfg)[-1]
    assert first["kind"] == last["kind"] == "eval"
    assert abs(first["score"]) < 0.5 and last["score"] > first["score"] + 0.5
    assert first["kl_k1"] == 0 and last["kl_k1"] > 0


@pytest.mark.slow
def test_same_seed_same_run_bit_for_bit(config, tmp_path):
    """pitfall 46: seeded before the adapters; sampling, order of minibatches and weights repeat."""
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cfg = config(output=str(tmp_path / name), seed=seed)
        main(cfg)
        timeless = [
            {k: v for k, v in record.items() if not k.startswith(("time_", "tokens_per_s", "peak_"))}
            for record in records(cfg)
        ]
        weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        runs.append((timeless, weights, (tmp_path / name / "samples.jsonl").read_text()))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0] and runs[0][1] != runs[2][1]


def test_reported_metrics(config):
    """pitfall 21: KL is named by its estimator; every reported number is finite; phases and speed are there."""
    cfg = config(kl_estimator="k3", iterations=1)
    main(cfg)
    train = records(cfg)[1]
    assert all(math.isfinite(value) for key, value in train.items() if key != "kind")
    assert {
        "score", "reward", "kl_k3", "kl_k3_per_token", "approx_kl", "clip_frac", "entropy", "value_loss",
        "explained_variance", "response_tokens", "stopped", "grad_norm", "critic_grad_norm", "lr",
        "time_sample_s", "time_score_s", "time_logprobs_s", "time_advantages_s", "time_update_s",
        "tokens_per_s", "peak_mem_gib",
    } <= set(train)  # fmt: skip
    assert train["reward"] == pytest.approx(train["score"] - 0.05 * train["kl_k3"], abs=1e-5)
    assert train["lr"] == 1e-3


def test_reported_kl_is_the_log_ratio_to_the_sft_policy(config):
    """pitfall 21: the mean over responses of the summed log-ratio, recomputed from the saved policy."""
    cfg = config(lora_rank=0, iterations=1, temperature=0.9)
    main(cfg)
    roles, tokenizer = ready(cfg)
    _, held_out = ppo.read_prompts(cfg, roles, tokenizer)
    after = AutoModelForCausalLM.from_pretrained(cfg.output).eval()
    trajectory = sample(as_policy(after), tokenizer, held_out, cfg, 0)
    batch = (trajectory.input_ids, trajectory.attention_mask, trajectory.response_mask)
    with torch.no_grad():
        kl = [response_logprobs(model, *batch, temperature=0.9).sum(1) for model in (after, roles.policy)]
    assert records(cfg)[-1]["kl_k1"] == pytest.approx(float((kl[0] - kl[1]).mean()), abs=1e-4)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_saved_models_load_without_fastrl(config, rank):
    """Policy and critic are ordinary folders: transformers alone, or with PEFT, gives the trained models."""
    cfg = config(lora_rank=rank, iterations=1)
    main(cfg)
    for folder, auto in (
        (Path(cfg.output), AutoModelForCausalLM),
        (Path(cfg.output) / "critic", AutoModelForSequenceClassification),
        (Path(cfg.output) / "checkpoints/step-000001", AutoModelForCausalLM),
    ):
        load_tokenizer(folder)
        if rank:
            settings = peft.PeftConfig.from_pretrained(folder)
            options = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
            base = auto.from_pretrained(settings.base_model_name_or_path, **options)
            model = peft.PeftModel.from_pretrained(base, folder).eval()
            with torch.no_grad(), model.disable_adapter():
                untrained = model(torch.tensor([[70, 71]])).logits
        else:
            model = auto.from_pretrained(folder).eval()
            source = cfg.model if auto is AutoModelForCausalLM else cfg.reward_model
            untrained = auto.from_pretrained(source)(torch.tensor([[70, 71]])).logits
        with torch.no_grad():
            assert not torch.equal(model(torch.tensor([[70, 71]])).logits, untrained)


def test_an_sft_adapter_is_merged_and_is_the_reference(config, tiny_policy, tmp_path):
    """pitfall 33: started from an adapter folder, the KL to the reference is 0 at first, and PEFT loads the result."""
    torch.manual_seed(1)
    sft = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_policy),
        peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    sft.save_pretrained(tmp_path / "sft")
    load_tokenizer(tiny_policy).save_pretrained(tmp_path / "sft")
    cfg = config(model=str(tmp_path / "sft"), iterations=1)
    main(cfg)
    assert records(cfg)[0]["kl_k1"] == 0 and records(cfg)[1]["kl_k1"] == 0
    roles, _ = ready(cfg)
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        torch.testing.assert_close(roles.policy.model(ids).logits, sft.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    base = peft.PeftConfig.from_pretrained(cfg.output).base_model_name_or_path
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    torch.testing.assert_close(logits, sft(ids).logits, atol=1e-4, rtol=1e-4)


def test_no_stop_score_looks_at_the_configured_stop_token(config):
    """pitfall 4: a response ended by the configured stop token, which is not eos, keeps its score."""
    cfg = config(no_stop_score=-7.0, reward_model=str(config().reward_model))
    roles, _ = ready(cfg)
    scores = score_samples(roles, TRAJECTORY, cfg).scores
    free = score_samples(roles, TRAJECTORY, config()).scores
    assert scores.tolist() == [free[0], -7.0, free[2]]
    cfg = config(stop_tokens="a,b,c,d,e,f,g", max_new_tokens=40)
    roles, tokenizer = ready(cfg)
    trajectory = sample(roles.policy, tokenizer, [ppo.Prompt([70, 71], "")] * 32, cfg, 1)
    stop = tokenizer.encode("abcdefg", add_special_tokens=False)
    last = trajectory.responses[torch.arange(32), trajectory.response_mask.sum(1) - 1]
    assert torch.equal(torch.isin(last, torch.tensor(stop)), trajectory.stopped)
    assert trajectory.stopped.any() and not (last == EOS).any()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(config, monkeypatch):
    """The second iteration's scores are NaN: the run names it, and the first iteration's weights stay on disk."""
    cfg = config(iterations=3, eval_every=1)
    real, calls = ppo.score_samples, []

    def poisoned(*args):
        calls.append(1)
        scored = real(*args)  # calls: evaluation, iteration 1, evaluation, iteration 2
        return scored._replace(scores=scored.scores * math.nan) if len(calls) == 4 else scored

    monkeypatch.setattr(ppo, "score_samples", poisoned)
    with pytest.raises(NonFiniteError, match=r"nan at step 2.*step-000001"):
        main(cfg)
    folders = [folder.name for folder in (Path(cfg.output) / "checkpoints").iterdir()]
    assert folders == ["step-000001"] and not (Path(cfg.output) / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(cfg.model)
    peft.PeftModel.from_pretrained(base, Path(cfg.output) / "checkpoints/step-000001")


def test_prompts_longer_than_the_context_do_not_crash(config, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (5, 9, 300, 1000) * 10))
    main(config(data=str(path), iterations=1, max_prompt_length=10_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, got 'k4'"),
        ({"minibatch_size": 0}, "minibatch_size: expected a number of at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"max_new_tokens": 256}, r"max_new_tokens \+ 1"),
        ({"stop_tokens": "abc"}, "stop token 'abc': expected one token"),
        ({"lora_rank": -1}, "lora_rank: expected a number of at least 0, got -1"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(ValueError, match=message):
        main(config(**changes))


def test_reward_model_with_another_vocabulary(config, tiny_scalar, tmp_path):
    tokenizer = load_tokenizer(tiny_scalar)
    tokenizer.add_tokens(["<extra>"])
    AutoModelForSequenceClassification.from_pretrained(tiny_scalar).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected the tokenizer of the policy"):
        main(config(reward_model=str(tmp_path / "other")))


def test_held_out_prompts_of_their_own(config, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"held {i}"}) + "\n" for i in range(20)))
    cfg = config(eval_data=str(path))
    roles, tokenizer = ready(cfg)
    training, held_out = ppo.read_prompts(cfg, roles, tokenizer)
    assert len(training) == 200 and [prompt.text for prompt in held_out] == [f"held {i}" for i in range(8)]


def test_settings_of_the_optimizer_and_the_adapters_reach_ppo(config):
    cfg = config(schedule="constant", warmup_steps=2, weight_decay=0.1, lora_alpha=12, iterations=3)
    main(cfg)
    records = map(json.loads, (Path(cfg.output) / "metrics.jsonl").read_text().splitlines())
    assert [r["lr"] for r in records if r["kind"] == "train"] == [5e-4, 1e-3, 1e-3]
    assert json.loads((Path(cfg.output) / "adapter_config.json").read_text())["lora_alpha"] == 12
    roles, _ = ready(config())
    assert roles.policy.model.peft_config["default"].lora_alpha == 2 * config().lora_rank
