"""Every tuner: what is trained gets its gradient through the module's forward, and the loaded model stays within
reach."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

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
    """(Policy or Scorer, the loaded model, its outputs)"""
    module, load, outputs = KINDS[request.param]
    return module, load(tiny_policy if request.param == "policy" else tiny_scalar), outputs


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
        for loaded, same in zip(outputs(copied), outputs(tuned), strict=True):
            torch.testing.assert_close(
                loaded, same
            )  # not the same bits: a product may depend on its tensors' addresses
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
        with pytest.raises(ValueError, match="tuner: expected one of full, lora, got 'qlora'"):
            function(model, settings("qlora"))
    with pytest.raises(ValueError, match="lora_targets: .*q_proj.*, got 'query'"):
        check_tuner(model, settings(lora_targets="query"))


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
    with pytest.raises(ValueError, match="at least one prompt token"):
        policy(IDS, ATTENDED, ATTENDED)
