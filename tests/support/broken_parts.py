"""Parts of an implementation, each broken in one way that was somebody's bug."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastrl.conformance.adapters import torch as good

KEPT = []


class Changed(torch.autograd.Function):
    """x, whose gradient is `change(upstream)`."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.change(upstream), None


class Accumulates(torch.autograd.Function):
    """x, whose backward passes share one buffer."""

    @staticmethod
    def forward(ctx, x):
        ctx.buffer = torch.zeros_like(x)
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.buffer.add_(upstream)


class RoundedProbabilities(torch.autograd.Function):
    """Log-probs whose gradient takes p from bfloat16."""

    @staticmethod
    def forward(ctx, logits, ids):
        ctx.save_for_backward(logits, ids)
        return good.token_logprobs(logits, ids)

    @staticmethod
    def backward(ctx, upstream):
        logits, ids = ctx.saved_tensors
        p = logits.float().softmax(-1).bfloat16().float()
        return ((F.one_hot(ids, logits.shape[-1]) - p) * upstream[..., None]).to(logits.dtype), None


def after(part, change):
    """The part with `change` applied to its result."""
    return lambda *args, **options: change(part(*args, **options))


def on_first(part, change):
    """The part with `change` applied to its first argument."""
    return lambda x, *args, **options: part(change(x), *args, **options)


def without(part, *names):
    """The part without some of its options."""
    return lambda *args, **options: part(*args, **{k: v for k, v in options.items() if k not in names})


def through(logprobs):
    """A head whose logits go to `logprobs`."""
    return lambda hidden, weight, ids, bias=None, **options: logprobs(F.linear(hidden, weight, bias), ids, **options)


def first_upstream(x):
    return Changed.apply(x, lambda g: g.reshape(-1)[:1].expand(g.numel()).view(g.shape))


def noisy(x):
    return x + torch.rand_like(x) * 1e-5


def keeping(x):
    KEPT.append(x)
    return x


def as_if_contiguous(x):
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride(), x.storage_offset())


def branching(x):
    return x if (x > 0).any() else x + 0


def clamped_ids(part):
    return lambda x, *rest, **options: part(x, *rest[:-1], rest[-1].clamp(0, 32), **options)


def padded_with_zeros(logits, ids):
    return good.token_logprobs(F.pad(logits, (0, -logits.shape[-1] % 128)), ids)


def maximum_from_zero(logits, ids):
    top = logits.amax(-1, keepdim=True).clamp(min=0)
    return logits.gather(-1, ids[..., None])[..., 0] - (top[..., 0] + (logits - top).exp().sum(-1).log())


def block_by_block(logits, ids):
    blocks = logits.split(500, -1)
    tops = torch.stack([b.amax(-1) for b in blocks], -1)
    sums = torch.stack([(b - b.amax(-1, keepdim=True)).exp().sum(-1) for b in blocks], -1)
    return logits.gather(-1, ids[..., None])[..., 0] - (tops + sums.log()).logsumexp(-1)


def minus_logsumexp(logits, ids):
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def rows_of_one_grid(logits, ids):
    return F.pad(good.token_logprobs(logits[:, :65535], ids[:, :65535]), (0, max(0, logits.shape[1] - 65535)))


def divides_in_place(logits, ids, temperature=1.0):
    return good.token_logprobs(logits.div_(temperature) if temperature != 1 else logits, ids)


def in_the_logits_dtype(logits, ids, **_):
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def more_for_many_rows(logits, ids):
    return good.token_logprobs(logits, ids) + 1e-5 * (len(logits) > 32)


def softcap_over_all(logits, ids, softcap=None):
    return good.token_logprobs(softcap * torch.tanh(logits / softcap), ids)


def filtered(x):
    return Changed.apply(x, lambda g: torch.where(g.abs() < 1e-6, 0, g))


def row_chunks(hidden, weight, ids):
    return torch.cat([good.linear_logprobs(hidden[i : i + 8], weight, ids[i : i + 8]) for i in range(0, len(ids), 8)])


def swapped_positions(hidden, weight, ids):
    if hidden.ndim == 2:
        return good.linear_logprobs(hidden, weight, ids)
    return good.linear_logprobs(hidden.flatten(0, 1), weight, ids.T.flatten()).view(ids.shape)


def zero_for_an_empty_head(hidden, weight, ids):
    return good.linear_logprobs(hidden, weight, ids) if weight.numel() else torch.zeros(ids.shape)


def flat(x, *rest, **options):
    return good.lora_linear(x.reshape(-1, x.shape[-1]), *rest, **options)


def without_autocast(*args, **options):
    with torch.autocast("cpu", enabled=False):
        return good.lora_linear(*args, **options)


def unmasked_gradient(x, *rest, dropout=0.0, **options):
    dropped = x + (F.dropout(x, dropout) - x).detach()
    return good.lora_linear(dropped, *rest, **options)


def unscaled_dropout(x, *rest, dropout=0.0, **options):
    return good.lora_linear(F.dropout(x, dropout) * (1 - dropout), *rest, **options)


def frozen_with_its_input(x, *rest, **options):
    y = good.lora_linear(x, *rest, **options)
    return y if x.requires_grad else y.detach()


def gae(change):
    """GAE of changed (rewards, values, mask)."""
    return lambda rewards, values, mask, *rest: good.gae(*change(rewards, values, mask), *rest)


def gae_of_blocks(rewards, values, mask, *rest):
    blocks = zip(*(x.split(1024, 1) for x in (rewards, values, mask)), strict=True)
    parts = [good.gae(*block, *rest) for block in blocks]
    return tuple(torch.cat(some, 1) for some in zip(*parts, strict=True))


def gae_with_drift(rewards, values, mask, *rest):
    drift = torch.arange(len(mask))[:, None] * 1e-5
    return tuple(x + drift for x in good.gae(rewards, values, mask, *rest))


def gae_of_products(rewards, values, mask, gamma, gae_lambda):
    advantages, carry = torch.zeros_like(rewards), 0
    values = F.pad(values * mask, (0, 1))
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] * mask[:, t] + gamma * values[:, t + 1] - values[:, t]
        carry = advantages[:, t] = delta + gamma * gae_lambda * carry
    return advantages, advantages + values[:, :-1]


def swapped_k3(logprobs, ref, estimator):
    return good.kl(ref, logprobs, estimator)


def k3_of_exp(logprobs, ref, estimator):
    d = logprobs - ref
    return torch.exp(-d) - 1 + d


def score_by_count(logprobs, ref, scores, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * (logprobs - ref), 0)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
    return rewards


def reward_of_products(logprobs, ref, scores, mask, kl_coef):
    return good.kl_reward(logprobs * mask, ref * mask, scores, mask, kl_coef) - kl_coef * (logprobs - ref) * ~mask


def zero_is_missing(logprobs, ref, scores, mask, kl_coef):
    return good.kl_reward(logprobs, ref, torch.where(scores == 0, -1.0, scores), mask, kl_coef)


def unclipped_controller(coef, kl, target, horizon, samples):
    return coef * (1 + (kl / target - 1) * samples / horizon)


def whitened_by_row(x, mask, center=True):
    return torch.cat([good.whiten(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))])


def whitened_by_products(x, mask, center=True):
    mean = (x * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt((((x - mean) ** 2) * mask).sum() / mask.sum() + 1e-8)


def whitened_by_bessel(x, mask, center=True):
    mean, count = (x * mask).sum() / mask.sum(), mask.sum()
    return (x - mean) * torch.rsqrt((((x - mean) ** 2) * mask).sum() / (count - 1))


def whitened_by_squares(x, mask, center=True):
    mean = x.mean()
    return (x - mean) * torch.rsqrt((x**2).mean() - mean**2)


def naive_ppo(*, side=torch.maximum, over="kept", value_scale=0.5, masked_ratio=False):
    """The loss as it is often written: masked by multiplication, without bounds."""

    def loss(
        logprobs, values, old_logprobs, old_values, advantages, returns, mask, clip_coef, vf_clip_coef, vf_coef
    ):  # fmt: skip
        log_ratio = (logprobs - old_logprobs) * mask if masked_ratio else logprobs - old_logprobs
        ratio = log_ratio.exp()
        policy = side(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
        near = values.clamp(old_values - vf_clip_coef, old_values + vf_clip_coef)
        error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        total = ((policy + vf_coef * value_scale * error) * mask).sum()
        return total / (mask.sum() if over == "kept" else mask.numel())

    return loss


def later_policy(logprobs, *rest, **options):
    return good.ppo_loss(logprobs + 0.05, *rest, **options)


def shared_buffer(logprobs, *rest, **options):
    return good.ppo_loss(Accumulates.apply(logprobs), *rest, **options)


def log_of_sigmoid(chosen, rejected, margin=None):
    return -torch.sigmoid(chosen - rejected).log().mean()


def labels_of_everything(tokenizer, records):
    return [(ids, list(ids)) for ids, _ in good.sft_labels(tokenizer, records)]


def labels_without_padding(tokenizer, records):
    """Drops the labels that are the pad token."""
    pad = tokenizer.pad_token_id
    found = good.sft_labels(tokenizer, records)
    return [(ids, [-100 if label == pad else label for label in labels]) for ids, labels in found]


def score_of_the_last_column(model, input_ids, attention_mask):
    return good.pooled_scores(model, input_ids, torch.ones_like(attention_mask))


def score_before_the_first_pad(model, input_ids, attention_mask):
    pads = input_ids == model.config.pad_token_id
    length = torch.where(pads.any(1), pads.int().argmax(1), input_ids.shape[1])
    return good.pooled_scores(model, input_ids, torch.arange(input_ids.shape[1]) < length[:, None])


def without_positions(model, input_ids, attention_mask):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return good.token_logprobs(logits[:, :-1], input_ids[:, 1:])


def without_attention_mask(model, input_ids, attention_mask):
    return without_positions(model, input_ids, torch.ones_like(attention_mask))


def resumed_with_another_generator(folder, stop):
    if stop:
        good._steps(folder / "state.pt", stop)
        state = torch.load(folder / "state.pt", weights_only=True)
        torch.manual_seed(7)
        torch.save({**state, "generator": torch.get_rng_state()}, folder / "state.pt")
    return good._steps(folder / "state.pt", 6)
