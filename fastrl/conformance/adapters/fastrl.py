"""fastrl's ops on every backend that runs here, and its data and reward models."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastrl
from fastrl import ops
from fastrl.conformance import tiny
from fastrl.conformance.adapter import Adapter
from fastrl.data.batches import sft_batch
from fastrl.data.load import load_examples
from fastrl.models.forward import last_token_scores, response_logprobs
from fastrl.ops import backend
from fastrl.rlhf.kl import adapted

CONVENTIONS = {
    "data.score_where_pad_is_eos": (
        "as transformers' classifiers, a token that is the pad token is not taken for the last one, so that a reward"
        " model that was trained so gives its own scores"
    )
}


def adapters() -> list[Adapter]:
    """One for each backend; what has no backend is in the first."""
    first, *others = (_adapter(name) for name in ("cpu", "reference", "cuda", "triton") if _runs(name))
    loops: dict[str, Any] = {"sft_labels": sft_labels, "pooled_scores": pooled_scores, "resume": resume}
    loops["sequence_logprobs"] = sequence_logprobs
    absent = dict.fromkeys(loops, f"as {first.name}")
    return [replace(first, conventions=CONVENTIONS, **loops), *(replace(other, absent=absent) for other in others)]


def _runs(name: str) -> bool:
    device = torch.device("cuda" if name in ("cuda", "triton") else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return False
    return not backend.why_not(name, "token_logprobs", device, torch.float32)


def _adapter(name: str) -> Adapter:
    parts = (entropy, linear_cross_entropy, gae, kl, kl_reward, whiten, ppo_loss, ranking_loss, lora_linear)
    return Adapter(
        f"fastrl {name}",
        fastrl.__version__,
        device="cuda" if name in ("cuda", "triton") else "cpu",
        token_logprobs=partial(ops.token_logprobs, backend=name),
        linear_logprobs=partial(ops.linear_logprobs, backend=name),
        kl_controller=kl_controller,
        **{part.__name__: partial(part, name) for part in parts},  # type: ignore[arg-type]
    )


def entropy(backend: str, logits: Tensor) -> Tensor:
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    return ops.token_logprobs(logits, ids, return_entropy=True, backend=backend)[1]


def linear_cross_entropy(backend: str, hidden, weight, labels, *, denominator=None) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, labels, denominator=denominator, backend=backend)


def lora_linear(backend: str, x, weight, lora_a, lora_b, scaling, *, bias=None, dropout=0.0) -> Tensor:
    return ops.lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout=dropout, backend=backend)


def gae(backend: str, rewards, values, mask, gamma, gae_lambda) -> tuple[Tensor, Tensor]:
    return ops.gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, backend=backend)


def kl(backend: str, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    mask, none = torch.ones(1, len(logprobs), dtype=torch.bool), torch.zeros(1, len(logprobs))
    return ops.ppo_advantages(
        logprobs[None], ref_logprobs[None], none, torch.zeros(1), mask, kl_estimator=estimator, backend=backend
    ).kl[0]


def kl_reward(backend: str, logprobs, ref_logprobs, scores, mask, kl_coef) -> Tensor:
    values = torch.zeros_like(logprobs)
    return ops.ppo_advantages(
        logprobs, ref_logprobs, values, scores, mask, kl_coef=kl_coef, backend=backend
    ).rewards  # fmt: skip


def kl_controller(coef: float, kl: float, target: float, horizon: int, samples: int) -> float:
    return adapted(coef, kl, target=target, horizon=horizon, samples=samples)


def whiten(backend: str, x: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    """Whitening is the last step of `ppo_advantages`: with gamma 0 and no rewards the advantages are -values."""
    none = torch.zeros_like(x)
    options: dict[str, Any] = {"kl_coef": 0.0, "gamma": 0.0, "gae_lambda": 0.0, "center": center, "backend": backend}
    return ops.ppo_advantages(none, none, -x, none[:, 0], mask, **options).advantages


def ppo_loss(
    backend: str, logprobs, values, old_logprobs, old_values, advantages, returns, mask, **options: Any
) -> Tensor:
    tensors = (logprobs, values, old_logprobs, old_values, advantages, returns, mask)
    return ops.ppo_loss(*tensors, backend=backend, **options)[0]


def ranking_loss(backend: str, chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    count = len(chosen)
    margins = None if margin is None else torch.cat([margin, torch.zeros(count)])
    pairs, ranks = torch.arange(count).repeat(2), torch.arange(2).repeat_interleave(count)
    backend = "reference" if backend in ("cuda", "triton") else backend  # has no kernel of its own there
    return ops.ranking_loss(torch.cat([chosen, rejected]), pairs, ranks, margins=margins, backend=backend)[0]


def sft_labels(tokenizer: Any, records: Sequence[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """`load_examples` of texts as they are, and the batch that is made of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.save_records(Path(folder), records)
        examples, _ = load_examples(str(path), tokenizer, max_length=128, template="none")
    batch = sft_batch(examples, tokenizer.pad_token_id)
    labels = torch.where(batch.loss_mask, batch.input_ids, -100)
    rows = zip(batch.input_ids, labels, batch.attention_mask, strict=True)
    return [(ids[keep].tolist(), label[keep].tolist()) for ids, label, keep in rows]


def pooled_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return last_token_scores(model, input_ids, attention_mask)


def sequence_logprobs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return response_logprobs(model, input_ids, attention_mask, attention_mask[:, 1:])


def resume(folder: Path, stop: int) -> list[Tensor]:
    """`fastrl sft` with LoRA and dropout, a checkpoint at every step; interrupted as Ctrl-C does it."""
    from fastrl.train import sft

    model, output = folder / "model", folder / "run"
    torch.manual_seed(1)
    tiny.language_model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    config = sft.SFTConfig(
        model=str(model),
        data=str(tiny.save_records(folder)),
        output=str(output),
        device="cpu",
        lora_rank=4,
        lora_dropout=0.2,
        batch_size=4,
        max_length=64,
        template="none",
        max_steps=6,
        save_every=1,
        samples=0,
    )

    def interrupt(record: Any) -> None:
        if record.kind == "train" and record.step > stop:
            raise KeyboardInterrupt

    if stop:
        with suppress(KeyboardInterrupt):
            sft.main(config, interrupt)
    sft.main(replace(config, resume=bool(stop)))
    return list(load_file(output / "adapter_model.safetensors").values())
