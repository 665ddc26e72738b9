"""Settings that several loops share, in groups; a loop's configuration is their sum and its own.

A group is data alone: at most eight options of one concern, each with its help text and bounds. A loop restates an
option where its default or its meaning differs.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from fastrl.run.config import option
from fastrl.run.optim import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Run"""

    model: str = option(MISSING, "model to start from: folder or hub id; an adapter folder is merged", path=True)
    output: str = option(MISSING, "folder for the model, checkpoints/ and metrics.jsonl", path=True)
    resume: bool = option(False, "continue from the newest checkpoint under output, to the same result")
    resume_changed: bool = option(False, "with resume: continue although settings have changed, and show which")
    seed: int = option(0, "same seed, same run; on CPU bit for bit", at_least=0, below=2**32)
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = option(
        "float32",
        "of weights and activations; optimizer steps are always float32 (bfloat16: 18 bytes a trained weight, not 16)",
        choices=("float32", "bfloat16"),
    )
    tracker: str = option("", "trackers that get all metrics: tensorboard, wandb, trackio, mlflow, separated by commas")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data"""

    data: list[str] | str = option(MISSING, "records: hub id, JSON/JSONL(.gz), CSV, Parquet, folder, glob, list")
    eval_data: list[str] | str = option("", "held-out records; empty: split off data")
    columns: dict[str, str] | str = option("", "names of the data's columns, as prompt=question,completion=answer")
    max_bad_records: float = option(
        0.01, "largest share of unusable records to skip; ten may always be skipped, with 0 none", at_least=0, at_most=1
    )
    template: str = option("auto", "auto (as the model was trained, else its chat template), chat, alpaca or none")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimizer"""

    learning_rate: float = option(2e-4, "peak learning rate (about 1e-5 for full fine-tuning)", above=0)
    schedule: str = option("cosine", "constant, linear or cosine decay to 0", choices=tuple(SCHEDULES))
    warmup_steps: int = option(10, "optimizer steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.0, "AdamW weight decay on matrices", at_least=0)
    adam_eps: float = option(1e-8, "Adam's epsilon; a larger one damps the first updates", above=0)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0: no clipping", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TunerSettings:
    """Tuner"""

    tuner: str = option(
        "lora",
        "what is trained: full (every weight), bitfit (biases, norms), lora, adapter (bottlenecks),"
        " or virtual tokens: prompt, p-tuning, prefix",
    )
    lora_rank: int = option(16, "LoRA rank; 0: full fine-tuning", at_least=0)
    lora_alpha: int = option(32, "LoRA scaling is lora_alpha / lora_rank; 0: twice the rank", at_least=0)
    lora_targets: str = option("all-linear", "all-linear, or layer names separated by commas")
    virtual_tokens: int = option(
        20, "virtual tokens of prompt and prefix (learning_rate about 3e-2) and p-tuning (about 1e-3)", at_least=1
    )
    adapter_size: int = option(64, "width of the bottlenecks of the tuner adapter", at_least=1)
    adapter_places: str = option(
        "both",
        "bottlenecks of the tuner adapter: after attention and MLP (both), or after the MLP (mlp)",
        choices=("both", "mlp"),
    )


@dataclass(frozen=True, kw_only=True)
class EpochSettings:
    """Training"""

    max_length: int = option(1024, "longest prompt + response in tokens", at_least=2)
    epochs: int = option(1, "passes over the data", at_least=1)
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs need", at_least=0)
    batch_size: int = option(16, "examples per optimizer step", at_least=1)
    micro_batch_size: int = option(4, "examples per forward pass; does not change the result", at_least=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapters", at_least=0, below=1)
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    save_every: int = option(100, "optimizer steps between checkpoints; 0: none", at_least=0)


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """Evaluation"""

    holdout: float = option(0.05, "share of data held out for evaluation", at_least=0, below=1)
    eval_limit: int = option(500, "most held-out items to evaluate; 0: all", at_least=0)
    eval_every: int = option(50, "optimizer steps between evaluations; 0: at start and end only", at_least=0)
    samples: int = option(2, "held-out prompts whose answers are printed at each evaluation", at_least=0)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Sampling"""

    max_prompt_length: int = option(256, "longest prompt in tokens", at_least=1)
    max_new_tokens: int = option(64, "longest response in tokens", at_least=1)
    temperature: float = option(1.0, "temperature of sampling and of all log-probabilities", above=0)
    stop_tokens: str = option("", "tokens that end a response, separated by commas; empty: eos, end of turn")
    no_stop_score: float | None = option(None, "score of a response that does not end with a stop token")
    merge_adapter: bool = option(
        False, "merge the policy's adapter into its weights while sampling: faster; samples differ by rounding"
    )
