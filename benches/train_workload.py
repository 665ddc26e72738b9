"""The workload that every peer of bench_train.py gets: a folder with models, a tokenizer, and fixed sequences.

workload/policy, workload/reward: Hugging Face folders of one architecture with random weights.
workload/adapter: a reward model that is a LoRA adapter on the policy.
workload/workload.json: the settings, the prompts (token ids) and one response for each, ended by eos.
"""

from __future__ import annotations

import json
import random
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PAD, EOS, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True)
class Settings:
    """SmolLM2-135M cut to 8 of its 30 layers, its vocabulary cut in proportion; one PPO iteration or SFT step on it."""

    hidden: int = 576
    layers: int = 8
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 12288
    prompt: int = 64  # longest; lengths are uniform from a quarter of it
    response: int = 64  # likewise
    batch: int = 16
    minibatch: int = 16
    micro_batch: int = 4
    epochs: int = 2
    lora_rank: int = 16
    learning_rate: float = 1e-5
    iterations: int = 2  # timed, after one to warm up
    threads: int = 2
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"  # of the weights


def write(folder: Path, settings: Settings) -> None:
    sequences = random.Random(settings.seed)

    def tokens(longest: int) -> list[int]:
        return [
            sequences.randrange(FIRST_WORD, settings.vocab) for _ in range(sequences.randint(longest // 4, longest))
        ]

    prompts = [tokens(settings.prompt) for _ in range(settings.batch)]
    responses = [[*tokens(settings.response)[:-1], EOS] for _ in range(settings.batch)]
    prompts[0] = (prompts[0] * settings.prompt)[: settings.prompt]  # one of full length, so that shapes do not vary
    responses[0] = [*(responses[0][:-1] * settings.response)[: settings.response - 1], EOS]
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": asdict(settings), "prompts": prompts, "responses": responses}
    (folder / "workload.json").write_text(json.dumps(record))
    write_models(folder, settings)


def write_models(folder: Path, settings: Settings) -> None:
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.intermediate,
        vocab_size=settings.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=EOS,
    )
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{n}": n for n in range(FIRST_WORD, settings.vocab)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "policy")
    config.num_labels = 1
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    write_adapter(folder, settings)
    for name in ("policy", "reward", "adapter"):
        tokenizer.save_pretrained(folder / name)


def write_adapter(folder: Path, settings: Settings) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=settings.lora_rank, target_modules="all-linear", init_lora_weights=False
    )
    adapter = peft.get_peft_model(model, config)
    for name, parameter in adapter.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 0.1
    adapter.save_pretrained(str(folder / "adapter"))


def read(folder: Path) -> tuple[Settings, list[list[int]], list[list[int]]]:
    record = json.loads((folder / "workload.json").read_text())
    return Settings(**record["settings"]), record["prompts"], record["responses"]


def clock(device: str = "cpu") -> float:
    """Seconds, once the GPU has done what was asked of it."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(device: str = "cpu") -> float:
    """Peak memory of this process: allocated by torch on a GPU, else resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
