"""The loops of docs/examples run, learn, and take the same course as plain torch."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastrl.ops import Advantages

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
NAMES = ["sft", "dpo", "grpo", "ppo"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ops_of(name):
    """What an example imports from fastrl.ops, and that it imports nothing else of fastrl."""
    imports = [n for n in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text())) if isinstance(n, ast.ImportFrom)]
    (found,) = [node for node in imports if node.module.startswith("fastrl")]
    assert found.module == "fastrl.ops"
    return [alias.name for alias in found.names]


def plain_linear_cross_entropy(hidden, weight, labels, *, mask):
    return F.cross_entropy((hidden @ weight.T)[mask], labels[mask])


def plain_linear_logprobs(hidden, weight, token_ids, *, mask):
    return (hidden @ weight.T).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0] * mask


def plain_ppo_advantages(logprobs, ref_logprobs, values, scores, mask, *, kl_coef):
    kl = torch.where(mask, logprobs - ref_logprobs, 0)
    rewards = -kl_coef * kl
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores  # these answers have no holes
    advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        advantage = rewards[:, t] + next_value - values[:, t] + 0.95 * next_advantage
        next_advantage, next_value = advantage * mask[:, t], values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    returns, kept = (advantages + values) * mask, advantages[mask]
    whitened = (advantages - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt() * mask
    stats = SimpleNamespace(score_mean=scores.mean(), kl_sum_mean=kl.sum(1).mean())
    return Advantages(whitened, returns, rewards, kl, stats)


def plain_ppo_loss(
    logprobs, values, old_logprobs, old_values, advantages, returns, mask, *, clip_coef=0.2, vf_coef=0.1
):
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    clipped = values.clamp(old_values - 0.2, old_values + 0.2)
    value = torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2
    return (policy + vf_coef * value)[mask].mean(), None


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_what_each_line_of_fastrl_equals(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) < 80
    assert len(re.findall("# Equals", source)) == len(ops_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_takes_the_course_of_plain_torch(name, monkeypatch):
    """Losses of the first steps, relative to the largest: within 1e-4, of rounding that learning carries on."""
    losses = torch.tensor(load(name).main(steps=3))
    plain = load(name)
    for op in ops_of(name):
        monkeypatch.setattr(plain, op, globals()[f"plain_{op}"])
    expected = torch.tensor(plain.main(steps=3))
    assert losses.isfinite().all() and losses.unique().numel() > 1
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, number, least",
    [("sft", "loss", None), ("dpo", "loss", None), ("grpo", "reward", 0.5), ("ppo", "score", 0.5)],
)
def test_an_example_learns_as_a_script(name, number, least, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    course = [float(found) for found in re.findall(rf"\b{number} (\d\.\d+)", capsys.readouterr().out)]
    assert len(course) > 3
    if least is None:
        assert course[-1] < course[0] / 3
    else:
        assert course[0] < 0.2 and course[-1] > least
