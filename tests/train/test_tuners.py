"""Every tuner: what is trained gets its gradient through the module's forward, and the loaded model stays within
reach."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from loops import LOOPS, tiny_run

from fastrl.data import Preference
from fastrl.data.batches import SFTBatch, ranking_batch
from fastrl.models import (
    TUNERS,
    Policy,
    Scorer,
    check_tuner,
    last_token_scores,
    load_policy,
    load_scalar_model,
    only_criterion,
    response_logprobs,
    saves_adapter,
    token_scores,
    tune,
)
from fastrl.models.decoding import next_logits
from fastrl.models.heads import lm_head
from fastrl.rollout import Trajectory
from fastrl.train import experience
from fastrl.train.losses import reward_loss, sft_logprobs, sft_loss

IDS = torch.tensor([[0, 0, 5, 6, 7, 9, 10, 1], [11, 12, 13, 14, 15, 16, 1, 0]])
ATTENDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]).bool()
MASK = ATTENDED[:, -3:]


def settings(name="lora", **overrides):
    return SimpleNamespace(
        **{"tuner": name, "lora_rank": 4, "lora_alpha": 0, "lora_targets": "all-linear", **overrides}
    )


def logprobs(policy):
    return policy(IDS, ATTENDED, MASK, temperature=0.7, return_entropy=True)


def every_score(scorer):
    return scorer(IDS, ATTENDED, last_only=False), scorer(IDS, ATTENDED, last_only=True)


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
    copied = copy.deepcopy(tuned)
    train(tuned, outputs)
    with torch.no_grad(), tuned.tuner.off():
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


def test_an_unknown_tuner_names_the_known_ones(tiny_policy):
    model = load_policy(tiny_policy)
    for function in (tune, check_tuner):
        with pytest.raises(ValueError, match=f"tuner: expected one of {', '.join(TUNERS)}, got 'qlora'"):
            function(model, settings("qlora"))
    with pytest.raises(ValueError, match="lora_targets: .*q_proj.*, got 'query'"):
        check_tuner(model, settings(lora_targets="query"))


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
