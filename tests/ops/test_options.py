"""Scalar options: what is no number, flag or name is a ValueError that names op and option."""

from __future__ import annotations

import pytest
import torch

from fastrl import ops

X, MASK, IDS = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
WEIGHT, ADAPTER = torch.zeros(4, 3), (torch.zeros(1, 3), torch.zeros(4, 1))
HEAD = ("temperature", "logit_scale", "softcap")

CALLS = {
    "token_logprobs": (lambda **o: ops.token_logprobs(X, IDS, **o), HEAD, ("return_entropy", "return_top1")),
    "linear_logprobs": (
        lambda **o: ops.linear_logprobs(X, WEIGHT, IDS, **o), HEAD, ("return_entropy", "return_top1"),
    ),
    "linear_cross_entropy": (lambda **o: ops.linear_cross_entropy(X, WEIGHT, IDS, **o), (*HEAD, "denominator"), ()),
    "lora_linear": (
        lambda scaling=1.0, **o: ops.lora_linear(X, WEIGHT, *ADAPTER, scaling, **o), ("scaling", "dropout"), (),
    ),
    "lora_linear_group": (
        lambda scaling=1.0, **o: ops.lora_linear_group(X, [ops.LoRAWeights(WEIGHT, *ADAPTER, scaling)], **o),
        ("scaling", "dropout"), (),
    ),
    "gae": (lambda **o: ops.gae(X, X, MASK, **o), ("gamma", "gae_lambda"), ()),
    "ppo_advantages": (
        lambda **o: ops.ppo_advantages(X, X, X, X[:, 0], MASK, **o),
        ("kl_coef", "kl_clip", "score_clip", "gamma", "gae_lambda"), ("center", "scale", "kl_estimator"),
    ),
    "ppo_loss": (
        lambda **o: ops.ppo_loss(X, X, X, X, X, X, MASK, entropy=X, **o),
        ("clip_coef", "vf_clip_coef", "vf_coef", "ent_coef", "dual_clip", "denominator"), (),
    ),
    "ranking_loss": (lambda **o: ops.ranking_loss(X[:, 0], IDS, IDS, **o), ("center_coef",), ()),
}  # fmt: skip
NOTHING_IS_A_CHOICE = ("softcap", "kl_clip", "score_clip", "vf_clip_coef", "dual_clip", "denominator")
NO_NUMBERS = ["0.5", (0.5,), [0.5], {}, True, float("nan"), float("inf"), 1j, torch.tensor([0.5, 0.5]), None]
CASES = [(op, name, False) for op, (_, names, _) in CALLS.items() for name in names]
CASES += [(op, name, True) for op, (*_, names) in CALLS.items() for name in names]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op, name, choice", CASES, ids=str)
def test_no_number_is_refused_by_name(op, name, choice, backend):
    bad = [None, "yes", 1, (True,), torch.tensor(True)] if choice else NO_NUMBERS
    for value in bad:
        if value is None and name in NOTHING_IS_A_CHOICE:
            continue
        if isinstance(value, torch.Tensor) and (op, name) == ("gae", "gae_lambda"):  # one for each row
            continue
        with pytest.raises(ValueError, match=f"{op}: {name}: expected"):
            CALLS[op][0](**{name: value}, backend=backend)


def test_a_tensor_is_no_option():
    """Its gradient would be lost; gae_lambda and denominators may be tensors."""
    for op, name, choice in CASES:
        if not choice and (op, name) != ("gae", "gae_lambda") and name != "denominator":
            with pytest.raises(ValueError, match=f"{op}: {name}: expected .*a tensor"):
                CALLS[op][0](**{name: torch.tensor(0.5)})


@pytest.mark.parametrize("op", CALLS)
def test_bad_backend(op):
    for value in (("cpu",), 1, "gpu", "", torch.zeros(2)):
        with pytest.raises(ValueError, match=f"{op}: backend: expected one of"):
            CALLS[op][0](backend=value)


def test_numbers_of_other_kinds_are_numbers():
    numpy = pytest.importorskip("numpy")
    for one in (1, numpy.float32(1), numpy.float64(1), numpy.int64(1)):
        assert torch.equal(ops.token_logprobs(X, IDS, temperature=one), ops.token_logprobs(X, IDS))


def test_dones_are_spoken_of_as_dones():
    """For dones True means that the episode ends, the opposite of what it means in a mask."""
    with pytest.raises(
        ValueError, match="gae: dones: expected bool, True = the episode ends after this token.*float32"
    ):
        ops.gae(X, X, dones=X)
