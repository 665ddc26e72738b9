"""What the suite asks of an implementation: a few functions in the field's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Part = Callable[..., Any] | None


class NotOffered(Exception):
    """An adapter's function raises it where the implementation has no such option; the case does not apply then."""


@dataclass(frozen=True)
class Adapter:
    """An implementation under test: what it is, and its own functions behind plain signatures.

    A part is None if the implementation does not offer it as something that can be called. Letters: M or ... positions,
    V vocabulary, H hidden, K in, O out, r rank, B sequences, T tokens. A mask is bool, True = keep; dropped slots may
    hold NaN. A part translates arguments, and computes nothing of its own.

        adapter = Adapter("mine", "1.0", token_logprobs=my_logprobs, gae=my_gae)   # fastrl conformance mine:adapter

    Args:
        name, version: as the table shows them, "TRL" and "1.16.0".
        device: where the suite makes its tensors.
        token_logprobs: (logits (..., V), token_ids (...), *, temperature=1.0, softcap=None) -> log-probs (...).
        entropy: (logits (..., V)) -> entropies in nats (...).
        linear_logprobs: (hidden (..., H), weight (V, H), token_ids (...), *, bias=None, lora=None, temperature=1.0,
            softcap=None) -> log-probs (...) of softmax(hidden @ weight.T); `lora` is (lora_a, lora_b, scaling).
        linear_cross_entropy: (hidden (..., H), weight (V, H), labels (...), *, denominator=None) -> 0-d loss: the sum
            of -log p over labels that are not -100, divided by `denominator` or their count.
        lora_linear: (x (..., K), weight (O, K), lora_a (r, K), lora_b (O, r), scaling, *, bias=None, dropout=0.0)
            -> x W^T + scaling * dropout(x) A^T B^T; dropout draws from torch's generator.
        gae: (rewards (B, T), values (B, T), mask (B, T), gamma, gae_lambda) -> (advantages, returns), not whitened;
            values[b, t] is of the state before token t, after the last token it is 0.
        kl: (logprobs, ref_logprobs, estimator) -> per-token estimates, estimator "k1", "k2" or "k3".
        kl_reward: (logprobs (B, T), ref_logprobs (B, T), scores (B,), mask (B, T), kl_coef) -> rewards (B, T), k1.
        kl_controller: (coef, kl, target, horizon, samples) -> the adapted coefficient of Ziegler et al. 2019.
        whiten: (x (B, T), mask (B, T), *, center=True) -> x with unit variance over the kept slots.
        ppo_loss: (logprobs, values, old_logprobs, old_values, advantages, returns, mask, *, clip_coef, vf_clip_coef,
            vf_coef, denominator=None), all (B, T) -> 0-d loss: clipped policy loss + vf_coef * value loss, over the
            kept slots divided by `denominator` or their count. vf_clip_coef None: no clipping of values.
        ranking_loss: (chosen (N,), rejected (N,), *, margin=None) -> 0-d mean Bradley-Terry loss.
        sft_labels: (tokenizer, records) -> [(input_ids, labels)]: lists of ids, label -100 = not supervised. A record
            has the strings `prompt` and `completion`.
        pooled_scores: (model, input_ids (B, T), attention_mask (B, T)) -> (B,) scores of a transformers sequence
            classifier with one label, at each row's last token.
        sequence_logprobs: (model, input_ids (B, T), attention_mask (B, T)) -> (B, T - 1) log-probs of each next token,
            of a transformers causal language model.
        resume: (folder, stop) -> list of tensors: the weights after six steps of a tiny training run in `folder`, with
            dropout and shuffled data; `stop` > 0: the run is cut off after that many steps and gone on with.
        conventions: case -> note, where the implementation means something else on purpose. A case that then fails
            is reported as a difference with this note.
        remarks: case -> what a reader of its failure should know; the case stays failed.
        absent: part -> why it cannot be called ("inline in PPOTrainer.train").
    """

    name: str
    version: str
    device: str = "cpu"
    token_logprobs: Part = None
    entropy: Part = None
    linear_logprobs: Part = None
    linear_cross_entropy: Part = None
    lora_linear: Part = None
    gae: Part = None
    kl: Part = None
    kl_reward: Part = None
    kl_controller: Part = None
    whiten: Part = None
    ppo_loss: Part = None
    ranking_loss: Part = None
    sft_labels: Part = None
    pooled_scores: Part = None
    sequence_logprobs: Part = None
    resume: Part = None
    conventions: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"


NO_PARTS = ("name", "version", "device", "conventions", "remarks", "absent")
PARTS = tuple(f.name for f in fields(Adapter) if f.name not in NO_PARTS)
