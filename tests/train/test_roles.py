"""PPO's four roles on one base: the numbers of two bases, what learns, what stays, what is saved, what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from adapters import make_reward_adapter
from loops import reported, tiny_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrl.models import Scorer, load_policy, load_tokenizer, token_scores
from fastrl.models.saving import save_model
from fastrl.models.score_heads import with_scalar_head
from fastrl.models.sharing import first_difference, load_scalar_adapter
from fastrl.models.tuners import Full
from fastrl.rollout import Trajectory
from fastrl.run.metrics import MetricsLog
from fastrl.train import ppo
from fastrl.train.role_memory import mib, training_mib
from fastrl.train.roles import load_roles, save_merged_bases, score_trajectory, tune_roles

IDS = torch.tensor([[70, 71, 72, 80, 81, 1, 0], [0, 0, 73, 82, 83, 84, 85], [0, 74, 75, 1, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
KEPT = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool()
SAMPLED = Trajectory(IDS, KEPT, IDS[:, 3:], MASK, torch.tensor([True, False, True]))


@pytest.fixture(scope="module")
def sft(tmp_path_factory, tiny_policy, tiny_tokenizer) -> Path:
    """An SFT policy that is an adapter: LoRA on which the roles' LoRA stands."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_policy(tiny_policy), config)
    return save_model(model, tiny_tokenizer, tmp_path_factory.mktemp("sft") / "adapter")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_policy, tiny_tokenizer, tiny_reward_adapter, sft):
    """By name: policy, reward model, weights of its criteria."""
    both = tmp_path_factory.mktemp("rewards")
    return {
        "one": (tiny_policy, tiny_reward_adapter, ""),
        "criteria on sft": (
            sft,
            make_reward_adapter(sft, both / "sft", tiny_tokenizer, ["kind", "brief"]),
            "kind=1,brief=-0.5",
        ),
    }


@pytest.fixture
def config(tiny_policy, tiny_reward_adapter, tmp_path):
    """A tiny run on one base."""
    _, cfg = tiny_run("ppo", tmp_path, tiny_policy, tiny_reward_adapter)
    return replace(cfg, critic="shared", iterations=1)


def load(cfg, one_base=True):
    """Roles that were not tuned yet."""
    tokenizer = load_tokenizer(cfg.model)
    on = {"tuner": cfg, "weights": cfg.reward_weights, "dtype": cfg.dtype}
    return load_roles(cfg.model, cfg.reward_model, tokenizer, one_base=one_base, **on)


def tuned(cfg, one_base=True):
    """Roles; whatever was drawn before, the policy's adapter is the same."""
    roles = load(cfg, one_base)
    torch.manual_seed(cfg.seed)
    return tune_roles(roles, cfg)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def weights_of(roles):
    return [(i, name, p) for i, role in enumerate(roles[:2]) for name, p in role.named_parameters()]


def jitter(roles):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (p for role in (roles.policy, roles.critic) for p in trained(role).values()):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def look(roles):
    return score_trajectory(roles, SAMPLED, micro_batch_size=2)


@pytest.mark.parametrize(("name", "dtype"), [("one", "float32"), ("one", "bfloat16"), ("criteria on sft", "float32")])
def test_roles_on_one_base_begin_as_those_on_two(config, folders, name, dtype):
    """The reward model is its adapter, here beside the base and there merged into it."""
    policy, reward, weights = folders[name]
    cfg = replace(config, model=str(policy), reward_model=str(reward), reward_weights=weights, dtype=dtype)
    one, two = look(tuned(cfg)), look(tuned(cfg, one_base=False))
    near = {"atol": 2e-5, "rtol": 2e-5} if dtype == "float32" else {"atol": 0.06, "rtol": 0.06}
    for field in ("logprobs", "ref_logprobs", "scores", "values"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), **near)
    assert one.parts.keys() == two.parts.keys() and one.scores.std() > 0.01
    torch.testing.assert_close(dict(one.parts), dict(two.parts), **near)


def test_every_frozen_weight_is_there_once_and_the_memory_is_told(config, capsys):
    roles = tuned(config)
    of_policy = {id(p) for p in roles.policy.parameters() if not p.requires_grad}
    alone = {n: p for n, p in roles.critic.named_parameters() if not p.requires_grad and id(p) not in of_policy}
    assert [name.rpartition("score.")[2] for name in alone] == ["original_module.weight"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("policy", "reference", "critic", "reward model", "memory of the four")
    ]
    own, own_trained = (sum(p.numel() for p in m) for m in (roles.policy.parameters(), trained(roles.policy).values()))
    assert f"{own_trained:,} of {own:,} parameters are trained" in lines[0] and "no weights of its own" in lines[1]
    assert "which are the policy's" in lines[2] and "a copy of what is trained, as it was loaded" in lines[3]
    common = sum(p.numel() for p in roles.critic.parameters() if id(p) in of_policy)
    assert common == sum(p.numel() for p in load_policy(config.model).model.parameters())
    assert f"of which {common * 4 / 2**20:.1f} MiB serve all four" in lines[4]
    separate = tuned(config, one_base=False)
    lines = capsys.readouterr().out.splitlines()
    numbers = sum(p.numel() for role in (separate.policy, separate.critic) for p in role.parameters())
    changed = sum(p.numel() for role in (separate.policy, separate.critic) for p in trained(role).values())
    assert f"{numbers * 4 / 2**20:.1f} MiB of weights; gradients" in lines[4]
    assert f"gradients and optimizer take {changed * 12 / 2**20:.1f} MiB more" in lines[4]
    million = torch.zeros(2**20)
    assert mib([million, million]) == 4 and training_mib([million, million.bfloat16()]) == 12 + 16


def test_reference_and_reward_model_stay_while_policy_and_critic_learn(config, folders, monkeypatch):
    """To the bit, in the loop itself, with the policy's adapter merged while it samples."""
    policy, reward, weights = folders["criteria on sft"]
    seen, tune_them = [], ppo.tune_roles

    def watch(roles, settings):
        seen.append(roles := tune_them(roles, settings))
        seen.extend((look(roles), {(i, name): p.detach().clone() for i, name, p in weights_of(roles)}))
        return roles

    monkeypatch.setattr(ppo, "tune_roles", watch)
    cfg = replace(config, model=str(policy), reward_model=str(reward), reward_weights=weights, merge_adapter=True)
    ppo.main(replace(cfg, critic_learning_rate=1e-3))
    roles, first, weights_then = seen
    last = look(roles)
    assert torch.equal(first.ref_logprobs, last.ref_logprobs) and torch.equal(first.scores, last.scores)
    assert not torch.equal(first.logprobs, last.logprobs) and not torch.equal(first.values, last.values)
    moved = {(i, name) for i, name, p in weights_of(roles) if not torch.equal(weights_then[i, name], p)}
    assert moved == {(i, name) for i, name, p in weights_of(roles) if p.requires_grad}
    assert reported(cfg.output)[-1]["kl_k1"] != 0


def test_gradients_do_not_depend_on_the_passes_in_between(config):
    """Backward after passes of all roles gives the bits of a backward right after the forward."""
    roles = tuned(config)
    jitter(roles)

    def losses():
        yield roles.policy, roles.policy(IDS, KEPT, MASK, denominator=8)
        yield roles.critic, token_scores(roles.critic, IDS, KEPT).square().sum()

    alone = []
    for role, loss in losses():
        loss.backward()
        alone.append({name: p.grad.clone() for name, p in trained(role).items()})
        role.zero_grad()
    both = list(losses())
    look(roles)
    sum(loss for _, loss in both).backward()
    for (role, _), want in zip(both, alone, strict=True):
        assert all(torch.equal(p.grad, want[name]) and p.grad.any() for name, p in trained(role).items())
        assert all(p.grad is None for p in role.parameters() if not p.requires_grad)


def test_merging_while_sampling_is_of_the_policy_alone(config):
    roles = tuned(config)
    jitter(roles)
    before = look(roles)
    with torch.no_grad():
        logits = roles.policy.model(IDS).logits
        with roles.policy.tuner.merged():
            torch.testing.assert_close(roles.policy.model(IDS).logits, logits, atol=1e-4, rtol=1e-4)
    after = look(roles)
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in before._fields[:-1])


@pytest.mark.parametrize("name", ["one", "criteria on sft"])
def test_saved_folders_are_the_roles_in_plain_peft(config, folders, name, tmp_path, tiny_tokenizer):
    """Adapters of one base, which both name; the critic's brings its head."""
    policy, reward, weights = folders[name]
    cfg = replace(config, model=str(policy), reward_model=str(reward), reward_weights=weights)
    roles = load(cfg)
    save_merged_bases(roles, tiny_tokenizer, tmp_path / "out")
    roles = tune_roles(roles, cfg)
    jitter(roles)
    save_model(roles.policy.model, tiny_tokenizer, tmp_path / "out")
    save_model(roles.critic.model, tiny_tokenizer, tmp_path / "out/critic")
    bases = {peft.PeftConfig.from_pretrained(tmp_path / part).base_model_name_or_path for part in ("out", "out/critic")}
    assert bases == {str(policy if name == "one" else tmp_path / "out/base")}
    assert not (tmp_path / "out/critic/base").exists()
    criteria = 1 if name == "one" else 2
    with torch.no_grad():
        language = AutoModelForCausalLM.from_pretrained(bases.copy().pop())
        logits = peft.PeftModel.from_pretrained(language, tmp_path / "out").eval()(IDS[:1, :6]).logits
        torch.testing.assert_close(logits, roles.policy.model(IDS[:1, :6]).logits, atol=1e-5, rtol=1e-5)
        scorer = AutoModelForSequenceClassification.from_pretrained(bases.pop(), num_labels=criteria)
        scores = peft.PeftModel.from_pretrained(scorer, tmp_path / "out/critic").eval()(IDS[:1, :6]).logits
        got = roles.critic(IDS[:1, :6], KEPT[:1, :6], last_only=True)
        bias = torch.tensor(json.loads((tmp_path / "out/critic/fastrl_score.json").read_text())["fastrl_score_bias"])
        torch.testing.assert_close(scores - bias, got, atol=1e-5, rtol=1e-5)
        again = load_scalar_adapter(str(tmp_path / "out/critic"), roles.policy.model.unload())
        again = Scorer(Full(again))(IDS[:1, :6], KEPT[:1, :6], last_only=True)
        torch.testing.assert_close(again, got, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_on_one_base_equals_an_uninterrupted_one(config, folders, monkeypatch, tmp_path):
    policy, reward, weights = folders["criteria on sft"]
    cfg = replace(config, model=str(policy), reward_model=str(reward), reward_weights=weights, iterations=2)
    cfg = replace(cfg, eval_every=1, epochs=1, max_new_tokens=3)
    whole = replace(cfg, output=str(tmp_path / "whole"))
    ppo.main(whole)
    write = MetricsLog.write

    def stop(self, at, kind="train", **metrics):
        if at == 2 and kind == "train":
            raise KeyboardInterrupt
        write(self, at, kind, **metrics)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MetricsLog, "write", stop)
        ppo.main(cfg)
    ppo.main(replace(cfg, resume=True))
    assert reported(cfg.output) == reported(whole.output)
    for part in ("", "critic"):
        one, two = (Path(x.output) / part / "adapter_model.safetensors" for x in (cfg, whole))
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()


def test_all_weights_of_the_base_are_compared(tiny_policy, tmp_path):
    """Another last number of any of them is found; a head over the vocabulary belongs to no backbone."""
    policy = load_policy(tiny_policy)
    stored = load_file(tiny_policy / "model.safetensors")
    assert first_difference(policy, tiny_policy) == ""
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        changed = stored[name].clone()
        changed.view(-1)[-1] += 1e-6
        save_file({**stored, name: changed}, tmp_path / "model.safetensors")
        assert first_difference(policy, tmp_path) == name
    save_file({**stored, "lm_head.weight": stored["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    assert first_difference(policy, tmp_path) == ""
    del stored["model.layers.0.self_attn.q_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    assert first_difference(policy, tmp_path) == "model.layers.0.self_attn.q_proj.weight"
    assert first_difference(policy.bfloat16(), tiny_policy) == ""


def other_base(folder, tiny_policy, tokenizer):
    model = load_policy(tiny_policy)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.01
    return make_reward_adapter(save_model(model, tokenizer, folder / "other"), folder / "reward", tokenizer)


def other_config(folder, tiny_policy, tokenizer):
    model = load_policy(tiny_policy)
    model.config.rms_norm_eps = 1e-3
    return make_reward_adapter(save_model(model, tokenizer, folder / "other"), folder / "reward", tokenizer)


def on_an_adapter(folder, tiny_policy, tokenizer):
    model = peft.get_peft_model(load_policy(tiny_policy), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    save_model(model, tokenizer, folder / "sft")
    reward = make_reward_adapter(tiny_policy, folder / "reward", tokenizer)
    return edited(reward, base_model_name_or_path=str(folder / "sft"))


def headless(folder, tiny_policy, tokenizer):
    reward = make_reward_adapter(tiny_policy, folder / "reward", tokenizer)
    file = reward / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if ".score." not in name}, file)
    return reward


def full_model(folder, tiny_policy, tokenizer):
    return save_model(with_scalar_head(load_policy(tiny_policy)), tokenizer, folder / "reward")


def variant(**lora):
    return lambda folder, policy, tokenizer: make_reward_adapter(policy, folder / "reward", tokenizer, **lora)


def drawn_from_the_base(folder, tiny_policy, tokenizer):
    """PiSSA takes what the adapter starts as off the base, again whenever it is loaded."""
    return edited(make_reward_adapter(tiny_policy, folder / "reward", tokenizer), init_lora_weights="pissa")


def edited(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


REFUSED = [
    (full_model, {}, "expected a reward model that is a LoRA adapter, got a full model"),
    (headless, {}, "expected an adapter with a score head, got none"),
    (other_base, {}, r"other, which differs in model.layers.1.mlp.up_proj.weight"),
    (other_config, {}, "other, whose config has another rms_norm_eps"),
    (on_an_adapter, {}, "sft, whose weights cannot be compared"),
    (variant(modules_to_save=["score", "norm"]), {}, "plain LoRA on linear layers, got base_model.*norm.weight"),
    (variant(use_dora=True), {}, "plain LoRA on linear layers, got base_model.*magnitude"),
    (drawn_from_the_base, {}, "leaves its base as it is, got init_lora_weights 'pissa'"),
    (variant(), {"tuner": "full"}, "critic: expected separate with tuner full: .*, got shared"),
    (variant(), {"tuner": "prefix"}, "critic: expected separate with tuner prefix"),
    (variant(), {"lora_rank": 0}, "critic: expected separate with tuner full"),
    (variant(), {"critic": "both"}, "critic: expected one of separate, shared, got 'both'"),
]


@pytest.mark.parametrize(("make", "changes", "message"), REFUSED)
def test_one_base_is_refused_before_anything_is_written(
    config, make, changes, message, tiny_policy, tiny_tokenizer, tmp_path
):
    """Each refusal but those of other settings says what to do: take two bases."""
    cfg = replace(config, reward_model=str(make(tmp_path, tiny_policy, tiny_tokenizer)), **changes)
    with pytest.raises(ValueError, match=message) as error:
        ppo.main(cfg)
    assert "--critic separate" in str(error.value) or changes
    assert not Path(cfg.output).exists()
