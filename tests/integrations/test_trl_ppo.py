"""From TRL's PPO to fastrl's: the arguments of TRL 1.12's own examples, and its configuration where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from fastrl.integrations.trl import ppo_config
from fastrl.integrations.trl.ppo_fields import CHANGED, COMPUTED, DEFAULTS, DROPPED, SAME
from fastrl.train.ppo import PPOConfig

DOCS = Path(__file__).resolve().parents[2] / "docs/from_trl_ppo.md"
# examples/scripts/ppo/ppo_tldr.py, the first and the second call in its docstring
TLDR = {
    "dataset_name": "trl-lib/tldr",
    "dataset_test_split": "validation",
    "learning_rate": 3e-6,
    "output_dir": "pythia-1b-deduped-tldr-preference-sft-trl-style-ppo",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 64,
    "total_episodes": 30000,
    "model_name_or_path": "EleutherAI/pythia-1b-deduped",
    "sft_model_path": "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
    "reward_model_path": "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
    "missing_eos_penalty": 1.0,
    "stop_token": "eos",
    "response_length": 53,
    "eval_strategy": "steps",
    "eval_steps": 100,
}
TLDR_ON_EIGHT = TLDR | {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "total_episodes": 1000000,
    "local_rollout_forward_batch_size": 16,
    "world_size": 8,
}
# examples/scripts/ppo/ppo.py, the first call
SENTIMENT = {
    "dataset_name": "trl-internal-testing/descriptiveness-sentiment-trl-style",
    "dataset_train_split": "descriptiveness",
    "learning_rate": 3e-6,
    "output_dir": "pythia-1b-deduped-descriptiveness-sentiment-trl-style-ppo",
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "total_episodes": 10000,
    "model_name_or_path": "EleutherAI/pythia-1b-deduped",
    "missing_eos_penalty": 1.0,
}


def test_the_arguments_of_trls_example():
    migration = ppo_config(TLDR)
    expected = PPOConfig(
        model="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
        reward_model="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
        data="trl-lib/tldr:train",
        eval_data="trl-lib/tldr:validation",
        output="pythia-1b-deduped-tldr-preference-sft-trl-style-ppo",
        seed=42,
        tuner="full",
        dtype="bfloat16",
        learning_rate=3e-6,
        critic_learning_rate=3e-6,
        adam_eps=1e-8,
        max_grad_norm=0.0,
        batch_size=64,
        minibatch_size=64,
        micro_batch_size=1,
        iterations=469,  # 30000 / 64, rounded up
        eval_every=46,  # ten times a run
        max_new_tokens=53,
        temperature=0.7,
    )
    assert migration.config == expected
    assert set(migration.dropped) == {"missing_eos_penalty", "model_name_or_path", "eval_strategy", "eval_steps"}
    report = str(migration)
    assert "no_stop_score" in report and all(f"  {name}: " in report for name in migration.changed | migration.dropped)


def test_what_is_not_given_has_trls_default():
    config = ppo_config(SENTIMENT).config
    assert config.data == "trl-internal-testing/descriptiveness-sentiment-trl-style:descriptiveness"
    assert (config.model, config.reward_model) == ("EleutherAI/pythia-160m",) * 2
    assert (config.batch_size, config.epochs, config.kl_coef, config.gae_lambda) == (64, 4, 0.05, 0.95)
    assert "scores all response_length tokens" in ppo_config(SENTIMENT).changed["stop_token"]


def test_batches_count_responses_over_all_processes():
    config = ppo_config(TLDR_ON_EIGHT).config
    assert (config.batch_size, config.minibatch_size, config.micro_batch_size) == (512, 512, 16)
    assert config.iterations == 1954


@pytest.mark.parametrize(
    "size, steps, parts, minibatch",
    [(64, 1, 4, 16), (4, 16, 4, 64), (4, 16, 1, 64), (8, 2, 4, 8), (4, 4, 8, 8)],
)
def test_minibatches_are_those_of_trls_steps(size, steps, parts, minibatch):
    """Its optimizer steps after `gradient_accumulation_steps` passes, whatever `num_mini_batches` says."""
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_mini_batches": parts}
    migration = ppo_config(SENTIMENT | sizes)
    assert migration.config.minibatch_size == minibatch
    named = size * steps // parts
    assert (f"minibatch_size={named}" in migration.changed.get("num_mini_batches", "")) == (minibatch != named)


def test_adapters_as_model_config_has_them():
    lora = {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]}
    migration = ppo_config(TLDR | lora)
    config = migration.config
    assert (config.tuner, config.lora_rank, config.lora_alpha, config.lora_targets) == ("lora", 8, 16, "q_proj,v_proj")
    assert "without dropout" in migration.dropped["lora_dropout"] and "critic" in migration.changed["use_peft"]
    assert ppo_config(TLDR | {"use_peft": True}).config.lora_targets == "all-linear"


def test_what_decides_is_reported_only_where_it_is_on():
    off = {"whiten_rewards": False, "fp16": False, "push_to_hub": False, "missing_eos_penalty": None, "bf16": False}
    migration = ppo_config(SENTIMENT | off)
    assert not off.keys() & (migration.changed.keys() | migration.dropped.keys())
    assert migration.config.dtype == "float32"
    on = {"whiten_rewards": True, "fp16": True, "stop_token_id": 0, "lr_scheduler_type": "polynomial"}
    more = {
        "report_to": ["wandb", "comet_ml"],
        "resume_from_checkpoint": "runs/x",
        "dtype": "float16",
        "adam_beta2": 0.9,
    }
    migration = ppo_config(SENTIMENT | on | more)
    assert {*on, *more} <= migration.dropped.keys()
    assert (migration.config.dtype, migration.config.tracker, migration.config.resume) == ("float32", "wandb", False)
    assert "dataloader_num_workers: nothing of the kind" in str(ppo_config(SENTIMENT | {"dataloader_num_workers": 2}))


def test_without_episodes_the_iterations_are_asked_for():
    rest = {name: value for name, value in SENTIMENT.items() if name != "total_episodes"}
    migration = ppo_config(rest | {"warmup_steps": 0.1}, iterations=20)
    assert migration.config.iterations == 20
    assert "ceil(3.0 * prompts / 64)" in migration.dropped["num_train_epochs"] and "warmup_steps" in migration.dropped
    assert ppo_config(SENTIMENT | {"warmup_steps": 0.1}).config.warmup_steps == 16  # of 157


def test_settings_go_before_what_follows_from_arguments():
    config = ppo_config(
        TLDR, data="prompts.jsonl", minibatch_size=16, max_grad_norm=1.0, lora_rank=4, tuner="lora"
    ).config
    assert (config.data, config.minibatch_size, config.max_grad_norm, config.lora_rank) == ("prompts.jsonl", 16, 1.0, 4)


def test_bad_input():
    with pytest.raises(ValueError, match="'clip_range' is no argument of TRL's PPO; did you mean 'cliprange'"):
        ppo_config({"clip_range": 0.1}, data="x")
    with pytest.raises(ValueError, match="data: expected dataset_name among the arguments"):
        ppo_config({"seed": 1})
    with pytest.raises(ValueError, match="expected TRL's PPOConfig or a mapping, got list"):
        ppo_config([1])
    with pytest.raises(ValueError, match="temperature"):
        ppo_config({"temperature": 0.0}, data="x")


def test_the_table_for_readers_has_every_field():
    text = DOCS.read_text(encoding="utf-8")
    table = text[: text.index("## What differs in meaning")]
    for theirs, ours in SAME.items():
        row = next(line for line in table.splitlines() if line.startswith("|") and f"`{theirs}`" in line)
        assert f"`{ours}`" in row, theirs
    for name in (DEFAULTS.keys() | CHANGED.keys()) - {"num_train_epochs", "lora_dropout"}:
        assert f"`{name}`" in table, name


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("trl.experimental.ppo") is None,
    reason="TRL 1.12 has PPO",
)
class TestWithTRL:
    """pytest with TRL 1.12 on the path."""

    @pytest.fixture
    def arguments(self, tmp_path):
        from trl.experimental.ppo import PPOConfig

        return lambda **options: PPOConfig(output_dir=str(tmp_path), **{"bf16": False, "use_cpu": True} | options)

    def test_defaults_are_trls(self):
        from trl import ModelConfig, ScriptArguments
        from trl.experimental.ppo import PPOConfig

        theirs = {f.name: f.default for c in (ModelConfig, ScriptArguments, PPOConfig) for f in dataclasses.fields(c)}
        assert {name: theirs[name] for name in DEFAULTS.keys() - {"output_dir"}} == {
            name: value for name, value in DEFAULTS.items() if name != "output_dir"
        }
        assert (SAME.keys() | COMPUTED) <= theirs.keys()

    def test_a_configuration_equals_its_arguments(self, arguments, tmp_path):
        options = {"num_mini_batches": 2, "total_episodes": 100, "kl_estimator": "k3", "whiten_rewards": True}
        migration = ppo_config(arguments(**options), data="x")
        mapping = options | {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
        assert migration == ppo_config(mapping, data="x")

    def test_defaults_have_nothing_to_report(self, arguments):
        migration = ppo_config(arguments(total_episodes=100), data="x")
        assert migration.dropped == {} and set(migration.changed) == {"max_grad_norm", "stop_token"}

    def test_the_optimizer_steps_once_in_so_many_passes(self, arguments, tmp_path):
        """Two minibatches of a pass each are one step an epoch of TRL's real trainer, as `ppo_config` says."""
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
        from trl.experimental.ppo import PPOTrainer
        from trl_runs import write_model

        folder = write_model(tmp_path / "model")
        classifier = AutoModelForSequenceClassification
        policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
        reward_model, value_model = (classifier.from_pretrained(folder, num_labels=1) for _ in range(2))
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
        options |= {"total_episodes": 4, "num_ppo_epochs": 3, "response_length": 4, "stop_token": "eos"}
        quiet = {"report_to": "none", "num_sample_generations": 0, "save_strategy": "no", "disable_tqdm": True}
        weights = [*policy.parameters(), *value_model.parameters()]
        optimizer = torch.optim.SGD(weights, lr=1e-3)
        steps = []
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        PPOTrainer(
            args=arguments(**options, **quiet, gradient_checkpointing=False),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            model=policy, ref_model=reference, reward_model=reward_model, value_model=value_model,
            train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4}),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        ).train()  # fmt: skip
        config = ppo_config(options, data="x").config
        assert len(steps) == 3 == config.epochs * config.batch_size // config.minibatch_size

    def test_every_field_is_carried_or_reported(self):
        from transformers import TrainingArguments
        from trl.experimental.ppo import PPOConfig

        own = {f.name for f in dataclasses.fields(PPOConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
        assert own <= DEFAULTS.keys() | COMPUTED | DROPPED.keys()
