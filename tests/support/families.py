"""Tiny random models of transformers' causal families, and what fastrl makes of each: works, refused, or wrong.

python tests/support/families.py [model_type ...]     # rewrites families.csv beside it, or prints the rows asked for
"""

from __future__ import annotations

import csv
import multiprocessing
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastrl.data import Example
from fastrl.data.batches import sft_batch
from fastrl.models.decoding import NO_CACHE
from fastrl.models.heads import base_model
from fastrl.models.probe import check_policy
from fastrl.rollout import rollout
from fastrl.train.losses import sft_logprobs

TABLE = Path(__file__).with_name("families.csv")
SECONDS = 120  # for one family
VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "intermediate_size": 64,
    "ffn_dim": 64, "n_inner": 64, "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4,
    "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64,
    "intermediate_size_mlp": 64,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64,
    "mamba_n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "n_groups": 1, "ssm_state_size": 8, "attention_hidden_size": 32, "lru_width": 32,
    "word_embed_proj_dim": 16, "embedding_size": 32,
    "num_codebooks": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "first_k_dense_replace": 1, "sliding_window": 64, "attn_layer_period": 2,
    "attn_layer_offset": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "altup_num_inputs": 2, "laurel_rank": 8, "num_kv_shared_layers": 0, "rotary_dim": 4, "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0, "image_token_id": 290, "video_token_id": 291, "audio_token_id": 292,
    "logit_scale": 0.37, "lm_head_multiplier": 0.37, "output_multiplier": 0.37, "logits_scaling": 2.5,
    "logits_mup_width_multiplier": 2.5, "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "use_cache": True,
    "is_decoder": True,
}  # fmt: skip


# what is tried in turn: some families cannot share keys between heads, or want layers of several kinds
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"layer_types": ["linear_attention", "full_attention"] * 2},
    {"layer_types": ["mamba", "attention"] * 2},
    {"layer_types": ["full_attention"] * 4},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"attn_layer_indices": [1, 3]},
    {"attention_types": [[["global", "local"], 2]]},
    {"num_heads": 8, "head_dim": 8},
    {"num_experts_per_tok": 1},
)


class Verdict(NamedTuple):
    """What fastrl makes of a family: outcome is works, refused, wrong or not built."""

    model_type: str
    outcome: str
    cache: str  # yes, no, or nothing
    difference: str  # largest difference of a log-prob from transformers'
    reason: str


def tiny_config(config_class: Any, **overrides: Any) -> Any:
    """The class's default configuration with every size that it knows made small."""
    default = config_class()
    fields = set(default.to_dict()) | set(config_class.attribute_map)
    known = {name: value for name, value in SIZES.items() if name in fields}
    known = {name: value for name, value in known.items() if "soft" not in name or getattr(default, name)}
    for name, part in config_class.sub_configs.items():
        if name in fields and getattr(part, "model_type", None) and isinstance(getattr(default, name, None), part):
            known[name] = tiny_config(part, **overrides)
    return config_class(**{**known, **{name: value for name, value in overrides.items() if name in fields}})


def randomised(config: Any) -> Any:
    """A causal language model with random weights, large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.05))
    return model


def byte_tokenizer() -> Any:
    """256 bytes after pad, eos and bos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


@torch.no_grad()
def logprob_difference(model: Any) -> float:
    """Largest difference of SFT's log-probs of a padded batch from log_softmax of transformers' logits, row by row."""
    torch.manual_seed(1)
    rows = [torch.randint(3, 259, (length,)).tolist() for length in (17, 9, 13)]
    batch = sft_batch([Example(row, [False] + [True] * (len(row) - 1)) for row in rows], 0)
    ours = sft_logprobs(model, batch)
    worst = 0.0
    for row, logprobs in zip(rows, ours, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1].float()
        own = logits.log_softmax(-1).gather(-1, torch.tensor(row)[1:, None])[:, 0]
        worst = max(worst, (logprobs[: len(own)] - own).abs().max().item())
    return worst


@torch.no_grad()
def sampled_as_alone(model: Any, tokenizer: Any) -> bool:
    """Whether greedy rows of a padded, shrinking batch are those of decoding each prompt alone, without a cache."""
    prompts = [[5, 40, 80, 120, 160, 200], [11, 90], [13, 50, 250, 7]]
    stop = list(range(3, 60))
    trajectory = rollout(model, tokenizer, prompts, max_new_tokens=8, stop_token_ids=stop, greedy=True)
    for row, prompt in enumerate(prompts):
        for token in trajectory.responses[row][trajectory.response_mask[row]].tolist():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            if logits.max() - logits[token] > 1e-4 * logits.std():
                return False
            prompt = [*prompt, token]
    return True


def build(model_type: str) -> tuple[Any, str]:
    """A tiny model of the family, or None and why there is none."""
    reason = ""
    for overrides in ATTEMPTS:
        try:
            model = randomised(tiny_config(CONFIG_MAPPING[model_type], **overrides))
            model(input_ids=torch.arange(20, 32)[None])
        except Exception as error:  # noqa: BLE001, whatever transformers raises for sizes that do not go together
            reason = reason or _line(error)
        else:
            return model, ""
    return None, reason


def judge(model_type: str) -> Verdict:
    """Build a tiny model of the family and try it."""
    model, reason = build(model_type)
    if model is None:
        return Verdict(model_type, "not built", "", "", reason)
    tokenizer = byte_tokenizer()
    try:
        check_policy(model, tokenizer, "tiny")
    except ValueError as error:
        return Verdict(model_type, "refused", "", "", _line(error))
    cached = "no" if getattr(base_model(model), NO_CACHE, False) else "yes"
    try:
        difference, sampled = logprob_difference(model), sampled_as_alone(model, tokenizer)
    except Exception as error:  # noqa: BLE001, it must have been refused
        return Verdict(model_type, "wrong", cached, "", _line(error))
    reason = "" if sampled else "sampled tokens are not those of decoding alone"
    outcome = "works" if sampled and difference <= 1e-5 else "wrong"
    return Verdict(model_type, outcome, cached, f"{difference:.1e}", reason)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].replace("ValueError: tiny: ", "")


def judge_aside(model_type: str) -> Verdict:
    """`judge` in a process of its own, at most SECONDS long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(judge(model_type)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else Verdict(model_type, "not built", "", "", "too slow")
    except EOFError:
        return Verdict(model_type, "not built", "", "", "the process died")
    finally:
        process.kill()
        process.join()


def main(model_types: list[str]) -> None:
    torch.set_num_threads(1)
    verdicts = []
    for model_type in model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdicts.append(judge_aside(model_type))
        print(*verdicts[-1], sep=" | ", flush=True)
    if not model_types:
        with TABLE.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([Verdict._fields, *verdicts])


if __name__ == "__main__":
    main(sys.argv[1:])
