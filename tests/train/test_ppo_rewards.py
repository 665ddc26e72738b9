"""PPO on weighted criteria, further reward models and functions: scores by hand, what is learned, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fastrl.data import load_prompts
from fastrl.models import load_policy, load_scalar_model, load_tokenizer, score_head
from fastrl.models.heads import base_model, normalize_head
from fastrl.models.saving import save_model
from fastrl.models.score_heads import with_scalar_head
from fastrl.rlhf.rewards import parse_rewards, parse_weights
from fastrl.rollout import decode_responses
from fastrl.run.config import parse
from fastrl.train import ppo
from fastrl.train.ppo import PPOConfig, main, sample, score_samples
from fastrl.train.roles import load_roles, tune_roles, with_rewards

LIKED = slice(130, 259)  # half of the vocabulary
FUNCTIONS = """
import math

def brief(prompts, responses):
    return [-float(len(response)) for response in responses]

def right(prompts, responses, answer, **columns):
    assert len(prompts) == len(responses) == len(answer) == len(columns["level"])
    return [float(level or 0) for level in columns["level"]]

def nan_at_fourth(prompts, responses):
    nan_at_fourth.calls = getattr(nan_at_fourth, "calls", 0) + 1
    return [math.nan if nan_at_fourth.calls == 4 else 0.0] * len(responses)

def raises(prompts, responses):
    raise KeyError("no such key")
"""


@pytest.fixture(scope="module")
def two_criteria(tmp_path_factory, tiny_policy, tiny_tokenizer) -> Path:
    """Reward model whose criteria want the opposite: a last token of one half of the vocabulary, or of the other."""
    torch.manual_seed(0)
    model = with_scalar_head(load_policy(tiny_policy), ["low", "high"])
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream carries the embedding unchanged
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = -embedding.norm(dim=1)
        embedding[LIKED, 0] *= -1
        model.score.weight.zero_()
        model.score.weight[:, 0] = torch.tensor([-0.25, 0.25])
    normalize_head(model, [0.1, -0.2], [1.0, 0.5])
    return save_model(model, tiny_tokenizer, tmp_path_factory.mktemp("two") / "hh")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [{"prompt": "q" * (1 + i % 5) + str(i), "answer": f"a{i}", "level": i % 3 or None} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def config(tiny_policy, two_criteria, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_functions", raising=False)
    (tmp_path / "my_functions.py").write_text(FUNCTIONS)
    return PPOConfig(
        model=str(tiny_policy),
        reward_model=str(two_criteria),
        reward_weights="high=1,low=0.25",
        data=str(prompts),
        output=str(tmp_path / "run"),
        iterations=1,
        batch_size=8,
        minibatch_size=4,
        micro_batch_size=3,
        epochs=1,
        max_new_tokens=6,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        lora_rank=4,
        eval_every=0,
    )


def scored(cfg: PPOConfig, *, jitter: float = 0.0):
    """(scores of eight sampled responses, trajectory, prompts, tokenizer, roles)."""
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    ppo.record_template(tokenizer)
    roles = load_roles(cfg.model, cfg.reward_model, tokenizer, tuner=cfg, weights=cfg.reward_weights)
    items, _ = load_prompts(cfg.data, tokenizer, max_prompt_length=64)
    roles = tune_roles(with_rewards(roles, cfg, tokenizer, items), cfg)
    with torch.no_grad():
        for parameter in (p for model in roles[:2] for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=jitter)
    chosen = items[:8]
    trajectory = sample(roles.policy, tokenizer, chosen, cfg, 1)
    return score_samples(roles, trajectory, cfg, chosen), trajectory, chosen, tokenizer, roles


def by_transformers(folder, trajectory) -> torch.Tensor:
    """(B, C) scores of the saved model, each row alone and unpadded, with its bias taken off."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [ids[mask] for ids, mask in zip(trajectory.input_ids, trajectory.attention_mask, strict=True)]
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in rows])
    return logits - torch.tensor(getattr(model.config, "fastrl_score_bias", 0.0))


def evaluations(cfg: PPOConfig) -> list[dict]:
    lines = map(json.loads, (Path(cfg.output) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


# ---- scores ----


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_criteria_are_weighted_in_score_and_value(config, two_criteria, rank):
    """Also while policy and critic have moved: the score is the loaded model's, the values are the critic's own."""
    cfg = replace(config, lora_rank=rank)
    result, trajectory, _, _, roles = scored(cfg, jitter=0.02)
    expected = by_transformers(two_criteria, trajectory)
    torch.testing.assert_close(result.scores, 0.25 * expected[:, 0] + expected[:, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.parts["low"], expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.parts["high"], expected[:, 1], atol=1e-5, rtol=1e-5)
    critic, start = base_model(roles.critic.model), trajectory.input_ids.shape[1] - trajectory.responses.shape[1]
    row = trajectory.attention_mask[0]
    with torch.no_grad():
        hidden = critic.model(trajectory.input_ids[0][row][None]).last_hidden_state[0]
        own = critic.score(hidden) - torch.tensor(critic.config.fastrl_score_bias)
    values = (0.25 * own[:, 0] + own[:, 1])[start - int((~row[:start]).sum()) - 1 : -1]
    torch.testing.assert_close(result.values[0][: len(values)], values, atol=1e-5, rtol=1e-5)


def test_functions_and_models_are_added_by_weight(config, two_criteria, tiny_scalar):
    rewards = [f"-2*{tiny_scalar}", f"0.5*{two_criteria}#low", "0.1*my_functions:brief", "my_functions:right"]
    result, trajectory, chosen, tokenizer, _ = scored(replace(config, rewards=rewards))
    other, own = by_transformers(tiny_scalar, trajectory)[:, 0], by_transformers(two_criteria, trajectory)
    texts = decode_responses(tokenizer, trajectory)
    brief = torch.tensor([-float(len(text)) for text in texts])
    right = torch.tensor([float(prompt.columns.get("level") or 0) for prompt in chosen])
    expected = 0.25 * own[:, 0] + own[:, 1] - 2 * other + 0.5 * own[:, 0] + 0.1 * brief + right
    torch.testing.assert_close(result.scores, expected, atol=1e-4, rtol=1e-5)
    names = ["low", "high", "scalar", f"{two_criteria}#low", "brief", "right"]
    assert list(result.parts) == names and right.sum() > 0
    torch.testing.assert_close(result.parts["scalar"], other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.parts["brief"], brief)


def test_without_them_there_are_no_parts(config, tiny_scalar):
    cfg = replace(config, reward_model=str(tiny_scalar), reward_weights="")
    assert scored(cfg)[0].parts == {}
    halved = scored(replace(cfg, reward_weights={"score": 0.5}))[0]
    torch.testing.assert_close(halved.scores, 0.5 * scored(cfg)[0].scores)
    assert list(scored(replace(cfg, rewards="my_functions:brief"))[0].parts) == ["reward_model", "brief"]


def test_weights_of_zero_leave_the_critic_its_values(config):
    """A function alone is the reward; the critic still starts from the reward model, its criteria added up."""
    cfg = replace(config, reward_weights="low=0,high=0", rewards="my_functions:brief")
    zero, ones = scored(cfg)[0], scored(replace(cfg, reward_weights="low=1,high=1"))[0]
    assert torch.equal(zero.scores, zero.parts["brief"]) and torch.equal(zero.values, ones.values)


def other_tokens(folder: Path, scalar: Path, tokenizer, template: str = "") -> Path:
    """The reward model `scalar` with its tokens renumbered, as its tokenizer has them, and perhaps another template."""
    model = AutoModelForSequenceClassification.from_pretrained(scalar)
    order = torch.cat([torch.arange(3), torch.arange(258, 2, -1)])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[order])
    model.save_pretrained(folder)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    renumbered = {token: int(order[i]) for token, i in core["model"]["vocab"].items()}
    core["model"]["vocab"] = dict(sorted(renumbered.items(), key=lambda item: item[1]))
    for token in core["added_tokens"]:
        token["id"] = renumbered[token["content"]]
    own = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(core)),
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=template or tokenizer.chat_template,
    )  # fmt: skip
    own.save_pretrained(folder)
    return folder


def test_a_model_of_another_tokenizer_reads_the_texts(config, tiny_scalar, tiny_tokenizer, tmp_path):
    """The same model under renumbered tokens gives the same scores: to what the policy ended, and to what was cut."""
    folder = other_tokens(tmp_path / "other", tiny_scalar, tiny_tokenizer)
    cfg = replace(config, rewards=str(folder), max_new_tokens=40, stop_tokens="<eos>,a,b,c,d,e")
    result, trajectory, chosen, tokenizer, _ = scored(cfg)
    texts = decode_responses(tokenizer, trajectory)
    assert trajectory.stopped.any() and not trajectory.stopped.all()
    model = AutoModelForSequenceClassification.from_pretrained(tiny_scalar).eval()
    for row, (prompt, text, stopped) in enumerate(zip(chosen, texts, trajectory.stopped, strict=True)):
        ids = [*prompt.input_ids, *tokenizer.encode(text, add_special_tokens=False), *[1] * stopped]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(result.parts["other"][row], expected, atol=1e-5, rtol=1e-5)


# ---- whole runs ----


@pytest.mark.slow
@pytest.mark.parametrize("weights, sign", [("high=1,low=0.1", 1), ("high=0.1,low=1", -1)])
def test_the_policy_moves_the_way_the_weights_say(config, weights, sign):
    cfg = replace(
        config, reward_weights=weights, iterations=12, batch_size=32, minibatch_size=32, micro_batch_size=32,
        max_new_tokens=1, learning_rate=1e-2, critic_learning_rate=1e-2, kl_coef=0.0, lora_rank=8,
    )  # fmt: skip
    main(cfg)
    first, last = evaluations(cfg)
    assert sign * (last["score/high"] - first["score/high"]) > 0.3
    assert sign * (last["score/low"] - first["score/low"]) < -0.15
    assert last["score"] > first["score"] + 0.15


def test_a_run_with_a_function_beside_the_reward_model(config, tiny_scalar):
    """Parts are reported in every record, and add up to the score."""
    cfg = replace(config, reward_model=str(tiny_scalar), reward_weights="", rewards=["0.5*my_functions:brief"])
    metrics = main(cfg)
    lines = [json.loads(line) for line in (Path(cfg.output) / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for record in lines:
        total = record["score/reward_model"] + 0.5 * record["score/brief"]
        assert record["score"] == pytest.approx(total, abs=1e-5)
    assert metrics["score/brief"] < 0


def test_a_function_that_gives_nan_ends_the_run_and_loses_nothing(config):
    """It is called for the evaluation, iteration 1, the evaluation, iteration 2: the checkpoint of the first stays, and
    the run goes on from it once the function gives numbers."""
    cfg = replace(config, rewards="my_functions:nan_at_fourth", iterations=2, eval_every=1)
    with pytest.raises(ValueError, match="my_functions:nan_at_fourth: expected a finite number, got nan, for the resp"):
        main(cfg)
    assert [path.name for path in (Path(cfg.output) / "checkpoints").iterdir()] == ["step-000001"]
    main(replace(cfg, resume=True))
    assert [record["step"] for record in evaluations(cfg)] == [0, 1, 2]
    assert score_head(load_scalar_model(Path(cfg.output) / "critic")).names == ("low", "high")


def test_yaml_and_the_command_line_say_the_same(tmp_path):
    file = tmp_path / "ppo.yaml"
    needed = "model: m\nreward_model: r\ndata: d\n"
    file.write_text(
        f"{needed}reward_weights: {{helpful: 1, harmless: -0.5}}\n"
        "rewards:\n  - 0.5*runs/hh#honest\n  - -0.1*my_rewards:brief\n"
    )
    first = parse(PPOConfig, ["--config", str(file)], prog="fastrl ppo")
    file.write_text(needed)
    given = ["--reward_weights", "helpful=1,harmless=-0.5", "--rewards", "0.5*runs/hh#honest,-0.1*my_rewards:brief"]
    second = parse(PPOConfig, ["--config", str(file), *given], prog="fastrl ppo")
    weights = {"helpful": 1, "harmless": -0.5}
    assert parse_weights(first.reward_weights) == parse_weights(second.reward_weights) == weights
    assert parse_rewards(first.rewards) == parse_rewards(second.rewards)
    assert [term.weight for term in parse_rewards(first.rewards)] == [0.5, -0.1]


# ---- what is refused, before anything is written ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward_weights": ""}, "expected a weight for some of the criteria of .*hh, low, high, got none"),
        ({"reward_weights": "hihg=1"}, "criteria of .*, low, high, got hihg; did you mean high"),
        ({"reward_weights": "high"}, "reward_weights: expected NAME=NUMBER"),
        ({"rewards": "much*my_functions:brief"}, "rewards: expected a finite number as the weight, got 'much'"),
        ({"rewards": "my_functions:breif"}, "my_functions has no breif; did you mean brief"),
        ({"rewards": "nowhere_at_all:brief"}, "no module nowhere_at_all is installed, or lies in"),
        ({"rewards": "TWO"}, "expected .*hh#CRITERION with one of its criteria, low, high, got none"),
        ({"rewards": "TWO#honest"}, "criteria, low, high, got honest"),
        ({"rewards": "POLICY"}, "expected a reward model, got a language model without a score head"),
        ({"rewards": "./not_there"}, "not_there: not found"),
        ({"rewards": "./short"}, "a context of at least 32 tokens, 12 of a prompt and max_new_tokens 20, got 31"),
        ({"rewards": "0.5*./run/a"}, "output: .*run and rewards .*run/a: expected folders apart"),
    ],
)  # fmt: skip
def test_rewards_that_are_refused(config, two_criteria, tiny_scalar, tiny_policy, tmp_path, changes, message):
    if "short" in str(changes):
        shutil.copytree(tiny_scalar, tmp_path / "short")
        settings = json.loads((tmp_path / "short/config.json").read_text())
        (tmp_path / "short/config.json").write_text(json.dumps({**settings, "max_position_embeddings": 31}))
        changes = {**changes, "max_new_tokens": 20}
    if "run/a" in str(changes):
        (tmp_path / "run/a").mkdir(parents=True)
    changes = {
        k: v.replace("TWO", str(two_criteria)).replace("POLICY", str(tiny_policy)) if isinstance(v, str) else v
        for k, v in changes.items()
    }
    with pytest.raises((ValueError, OSError), match=message):
        main(replace(config, **changes))
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ 'x' }}", "rewards: .*other: .*chat template leaves out the question"),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: <think>{% endif %}",
            "its template does not write an answer where its own prompt ends",
        ),
    ],
)
def test_a_template_that_cannot_be_appended_to_is_refused(
    config, tiny_scalar, tiny_tokenizer, tmp_path, template, message
):
    folder = other_tokens(tmp_path / "other", tiny_scalar, tiny_tokenizer, template)
    with pytest.raises(ValueError, match=message):
        main(replace(config, rewards=str(folder)))


def test_a_raising_function_names_the_response(config):
    with pytest.raises(ValueError, match="my_functions:raises raised KeyError: 'no such key', for the response '"):
        main(replace(config, rewards="my_functions:raises"))


def test_prompts_keep_the_other_columns_of_their_records(prompts, tiny_tokenizer):
    items, _ = load_prompts(str(prompts), tiny_tokenizer, max_prompt_length=64)
    assert items[1].columns == {"answer": "a1", "level": 1} and items[1].text == "qq1"
    assert items[0].columns.get("level") is None
