"""Supervised fine-tuning by hand: a tiny model learns to say digits backwards.

fastrl's line is in `answer_loss`; the rest is an ordinary loop, to be replaced by yours.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.ops import linear_cross_entropy

SAY, END, PAD = 10, 11, 12  # token ids; 0 to 9 are the digits


def tiny_model():
    config = LlamaConfig(
        vocab_size=13, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(size):
    """Token ids (B, T) of `digits SAY digits-backwards END` padded on the right, attention mask, supervised tokens."""
    questions = [torch.randint(10, (length,)) for length in torch.randint(2, 6, (size,)).tolist()]
    rows = [torch.cat([q, torch.tensor([SAY]), q.flip(0), torch.tensor([END])]) for q in questions]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
    answer = (ids == SAY).cumsum(1) - (ids == SAY).long() > 0
    return ids, ids != PAD, answer & (ids != PAD)


def answer_loss(model, ids, attention_mask, supervised):
    """Mean cross-entropy of the supervised tokens, each predicted by the hidden state before it."""
    hidden = model.model(ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
    targets, mask = ids[:, 1:], supervised[:, 1:]
    # Equals F.cross_entropy(model.lm_head(hidden)[mask], targets[mask]), without the logits. With gradient
    # accumulation add denominator=supervised tokens of the whole step: micro-batches then add up to it exactly.
    return linear_cross_entropy(hidden, model.lm_head.weight, targets, mask=mask)


def main(steps=100):
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = answer_loss(model, *batch(size=32))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}   loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
