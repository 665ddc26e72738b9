"""Proximal policy optimisation by hand: a tiny model with a value head learns to repeat the digit that it is given.

fastrl's lines are marked with what they equal; the rest is an ordinary loop, to be replaced by yours.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.ops import linear_logprobs, ppo_advantages, ppo_loss

SAY, END = 10, 11  # token ids; 0 to 9 are the digits
PROMPT, ANSWER = 2, 6  # tokens of a prompt, most tokens of an answer


def tiny_model():
    config = LlamaConfig(
        vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def sample(model, ids):
    """Token ids (B, T) of prompts and answers, and the mask (B, R) of the answers up to their first END."""
    for _ in range(ANSWER):
        ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], dim=1)
    ended = (ids[:, PROMPT:] == END).long()
    return ids, ended.cumsum(1) - ended == 0


def scores_of(ids, mask):
    """(B,) share of the answer's places that hold the prompt's digit; yours is a reward model."""
    return ((ids[:, PROMPT:] == ids[:, :1]) & mask).float().mean(1)


def forward(model, value_head, ids, mask):
    """(B, R) log-probability of each token of the answers, and the value of the state before it."""
    hidden, targets = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1], ids[:, PROMPT:]
    # Equals model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask, without the logits.
    return linear_logprobs(hidden, model.lm_head.weight, targets, mask=mask), value_head(hidden)[..., 0]


def main(steps=30):
    torch.manual_seed(0)
    model, value_head = tiny_model(), torch.nn.Linear(64, 1)
    reference = copy.deepcopy(model).requires_grad_(False)
    parameters = [*model.parameters(), *value_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for step in range(steps):
        digits = torch.randint(10, (128, 1))
        ids, mask = sample(model, torch.cat([digits, torch.full_like(digits, SAY)], dim=1))
        with torch.no_grad():
            old_logprobs, old_values = forward(model, value_head, ids, mask)
            ref_logprobs, _ = forward(reference, value_head, ids, mask)
        # Equals rewards = -0.02 * (old_logprobs - ref_logprobs), plus the score on each answer's last token, the loop
        # of GAE over them from right to left, and (advantages - mean) / (variance + 1e-8).sqrt() over kept tokens.
        adv = ppo_advantages(old_logprobs, ref_logprobs, old_values, scores_of(ids, mask), mask, kl_coef=0.02)
        for _ in range(2):
            logprobs, values = forward(model, value_head, ids, mask)
            # Equals the mean over kept tokens of max(-A * r, -A * r.clamp(0.8, 1.2)) + 0.1 * max(e, e_clipped) / 2 with
            # r = (logprobs - old_logprobs).exp(), e = (values - returns) ** 2, and e_clipped the same of
            # values.clamp(old_values - 0.2, old_values + 0.2).
            loss, _ = ppo_loss(logprobs, values, old_logprobs, old_values, adv.advantages, adv.returns, mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4}   score {adv.stats.score_mean:.3f}   kl {adv.stats.kl_sum_mean:.2f}")
    return losses


if __name__ == "__main__":
    main()
