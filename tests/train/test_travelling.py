"""Template, end of turn and sampling settings go with a model from loop to loop, into adapters, merges and exports."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastrl.commands import chat
from fastrl.commands.export import export
from fastrl.data.templates import recorded_template
from fastrl.train import ppo, reward, sft

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 1}  # and no do_sample
END = 2  # <bos>, as the end of a turn that is not eos
ALL_ENDS = [1, END]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_policy):
    """A policy whose template ends turns with a token of its own, and whose sampling is configured."""
    folder = tmp_path_factory.mktemp("travel") / "start"
    shutil.copytree(tiny_policy, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "bos_token")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    records = [{"q": f"say {i}", "a": "yes", "chosen": "a" * (i % 4 + 1), "rejected": "bb"} for i in range(12)]
    path = tmp_path_factory.mktemp("travel") / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"q": None, "a": None}]))
    return path


def train(loop, model, data, output, **options):
    columns = {"sft": "prompt=q,completion=a", "reward": "prompt=q", "ppo": "prompt=q"}[loop]
    options = {"batch_size": 4, "micro_batch_size": 4, "lora_rank": 2, "device": "cpu", "eval_every": 0} | options
    options |= {"model": str(model), "data": [str(data)], "output": str(output), "columns": columns}
    if loop == "ppo":
        options |= {"iterations": 1, "epochs": 1, "minibatch_size": 4, "max_new_tokens": 4}
        return ppo.main(ppo.PPOConfig(**options))
    options |= {"max_steps": 1, "max_length": 250, "save_every": 0, "samples": 0}
    return sft.main(sft.SFTConfig(**options)) if loop == "sft" else reward.main(reward.RewardConfig(**options))


def settings(folder):
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_ends_and_sampling_settings_survive_training_and_export(rank, start, data, tmp_path):
    train("sft", start, data, tmp_path / "sft", lora_rank=rank)
    train("sft", tmp_path / "sft", data, tmp_path / "again", lora_rank=rank)
    export(str(tmp_path / "again"), tmp_path / "out")
    for name in ("sft", "again", "out"):
        kept = settings(tmp_path / name)
        assert {key: kept[key] for key in SAMPLING} == {**SAMPLING, "eos_token_id": ALL_ENDS}
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == ALL_ENDS
        assert recorded_template(tmp_path / name) == "chat"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == ALL_ENDS


@pytest.fixture(scope="module")
def trained(start, data, tmp_path_factory):
    """Policy and reward model that were trained with Alpaca's template, although there is a chat template."""
    folder = tmp_path_factory.mktemp("trained")
    train("sft", start, data, folder / "sft", template="alpaca")
    train("reward", start, data, folder / "reward", template="alpaca")
    return folder


@pytest.mark.slow
def test_ppo_samples_from_the_prompts_of_training(trained, data, tmp_path, monkeypatch):
    seen = []
    original = ppo.rollout

    def spy(policy, tokenizer, prompts, **options):
        seen.append((tokenizer.decode(prompts[0]), options["stop_token_ids"]))
        return original(policy, tokenizer, prompts, **options)

    monkeypatch.setattr(ppo, "rollout", spy)
    reward_model = str(trained / "reward")
    for template in ("auto", "alpaca"):
        train("ppo", trained / "sft", data, tmp_path / template, reward_model=reward_model, template=template)
    assert all(prompt.startswith("Below is an instruction") for prompt, _ in seen)
    assert recorded_template(tmp_path / "auto") == recorded_template(tmp_path / "auto/critic") == "alpaca"
    assert not (tmp_path / "auto/critic/generation_config.json").exists()


def test_another_template_than_that_of_training_is_refused_before_anything_is_written(
    trained, start, data, tmp_path, monkeypatch
):
    other = {"template": "chat"}
    reward_model = {"reward_model": str(trained / "reward")}
    for loop, model, more in (("sft", "sft", {}), ("reward", "sft", {}), ("ppo", "sft", reward_model)):
        with pytest.raises(ValueError, match="template: expected 'alpaca', with which .* was trained, got 'chat'"):
            train(loop, trained / model, data, tmp_path / "out", **other, **more)
    with pytest.raises(ValueError, match="got 'chat' for the policy .* and 'alpaca', with which the reward model"):
        train("ppo", start, data, tmp_path / "out", **reward_model)
    monkeypatch.setattr(chat, "_lines", lambda: iter(["hi"]))
    with pytest.raises(ValueError, match="template: expected 'alpaca', with which"):
        chat.main([str(trained / "sft"), "--template", "chat", "--device", "cpu"])
    assert not (tmp_path / "out").exists()


def test_bad_records_are_an_error_where_none_are_allowed(start, data, tmp_path, trained):
    for loop in ("sft", "reward", "ppo"):
        more = {"reward_model": str(trained / "reward"), "template": "alpaca"} if loop == "ppo" else {}
        with pytest.raises(ValueError, match=r"expected at most 0 bad records of 13, got 1: .*data\.jsonl:13"):
            train(loop, start, data, tmp_path / loop, max_bad_records=0.0, **more)
