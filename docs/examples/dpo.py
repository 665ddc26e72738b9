"""Direct preference optimisation by hand: a tiny model learns to prefer digits said backwards to digits repeated.

fastrl's line is in `sequence_logprobs`; the rest is an ordinary loop, to be replaced by yours.
"""

import copy

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.ops import linear_logprobs

SAY, END = 10, 11  # token ids; 0 to 9 are the digits
DIGITS = 4


def tiny_model():
    config = LlamaConfig(
        vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(size):
    """Token ids (2 B, T), the chosen answers and then the rejected ones, and which tokens are of answers."""
    question = torch.randint(10, (size, DIGITS))
    say, end = torch.full((size, 1), SAY), torch.full((size, 1), END)
    chosen = torch.cat([question, say, question.flip(1), end], dim=1)
    rejected = torch.cat([question, say, question, end], dim=1)
    ids = torch.cat([chosen, rejected])
    return ids, (torch.arange(ids.shape[1]) > DIGITS).expand_as(ids)


def sequence_logprobs(model, ids, answer):
    """(2 B,) log-probability of each answer."""
    hidden = model.model(ids).last_hidden_state[:, :-1]  # give padded rows their attention_mask
    targets, mask = ids[:, 1:], answer[:, 1:]
    # Equals model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask, without the logits.
    logprobs = linear_logprobs(hidden, model.lm_head.weight, targets, mask=mask)
    return logprobs.sum(-1)


def dpo_loss(model, reference, ids, answer, beta=0.1):
    """-log sigmoid(beta * (gain of the chosen answer - gain of the rejected one)), and the share in the right order."""
    with torch.no_grad():
        before = sequence_logprobs(reference, ids, answer)
    chosen, rejected = (sequence_logprobs(model, ids, answer) - before).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean(), (chosen > rejected).float().mean()


def main(steps=60):
    torch.manual_seed(0)
    model = tiny_model()
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        loss, accuracy = dpo_loss(model, reference, *batch(size=32))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 15 == 0 or step == steps - 1:
            print(f"step {step:4}   loss {losses[-1]:.3f}   in the right order {accuracy:.0%}")
    return losses


if __name__ == "__main__":
    main()
