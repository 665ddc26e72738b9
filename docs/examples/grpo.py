"""Group relative policy optimisation by hand: a tiny model learns to repeat the digit that it is given.

fastrl's lines are in `answer_logprobs` and `policy_loss`; the rest is an ordinary loop, to be replaced by yours.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.ops import linear_logprobs, ppo_loss

SAY, END = 10, 11  # token ids; 0 to 9 are the digits
PROMPT, ANSWER, GROUP = 2, 6, 8  # tokens of a prompt, most tokens of an answer, answers to each prompt


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


def rewards_of(ids, mask):
    """(B,) share of the answer's places that hold the prompt's digit."""
    return ((ids[:, PROMPT:] == ids[:, :1]) & mask).float().mean(1)


def answer_logprobs(model, ids, mask):
    """(B, R) log-probability of each token of the answers."""
    hidden, targets = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1], ids[:, PROMPT:]
    # Equals model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask, without the logits.
    return linear_logprobs(hidden, model.lm_head.weight, targets, mask=mask)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """The clipped loss of the policy, a mean over tokens: PPO's loss of a critic that has no say."""
    advantages, unused = advantages[:, None].expand_as(logprobs), torch.zeros_like(logprobs)
    # Equals, with ratio = (logprobs - old_logprobs).exp(),
    # torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))[mask].mean().
    return ppo_loss(logprobs, unused, old_logprobs, unused, advantages, unused, mask, clip_coef=clip, vf_coef=0.0)[0]


def main(steps=20):
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        digits = torch.randint(10, (16, 1)).repeat_interleave(GROUP, 0)
        ids, mask = sample(model, torch.cat([digits, torch.full_like(digits, SAY)], dim=1))
        rewards = rewards_of(ids, mask).view(-1, GROUP)
        advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        old_logprobs = answer_logprobs(model, ids, mask).detach()
        for _ in range(2):
            loss = policy_loss(answer_logprobs(model, ids, mask), old_logprobs, advantages, mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:4}   reward {rewards.mean():.3f}   loss {losses[-1]:+.4f}")
    return losses


if __name__ == "__main__":
    main()
