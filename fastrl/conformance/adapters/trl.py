"""TRL's own functions: 1.16 (log-probs and the fused head), and 1.12, the last that has PPO.

What is inline in a method of a trainer is named in `absent`: nothing of it is written anew here.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.conformance import tiny
from fastrl.conformance.adapter import Adapter, NotOffered
from fastrl.conformance.adapters import installed

CHUNK = 512  # of the vocabulary: several chunks at the sizes of the cases
DTYPE = "on a CPU all is done in the dtype of the logits, as in the log_softmax that its docstring says it equals"
ONE_TOKEN = "its source says that one kept token divides by zero, and asks for larger batches"
CONVENTIONS = {
    "token_logprobs.half_precision_logits": DTYPE,
    "token_logprobs.gradient_near_probability_one": DTYPE,
    "token_logprobs.entropy_of_logits": "on a CPU all is done in the dtype of the logits, as in log_softmax",
    "token_logprobs.gradients_have_their_inputs_dtype": DTYPE,
    "rewards.whitening_next_to_nothing": ONE_TOKEN,
    "data.score_where_pad_is_eos": "padding is told by its id alone, so that a last token of that id is none",
}
DIGITS = "log p is the difference of two float32 numbers as large as the logits"
REMARKS = {
    "linear_logprobs.common_offset": DIGITS,
    "token_logprobs.common_offset": DIGITS,
    "head_options.compiles": "With a graph break it compiles, to the same result",
    "linear_logprobs.token_out_of_range": "Its callers mask labels of -100; other ids are not checked",
    "models.left_padding_of_absolute_positions": (
        "GRPOTrainer pads prompts on the left and passes no position_ids, as this call does"
    ),
    "rewards.whitening_beside_padding": "PPOTrainer fills the padding before it whitens",
}
ABSENT = {
    "linear_cross_entropy": "the loss of SFT is made in the forward of a patched model",
    "lora_linear": "LoRA layers are PEFT's",
    "ranking_loss": "inline in RewardTrainer.compute_loss",
    "kl_controller": "no adaptive KL coefficient",
}


def adapters() -> list[Adapter]:
    version = installed("trl", "1.12.0, 1.16.0")
    import trl
    from trl.trainer import utils

    parts: dict[str, Any] = {
        "token_logprobs": partial(token_logprobs, utils.selective_log_softmax),
        "entropy": utils.entropy_from_logits,
        "linear_logprobs": linear_logprobs(_fused_head(utils)),
        "sft_labels": sft_labels,
        "resume": resume,
    }
    if (Path(trl.__file__).parent / "experimental" / "ppo").is_dir():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
        parts["whiten"] = partial(whiten, ppo.masked_whiten)
        parts["pooled_scores"] = partial(pooled_scores, ppo.get_reward)
        parts["sequence_logprobs"] = partial(ppo_logprobs, ppo.forward, utils.selective_log_softmax)
        absent = ABSENT | dict.fromkeys(("gae", "kl", "kl_reward", "ppo_loss"), "inline in PPOTrainer.train")
    else:
        gone = "PPO left TRL after 1.12"
        parts["sequence_logprobs"] = partial(sequence_logprobs, utils.add_fused_lm_head)
        absent = ABSENT | dict.fromkeys(("gae", "kl", "kl_reward", "whiten", "ppo_loss"), gone)
        absent["pooled_scores"] = "RewardTrainer takes the scores of transformers' classifiers"
    return [Adapter("TRL", version, **parts, conventions=CONVENTIONS, remarks=REMARKS, absent=absent)]


def _fused_head(utils: Any) -> Any:
    """The autograd function: in `utils` in 1.12, among the kernels in 1.16."""
    own = getattr(utils, "_ChunkedLogProbFunction", None)
    return own or importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction


def token_logprobs(
    function: Any, logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`selective_log_softmax`."""
    if softcap is not None:
        raise NotOffered("selective_log_softmax has no softcap")
    if temperature == 1.0:
        return function(logits, token_ids)
    if "temperature" not in inspect.signature(function).parameters:
        raise NotOffered("selective_log_softmax has no temperature in this version")
    return function(logits, token_ids, temperature=temperature)


def linear_logprobs(function: Any) -> Any:
    """`_ChunkedLogProbFunction` of 1.12, `ChunkedLogProbFunction` of 1.16; both take (M, H) states."""
    takes_bias = "bias" in inspect.signature(function.forward).parameters

    def call(hidden, weight, token_ids, *, bias=None, lora=None, temperature=1.0, softcap=None) -> Tensor:
        if lora is not None:
            raise NotOffered("the fused head takes no adapter of its own")
        if hidden.ndim != 2:
            raise NotOffered("the fused head takes (M, H) states; its callers flatten")
        if takes_bias:
            return function.apply(hidden, weight, bias, token_ids, temperature, CHUNK, softcap, 1.0, ())[0]
        if bias is not None:
            raise NotOffered("the fused head takes no bias in this version")
        return function.apply(hidden, weight, token_ids, temperature, CHUNK, softcap)[0]

    return call


def whiten(function: Any, x: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    """`masked_whiten` of the PPO trainer."""
    return function(x, mask, shift_mean=center)


def pooled_scores(function: Any, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`get_reward` of the PPO trainer, which knows padding by its id, on the left only before the response."""
    pad = model.config.pad_token_id
    start = int((~attention_mask).long().cumprod(1).sum(1).max())
    return function(model, torch.where(attention_mask, input_ids, pad), pad, start)[1]


def ppo_logprobs(forward: Any, logprobs: Any, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`forward` of the PPO trainer, which knows padding by its id and makes the positions."""
    logits = forward(model, torch.where(attention_mask, input_ids, 0), 0).logits
    return logprobs(logits[:, :-1], input_ids[:, 1:])


def sequence_logprobs(add_head: Any, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A model with `add_fused_lm_head`, called as GRPOTrainer calls it."""
    forward = model.forward
    add_head(model)
    labels = input_ids.masked_fill(~attention_mask, -100)
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True).log_probs
    finally:
        model.forward = forward


def sft_labels(tokenizer: Any, records: Sequence[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """What SFTTrainer makes of the records, and its collator of that."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(tokenizer, records, Path(folder))
        batch = trainer.data_collator(list(trainer.train_dataset))
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    return [(ids[keep].tolist(), labels[keep].tolist()) for ids, labels, keep in rows]


def resume(folder: Path, stop: int) -> list[Tensor]:
    """SFTTrainer with dropout in attention; it stops after a checkpoint, and goes on from it in another trainer."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == stop

    if stop:
        _trainer(tiny.tokenizer(), tiny.RECORDS, folder, callbacks=[Stop()]).train()
    trainer = _trainer(tiny.tokenizer(), tiny.RECORDS, folder)
    trainer.train(resume_from_checkpoint=bool(stop))
    return [p.detach() for p in trainer.model.parameters()]


def _trainer(tokenizer: Any, records: Sequence[dict[str, str]], folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(1)
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = tiny.language_model(attention_dropout=0.2)
    data = Dataset.from_list(list(records))
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **options)
