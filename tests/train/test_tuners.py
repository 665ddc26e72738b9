"""Every tuner: what is trained gets its gradient through the module's forward, and the loaded model stays within
reach."""

from __future__ import annotations

import copy
import dataclasses
import io
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from families import randomised, tiny_config
from loops import LOOPS, reported, tiny_run

from fastrl.commands import chat
from fastrl.commands.export import export
from fastrl.data import Preference
from fastrl.data.batches import SFTBatch, ranking_batch
from fastrl.models import (
    TUNERS,
    Policy,
    Scorer,
    adapter_base,
    check_context,
    check_tuner,
    context_length,
    describe,
    last_token_scores,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    only_criterion,
    response_logprobs,
    saves_adapter,
    token_scores,
    tune,
)
from fastrl.models.decoding import next_logits
from fastrl.models.heads import lm_head
from fastrl.models.saving import save_merged_base, save_model
from fastrl.models.tuners import VIRTUAL, Full
from fastrl.rollout import Trajectory, rollout
from fastrl.train import experience
from fastrl.train.losses import reward_loss, sft_logprobs, sft_loss

IDS = torch.tensor([[0, 0, 5, 6, 7, 9, 10, 1], [11, 12, 13, 14, 15, 16, 1, 0]])
ATTENDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]).bool()
MASK = ATTENDED[:, -3:]


def settings(name="lora", **overrides):
    lora = {"lora_rank": 4, "lora_alpha": 0, "lora_targets": "all-linear"}
    return SimpleNamespace(
        **{"tuner": name, **lora, "adapter_size": 8, "adapter_places": "both", "virtual_tokens": 5, **overrides}
    )


def logprobs(policy):
    return policy(IDS, ATTENDED, MASK, temperature=0.7, return_entropy=True)


def every_score(scorer):
    return scorer(IDS, ATTENDED, last_only=False), scorer(IDS, ATTENDED, last_only=True)


GOES_ON = {"p-tuning": "prompt"}  # where it is not the same tuner
KINDS = {"policy": (Policy, load_policy, logprobs), "scorer": (Scorer, load_scalar_model, every_score)}


@pytest.fixture(params=KINDS)
def kind(request, tiny_policy, tiny_scalar):
    """(Policy or Scorer, the loaded model, its outputs)

    The model is a copy because the bits of a product may depend on how its tensors are aligned, which those that are
    mapped from a file are not.
    """
    module, load, outputs = KINDS[request.param]
    return module, copy.deepcopy(load(tiny_policy if request.param == "policy" else tiny_scalar)), outputs


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def train(module, outputs, steps=2):
    """A few steps that move every trained parameter; masters and optimizers are not needed for it."""
    torch.manual_seed(7)
    for _ in range(steps):
        module.zero_grad()
        sum(output.square().sum() for output in outputs(module)).backward()
        with torch.no_grad():
            for parameter in trained(module).values():
                parameter.add_(torch.randn_like(parameter) * 0.02 + parameter.grad.sign() * 0.01)
    module.zero_grad()


@pytest.mark.parametrize("name", TUNERS)
def test_every_trained_parameter_gets_a_gradient_through_forward(kind, name):
    module, model, outputs = kind
    tuned = module(tune(model, settings(name)))
    train(tuned, outputs)  # an adapter's second factor starts at zero, and the first gets no gradient until it moves
    sum(output.square().sum() for output in outputs(tuned)).backward()
    assert trained(tuned)
    for parameter_name, parameter in trained(tuned).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", TUNERS)
def test_off_is_the_loaded_model_to_the_bit(kind, name):
    module, model, outputs = kind
    with torch.no_grad():
        loaded = outputs(module(tune(model, settings("full"))))
    tuned = module(tune(model, settings(name), keep_loaded=True))
    train(tuned, outputs)
    weights = {key: x.clone() for key, x in tuned.state_dict().items()}
    with torch.no_grad():
        after = outputs(tuned)
        for _ in range(2):
            with tuned.tuner.off():
                assert all(map(torch.equal, outputs(tuned), loaded))
            assert all(map(torch.equal, outputs(tuned), after))
        with pytest.raises(ZeroDivisionError), tuned.tuner.off():
            raise ZeroDivisionError
    assert not torch.equal(after[0], loaded[0])
    assert all(torch.equal(x, weights[key]) for key, x in tuned.state_dict().items())


@pytest.mark.parametrize("name", TUNERS)
def test_merged_differs_by_rounding_and_gives_the_weights_back(kind, name):
    module, model, outputs = kind
    tuned = module(tune(model, settings(name)))
    train(tuned, outputs)
    weights = {key: x.clone() for key, x in tuned.state_dict().items()}
    with torch.no_grad():
        expected = outputs(tuned)
        with tuned.tuner.merged():
            torch.testing.assert_close(outputs(tuned), expected, atol=1e-4, rtol=1e-4)
        assert all(map(torch.equal, outputs(tuned), expected))
    assert all(torch.equal(x, weights[key]) for key, x in tuned.state_dict().items())


@pytest.mark.parametrize("name", TUNERS)
def test_a_copy_of_a_tuned_module_is_on_its_own(kind, name):
    module, model, outputs = kind
    tuned = module(tune(model, settings(name), keep_loaded=True))
    with torch.no_grad():
        before = outputs(tuned)
    copied = copy.deepcopy(tuned)
    train(tuned, outputs)
    with torch.no_grad():
        assert all(map(torch.equal, outputs(copied), before))
        with tuned.tuner.off(), copied.tuner.off():
            assert all(map(torch.equal, outputs(copied), outputs(tuned)))
    assert copied.tuner.model is copied.model is not tuned.model


def test_full_tuning_keeps_a_copy_only_where_asked(tiny_policy):
    tuner = tune(load_policy(tiny_policy), settings("full"))
    with pytest.raises(RuntimeError, match="keep_loaded=True"), tuner.off():
        pass


def test_a_rank_of_zero_is_full_fine_tuning(tiny_policy):
    model = load_policy(tiny_policy)
    assert tune(model, settings(lora_rank=0)).model is model and not saves_adapter(settings(lora_rank=0))
    assert all(p.requires_grad for p in model.parameters())
    assert saves_adapter(settings())


def test_settings_reach_the_adapter(tiny_policy):
    options = {"lora_dropout": 0.25, "lora_targets": "q_proj, v_proj", "gradient_checkpointing": True}
    model = tune(load_policy(tiny_policy), settings(**options)).model
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.25)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert model.get_base_model().is_gradient_checkpointing
    assert tune(load_policy(tiny_policy), settings(lora_alpha=3)).model.peft_config["default"].lora_alpha == 3


def test_an_unknown_tuner_names_the_known_ones_and_the_nearest(tiny_policy):
    model = load_policy(tiny_policy)
    for function in (tune, check_tuner):
        for name, nearest in (("qlora", "lora"), ("BitFit", "bitfit")):
            known = f"tuner: expected one of {', '.join(TUNERS)}, got '{name}'; did you mean '{nearest}'\\?"
            with pytest.raises(ValueError, match=known):
                function(model, settings(name))
    with pytest.raises(ValueError, match="lora_targets: .*q_proj.*, got 'query'"):
        check_tuner(model, settings(lora_targets="query"))


@pytest.mark.parametrize("family, biases", [("Llama", 0), ("Qwen2", 4 * 3), ("GPT2", 4 * 6 + 1)])
def test_bitfit_trains_the_norms_and_biases_that_there_are(family, biases):
    """A Qwen2 has biases on q, k and v of its four layers, a GPT-2 on its four products and on its norms."""
    model = randomised(tiny_config(getattr(transformers, f"{family}Config")))
    names = trained(tune(model, settings("bitfit")).model)
    assert sum(name.endswith(".bias") for name in names) == biases
    norms = [name for name in names if name.endswith(".weight")]
    assert len(norms) == 4 * 2 + 1 and all("norm" in name or ".ln_" in name for name in norms)


def test_bottlenecks_are_houlsbys_or_pfeiffers(tiny_policy):
    """2 * H * size weights and H + size biases after attention and MLP of each of the two layers, or after the MLP."""
    for places, count in (("both", 4), ("mlp", 2)):
        model = tune(copy.deepcopy(load_policy(tiny_policy)), settings("adapter", adapter_places=places)).model
        parameters = trained(model)
        assert sum(p.numel() for p in parameters.values()) == count * (2 * 32 * 8 + 32 + 8)
        assert {name.split(".")[3] for name in parameters} == ({"mlp"} if places == "mlp" else {"self_attn", "mlp"})
        line = describe(model, settings("adapter"))
        total = sum(p.numel() for p in model.parameters())
        assert line.startswith(f"tuner adapter: {count * 552:,} of {total:,} parameters are trained (")


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "GPT2", "GPTNeoX", "Mixtral", "Falcon", "Phi3", "Bloom"])
def test_bottlenecks_stand_in_every_layer_of_a_family(family):
    model = randomised(tiny_config(getattr(transformers, f"{family}Config")))
    with torch.no_grad():
        before = model(IDS[1:]).logits
        names = trained(tune(model, settings("adapter")).model)
        assert torch.equal(model(IDS[1:]).logits, before)
    assert len(names) == 4 * 2 * 4


def test_bottlenecks_are_refused_where_there_is_no_place_for_them():
    model = randomised(tiny_config(transformers.MambaConfig))
    with pytest.raises(ValueError, match="tuner: expected another than adapter for MambaForCausalLM"):
        check_tuner(model, settings("adapter"))


def test_bitfit_is_refused_where_it_would_train_nothing():
    with pytest.raises(ValueError, match="tuner: expected another than bitfit for Linear, which has neither"):
        check_tuner(torch.nn.Linear(2, 2, bias=False), settings("bitfit"))


@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_learns_answers_by_heart(tiny_policy, name):
    """Each of the answers' tokens becomes the most probable one; how sure of it a frozen random model can be is another
    matter."""
    torch.manual_seed(0)
    policy = Policy(tune(copy.deepcopy(load_policy(tiny_policy)), settings(name)))
    optimizer = torch.optim.Adam(trained(policy).values(), lr=0.1 if name == "prefix" else 0.03)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        losses.append(policy(IDS, ATTENDED, MASK, denominator=MASK.sum()))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 5 > 2.5 > losses[-1]
    guesses = lm_head(policy.model).logits(policy.tuner.hidden(IDS, ATTENDED)).argmax(-1)
    assert torch.equal(guesses[:, -4:-1][MASK], IDS[:, -3:][MASK])


@pytest.mark.parametrize("name", TUNERS)
def test_a_saved_model_loads_as_it_was_and_goes_on(kind, name, tiny_policy, tmp_path):
    """Its own tuner, or any where the folder is an ordinary model or was merged, starts from what was saved."""
    module, model, outputs = kind
    tuned = module(tune(model, settings(name)))
    train(tuned, outputs)
    save_model(tuned.model, load_tokenizer(tiny_policy), tmp_path / "model")
    load = load_policy if module is Policy else load_scalar_model
    loaded = copy.deepcopy(load(tmp_path / "model"))  # as in `kind`
    check_tuner(loaded, settings(GOES_ON.get(name, name)))
    again = module(tune(loaded, settings(GOES_ON.get(name, name)), keep_loaded=True))
    with torch.no_grad():
        saved = outputs(tuned)
        for output, expected in zip(outputs(again), saved, strict=True):
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        before = outputs(again)
    train(again, outputs)
    with torch.no_grad(), again.tuner.off():
        assert all(map(torch.equal, outputs(again), before))


@pytest.mark.parametrize("name", TUNERS)
def test_plain_libraries_load_what_is_saved(name, tiny_policy, tmp_path):
    model = tune(copy.deepcopy(load_policy(tiny_policy)), settings(name)).model
    train(Policy(Full(model)), logprobs)
    save_model(model, load_tokenizer(tiny_policy), tmp_path / "model")
    if name == "adapter":
        with pytest.raises(KeyError, match="FASTRL_BOTTLENECK"):
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model")
        return
    auto = peft.AutoPeftModelForCausalLM if saves_adapter(settings(name)) else transformers.AutoModelForCausalLM
    with torch.no_grad():
        own = auto.from_pretrained(tmp_path / "model")(input_ids=IDS[1:, :7]).logits[:, -7:]
        head, hidden = lm_head(model), Policy(Full(model)).tuner.hidden(IDS[1:, :7], ATTENDED[1:, :7])
        torch.testing.assert_close(head.logits(hidden), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_where_peft_puts_them(name, tiny_policy):
    """Greedy tokens of a left-padded batch with a cache, and log-probs, are those of PEFT on each row alone."""
    tuned = Policy(tune(copy.deepcopy(load_policy(tiny_policy)), settings(name))).eval()
    prompts = [[5, 6, 7, 9, 10, 11], [12, 13]]
    trajectory = rollout(tuned.model, load_tokenizer(tiny_policy), prompts, max_new_tokens=6, greedy=True)
    chosen = response_logprobs(tuned, trajectory.input_ids, trajectory.attention_mask, trajectory.response_mask)
    for row, prompt in enumerate(prompts):
        response = trajectory.responses[row][trajectory.response_mask[row]]
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = tuned.model(input_ids=ids).logits[0, -len(response) - 1 : -1]
        assert torch.equal(logits.argmax(-1), response)
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(chosen[row, : len(response)], expected, atol=1e-4, rtol=1e-4)
        generated = tuned.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert torch.equal(generated[0, len(prompt) :], response)


def test_a_prefix_starts_as_the_keys_and_values_of_drawn_tokens(tiny_policy):
    model = copy.deepcopy(load_policy(tiny_policy))
    torch.manual_seed(3)
    tokens = torch.randint(259, (1, 5))
    text = IDS[1:, :7]
    with torch.no_grad():
        expected = model(torch.cat([tokens, text], dim=1)).logits[:, 5:]
        torch.manual_seed(3)
        hidden = tune(model, settings("prefix")).hidden(text, torch.ones_like(text))
        torch.testing.assert_close(lm_head(model).logits(hidden), expected, atol=1e-4, rtol=1e-4)


def test_the_context_shrinks_by_the_virtual_tokens(tiny_policy):
    model = load_policy(tiny_policy)
    check_context(model, 256, "max_length", settings("lora"))
    with pytest.raises(ValueError, match="max_length: expected at most 251 tokens, .* less 5 virtual tokens, got 252"):
        check_context(model, 252, "max_length", settings("prefix"))
    tuned = tune(model, settings("prompt")).model
    assert context_length(tuned) == context_length(tuned, settings("prompt")) == 251


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "prefix",
            {"gradient_checkpointing": True},
            "gradient_checkpointing: expected false with tuner prefix, got true",
        ),
        ("prefix", {"model": "Mamba"}, "tuner: expected another than prefix for MambaForCausalLM, got "),
        ("prefix", {"model": "Falcon"}, "tuner: expected another than prefix for FalconForCausalLM, got .* shape"),
    ],
)
def test_virtual_tokens_that_cannot_be_are_refused(name, changes, message):
    model = randomised(tiny_config(getattr(transformers, f"{changes.pop('model', 'Llama')}Config")))
    with pytest.raises(ValueError, match=message):
        check_tuner(model, settings(name, **changes))


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "GPT2", "GPTNeoX", "Mistral"])
def test_virtual_tokens_fit_a_family(family):
    model = randomised(tiny_config(getattr(transformers, f"{family}Config")))
    for name in VIRTUAL:
        check_tuner(model, settings(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_goes_through_all_loops(name, tiny_policy, tmp_path, capsys):
    """PPO starts from what SFT and the reward loop made, adapters that cannot be merged included: the KL to the
    reference, which is the SFT model, is 0 before the first step and not after it."""
    for loop in ("sft", "reward"):
        main, cfg = tiny_run(f"{loop}, {name}", tmp_path, tiny_policy, tiny_policy)
        main(dataclasses.replace(cfg, max_steps=2, output=str(tmp_path / loop)))
        assert f"tuner {name}: " in capsys.readouterr().out
    main, cfg = tiny_run(f"ppo, {GOES_ON.get(name, name)}", tmp_path, tmp_path / "sft", tmp_path / "reward")
    main(dataclasses.replace(cfg, iterations=1, learning_rate=0.01))
    assert "policy: tuner" in (out := capsys.readouterr().out) and "critic: tuner" in out
    first, *_, last = [r["kl_k1"] for r in reported(cfg.output) if r["kind"] == "eval"]
    assert first == 0 != last
    load_policy(cfg.output)
    load_scalar_model(f"{cfg.output}/critic")


@pytest.mark.parametrize("name", [name for name, method in TUNERS.items() if method.saves_adapter])
def test_an_adapter_on_a_merged_base_names_that_one(name, tiny_policy, tmp_path):
    tokenizer = load_tokenizer(tiny_policy)
    model = tune(copy.deepcopy(load_policy(tiny_policy)), settings("lora")).model
    train(Policy(Full(model)), logprobs)
    save_model(model, tokenizer, tmp_path / "first")
    second = load_policy(tmp_path / "first")
    save_merged_base(second, tokenizer, tmp_path / "second")
    tuned = Policy(tune(second, settings(name)))
    train(tuned, logprobs)
    save_model(tuned.model, tokenizer, tmp_path / "second")
    assert adapter_base(tmp_path / "second") == str((tmp_path / "second/base").resolve())
    tuner = tune(load_policy(tmp_path / "second"), settings(GOES_ON.get(name, name)))
    with torch.no_grad():
        for output, expected in zip(logprobs(Policy(tuner)), logprobs(tuned), strict=True):
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tiny_policy, tiny_scalar):
    """Folders, by tuner, of policies and reward models whose adapters cannot be merged."""
    folders = {}
    for name in (name for name, method in TUNERS.items() if not method.merges):
        folders[name] = tmp_path_factory.mktemp(name)
        for kind, path in (("policy", tiny_policy), ("scorer", tiny_scalar)):
            model = tune(copy.deepcopy(KINDS[kind][1](path)), settings(name)).model
            save_model(model, load_tokenizer(path), folders[name] / kind)
    return folders


@pytest.mark.parametrize("name", [name for name, method in TUNERS.items() if not method.merges])
def test_what_cannot_be_merged_is_said_before_anything_is_written(
    name, kept, tiny_scalar, tmp_path, capsys, monkeypatch
):
    def refused(message, loop, changes, **options):
        main, cfg = tiny_run(loop, tmp_path, kept[name] / "policy", options.get("scalar", tiny_scalar))
        with pytest.raises(ValueError, match=message):
            main(dataclasses.replace(cfg, **changes))

    refused(f"merge_adapter: expected false with tuner {name}", f"ppo, {name}", {"merge_adapter": True})
    refused(f"tuner: expected {GOES_ON.get(name, name)}, which goes on with", "sft, lora", {})
    refused("adapter cannot be merged into a model: .*; give its base", "reward", {})
    for kind in ("policy", "scorer"):
        with pytest.raises(ValueError, match="adapter cannot be merged into a model"):
            export(str(kept[name] / kind), tmp_path / "out")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    chat.main([str(kept[name] / "policy"), "--max-new-tokens", "3", "--device", "cpu"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", TUNERS)
def test_sampling_sees_the_tuned_model_too(tiny_policy, name):
    """Rollouts decode through the inner model: with its cache, and left-padded, it gives the logits of `hidden`."""
    policy = Policy(tune(copy.deepcopy(load_policy(tiny_policy)), settings(name)))
    train(policy, logprobs)
    policy.eval()
    with torch.no_grad():
        expected = lm_head(policy.model).logits(policy.tuner.hidden(IDS, ATTENDED))
        cache = None
        for end in (5, 6, 7):
            logits, cache = next_logits(policy.model, IDS[:, :end], ATTENDED[:, :end], cache)
            torch.testing.assert_close(logits, expected[:, end - 1], atol=1e-4, rtol=1e-4)


# ---- one way to every number ----


class Counted(torch.nn.Module):
    """What DDP is to a loop: a module around the module."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *arguments, **options):
        self.calls += 1
        return self.module(*arguments, **options)


@pytest.mark.parametrize("door", [response_logprobs, token_scores, last_token_scores])
def test_functions_are_doors_to_forward(tiny_policy, tiny_scalar, door):
    """On a plain model, on a tuned module and on one that is wrapped: the same bits, and the wrapper sees the pass."""
    policy = door is response_logprobs
    model = load_policy(tiny_policy) if policy else load_scalar_model(tiny_scalar)
    tuned = (Policy if policy else Scorer)(tune(model, settings("full")))
    wrapped, arguments = Counted(tuned), (IDS, ATTENDED, MASK) if policy else (IDS, ATTENDED)
    with torch.no_grad():
        results = [door(module, *arguments) for module in (model, tuned, wrapped)]
        if policy:
            expected = tuned(*arguments)
        else:
            expected = only_criterion(tuned(*arguments, last_only=door is last_token_scores))
    assert all(torch.equal(result, expected) for result in results)
    assert wrapped.calls == 1


def test_a_denominator_gives_the_loss(tiny_policy):
    policy = Policy(tune(load_policy(tiny_policy), settings("full")))
    loss = policy(IDS, ATTENDED, MASK, denominator=3)
    torch.testing.assert_close(loss, -policy(IDS, ATTENDED, MASK).sum() / 3)
    with pytest.raises(ValueError, match="return_entropy: expected False with a denominator"):
        policy(IDS, ATTENDED, MASK, denominator=3, return_entropy=True)
    with pytest.raises(ValueError, match="return_top1: expected False with a denominator"):
        policy(IDS, ATTENDED, MASK, denominator=3, return_top1=True)
    with pytest.raises(ValueError, match="at least one prompt token"):
        policy(IDS, ATTENDED, ATTENDED)


@pytest.mark.parametrize("name", LOOPS)
def test_every_pass_of_a_loop_that_trains_goes_through_forward(tiny_policy, tiny_scalar, tmp_path, monkeypatch, name):
    """No backbone computes anything with gradients that a module's forward, which wrappers hook, did not ask for."""
    inside, passes = [False], {True: 0, False: 0}
    for module in (Policy, Scorer):

        def forward(self, *arguments, original=module.forward, **options):
            inside[0] = True
            try:
                return original(self, *arguments, **options)
            finally:
                inside[0] = False

        monkeypatch.setattr(module, "forward", forward)
    backbone = transformers.LlamaModel.forward

    def watched(self, *arguments, **options):
        if torch.is_grad_enabled():
            passes[inside[0]] += 1
        return backbone(self, *arguments, **options)

    monkeypatch.setattr(transformers.LlamaModel, "forward", watched)
    main, cfg = tiny_run(name, tmp_path, tiny_policy, tiny_scalar)
    changes = {"iterations": 1} if name.startswith("ppo") else {"max_steps": 1}
    main(dataclasses.replace(cfg, **changes))
    assert passes[True] > 0 and passes[False] == 0


@pytest.mark.parametrize("function", ["sft_loss", "sft_logprobs", "reward_loss", "scores", "logprobs", "values"])
def test_what_the_loops_compute_is_seen_by_a_wrapper(tiny_policy, tiny_scalar, function):
    policy = Counted(Policy(tune(load_policy(tiny_policy), settings())))
    scorer = Counted(Scorer(tune(load_scalar_model(tiny_scalar), settings())))
    pair = Preference([5, 6], [[7, 1], [8, 9, 1]], [0, 1], 0.0, None)
    trajectory = Trajectory(IDS, ATTENDED, IDS[:, -3:], MASK, torch.ones(2).bool())
    calls = {
        "sft_loss": lambda: sft_loss(policy, SFTBatch(IDS, ATTENDED, ATTENDED), denominator=9),
        "sft_logprobs": lambda: sft_logprobs(policy, SFTBatch(IDS, ATTENDED, ATTENDED)),
        "reward_loss": lambda: reward_loss(scorer, ranking_batch([pair], 0)),
        "scores": lambda: experience.response_scores(scorer, trajectory, 2),
        "logprobs": lambda: experience.sampled_logprobs(policy, trajectory, 2, 1.0),
        "values": lambda: experience.response_values(scorer, trajectory, 2),
    }
    calls[function]()
    assert policy.calls + scorer.calls == 1
