"""fastrl.integrations.trl: TRL's own trainers are the oracle, patched and not. Runs with any TRL that it supports."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.utils as utils
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM
from trl_runs import KINDS, LAYERS, make_trainer, records, run, write_model

import fastrl
from fastrl.integrations import hosts
from fastrl.integrations.trl import functions, patch, patching, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_FUSED_HEAD = hasattr(utils, "add_fused_lm_head")
with_fused_head = pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL before 1.15 has no add_fused_lm_head")
ORIGINAL = utils._ChunkedLogProbFunction


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("trl") / "model")


@pytest.fixture
def patched():
    patch()
    yield
    unpatch()


def held():
    """{(module, name): what it is} of TRL's modules that are loaded."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "trl"]
    return {(m.__name__, name): vars(m)[name] for m in modules for name in patching.SLOTS if name in vars(m)}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "kind", [k if k in ("sft", "dpo") else pytest.param(k, marks=pytest.mark.hosts) for k in KINDS]
)
def test_a_trainer_takes_the_same_steps(kind, lora, model, tmp_path, monkeypatch):
    """Losses and entropies to 1e-5, parameters after three steps of SGD to 1e-5; TRL's own head never runs."""
    want = run(make_trainer(kind, model, tmp_path, lora=lora))
    patch()
    try:
        if HAS_FUSED_HEAD:
            monkeypatch.setattr(ORIGINAL, "forward", None)
        found = run(make_trainer(kind, model, tmp_path, lora=lora))
    finally:
        unpatch()
    assert len(want.losses) == 3 and want.parameters
    torch.testing.assert_close(found.losses, want.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropies, want.entropies, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.parameters, want.parameters, rtol=1e-5, atol=1e-5)
    start = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert all((value != (0 if lora else start[name])).any() for name, value in want.parameters.items())
    assert kind == "kto" or all(entropy > 0 for entropy in found.entropies)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_with_fused_layers_as_well(kind, model, tmp_path, patched):
    """`fastrl.patch` on the trainer's PEFT model, beside the head."""
    want = run(make_trainer(kind, model, tmp_path, lora=True))
    trainer = make_trainer(kind, model, tmp_path, lora=True)
    assert len(fastrl.patch(trainer.model)) == 2 * len(LAYERS)
    found = run(trainer)
    torch.testing.assert_close(found.losses, want.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.parameters, want.parameters, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast(model, tmp_path):
    """TRL's default: logits are rounded to bfloat16 there and summed in float32 here."""
    want = run(make_trainer("sft", model, tmp_path, lora=True, bf16=True))
    patch()
    found = run(make_trainer("sft", model, tmp_path, lora=True, bf16=True))
    unpatch()
    torch.testing.assert_close(found.losses, want.losses, rtol=2e-3, atol=0)
    torch.testing.assert_close(found.entropies, want.entropies, rtol=5e-3, atol=0)


@with_fused_head
def test_ignored_positions_are_never_multiplied(model, tmp_path, monkeypatch, patched):
    """On a CPU, too: of SFT's prompts and padding none reaches the head."""
    rows = []
    original = functions.linear_logprobs
    monkeypatch.setattr(functions, "linear_logprobs", lambda h, *a, **k: rows.append(len(h)) or original(h, *a, **k))
    run(make_trainer("sft", model, tmp_path, max_steps=2, train_sampling_strategy="sequential"))
    completions = [len(record["completion"].split()) + 1 for record in records("sft")]
    assert sum(rows) == sum(completions)


def head_inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(30, 16, generator=g).to(dtype)
    weight = (torch.randn(97, 16, generator=g) * 0.5).to(dtype)
    bias = torch.randn(97, generator=g).to(dtype)
    return hidden, weight, bias, torch.randint(97, (30,), generator=g), torch.randn(2, 30, generator=g)


def head_results(function, case, outputs, cap=None, dtype=torch.float32):
    hidden, weight, bias, targets, upstream = case
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    found = function.apply(*leaves, targets, 0.7, 64, cap, 0.5, outputs)
    loss = (found[0] * upstream[0]).sum()
    if "entropy" in outputs:
        loss = loss + (found[1] * upstream[1]).sum()
    return [*found, *torch.autograd.grad(loss, leaves)]


@with_fused_head
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(
    "outputs",
    [(), ("log_probs",), ("entropy",), ("is_top1",), ("log_probs", "entropy", "is_top1"), ("mean_logits", "is_top1")],
    ids=str,
)
def test_the_head_gives_what_trls_gives(outputs, cap, patched):
    """Bias, temperature, scale and softcap; gradients through log-probs and entropy; None where nothing is asked."""
    case = head_inputs()
    want = head_results(ORIGINAL, case, outputs, cap)
    found = head_results(utils._ChunkedLogProbFunction, case, outputs, cap)
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(HAS_FUSED_HEAD, reason="TRL from 1.15 has outputs")
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_head_before_1_15_gives_what_trls_gives(cap, patched):
    """That of the asynchronous GRPO; its entropy has no gradient."""
    hidden, weight, _, targets, upstream = head_inputs()
    values = []
    for function in (utils._ChunkedLogProbFunction, ORIGINAL):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        log_probs, entropy = function.apply(*leaves, targets, 0.7, 64, cap, 0.5)
        values.append((log_probs, entropy, *torch.autograd.grad((log_probs * upstream[0]).sum(), leaves)))
    torch.testing.assert_close(*values, rtol=2e-5, atol=2e-5)


@with_fused_head
def test_the_rarer_outputs_are_trls_own(patched):
    case, outputs = head_inputs(), ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    want = head_results(ORIGINAL, case, outputs)
    found = head_results(utils._ChunkedLogProbFunction, case, outputs)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@with_fused_head
def test_a_half_precision_head_below_float32_hidden_states(patched):
    """GRPO's cast_lm_head_to_fp32: TRL multiplies in the dtype of the hidden states, and so does fastrl."""
    hidden, weight, bias, targets, upstream = head_inputs()
    case = (hidden, weight.bfloat16(), bias.bfloat16(), targets, upstream)
    want = head_results(ORIGINAL, case, ("entropy",))
    found = head_results(utils._ChunkedLogProbFunction, case, ("entropy",))
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_on_logits(dtype, patched):
    """`selective_log_softmax` and `entropy_from_logits`, with gradients; bfloat16 logits give float32, as TRL's own
    kernel on a GPU does."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 97, generator=g) * 2).to(dtype)
    index, upstream = torch.randint(97, (3, 5), generator=g), torch.randn(3, 5, generator=g)
    originals = {name: original for name, (original, _) in patching._replaced.items()}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for name, arguments in (("selective_log_softmax", (index,)), ("entropy_from_logits", ())):
        values = []
        for function in (getattr(utils, name), originals[name]):
            leaf = logits.clone().requires_grad_()
            out = function(leaf, *arguments)
            assert out.dtype == (torch.float32 if function is not originals[name] else dtype)
            values.append((out.float(), torch.autograd.grad((out * upstream).sum(), leaf)[0].float()))
        torch.testing.assert_close(values[0], values[1], **tolerance)


@pytest.mark.skipif(not hasattr(utils, "selective_log_softmax_and_entropy"), reason="TRL before 1.14")
def test_log_probs_and_entropy_in_one_pass(patched):
    """Temperature, a mask of rows, an entropy without gradient."""
    g = torch.Generator().manual_seed(0)
    logits, index = torch.randn(3, 5, 97, generator=g), torch.randint(97, (3, 5), generator=g)
    mask = (torch.arange(5) < torch.tensor([5, 2, 0])[:, None]).long()
    original = patching._replaced["selective_log_softmax_and_entropy"][0]
    for requires_grad in (True, False):
        leaf = logits.clone().requires_grad_()
        options = {"entropy_requires_grad": requires_grad, "temperature": 0.7, "row_mask": mask}
        found = utils.selective_log_softmax_and_entropy(leaf, index, **options)
        torch.testing.assert_close(found, original(leaf, index, **options), rtol=1e-5, atol=1e-5)
        assert [out.requires_grad for out in found] == [True, requires_grad]
    masked = utils.selective_log_softmax(logits, index, temperature=0.7, row_mask=mask)
    assert torch.equal(masked, found[0]) and (masked[2] == 0).all()


@pytest.mark.parametrize("logits, index", [((3, 5, 97), (3, 5, 4)), ((3, 5, 97), (3, 5))], ids=["top k", "float64"])
def test_what_has_no_kernel_is_trls_own(logits, index, patched):
    logits = torch.randn(logits, dtype=torch.float64 if len(index) == 2 else torch.float32)
    index = torch.randint(97, index)
    original = patching._replaced["selective_log_softmax"][0]
    found = utils.selective_log_softmax(logits, index)
    assert found.dtype == logits.dtype and torch.equal(found, original(logits, index))


def test_every_module_that_knows_a_function_by_name_gets_it_and_gives_it_back(monkeypatch):
    importlib.import_module("trl.trainer.sft_trainer")
    late = "trl.experimental.sdft"
    for name in [name for name in sys.modules if name.startswith(late)]:
        monkeypatch.delitem(sys.modules, name)
    before = held()
    patch()
    after = held()
    for (module, name), value in before.items():
        original, ours = patching._replaced[name]
        elsewhere = patching.SLOTS[name].local and module != patching.UTILS
        assert after[module, name] is (ours if value is original and not elsewhere else value), (module, name)
    loss_utils = importlib.import_module(f"{late}.loss_utils")
    assert loss_utils.selective_log_softmax is utils.selective_log_softmax
    patch()  # changes nothing
    assert {key: value for key, value in held().items() if not key[0].startswith(late)} == after
    unpatch()
    assert {key: value for key, value in held().items() if not key[0].startswith(late)} == before
    assert loss_utils.selective_log_softmax is before[patching.UTILS, "selective_log_softmax"]
    unpatch()  # does nothing


def test_signatures_stay(patched, model):
    """`generate` and users look at them."""
    for name, (original, ours) in patching._replaced.items():
        assert inspect.signature(ours) == inspect.signature(original), name
    if HAS_FUSED_HEAD:
        headed = AutoModelForCausalLM.from_pretrained(model)
        want = inspect.signature(headed.forward)
        utils.add_fused_lm_head(headed)
        assert inspect.signature(headed.forward) == want
        tokens = torch.tensor([[5, 6, 7]])
        plain = AutoModelForCausalLM.from_pretrained(model)
        assert torch.equal(headed(tokens).logits, plain(tokens).logits)
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(headed.generate(tokens, **settings), plain.generate(tokens, **settings))


@pytest.mark.parametrize("name", ["selective_log_softmax", "_ChunkedLogProbFunction", "entropy_from_logits"])
def test_a_version_that_differs_is_refused_and_left_alone(name, monkeypatch):
    def another(logits, index, mode):
        raise AssertionError

    for value in (another, None):
        with monkeypatch.context() as changed:
            changed.setattr(utils, name, value)
            before = held()
            with pytest.raises(RuntimeError, match=rf"{name}: expected parameters .* got .*nothing was patched"):
                patch()
            assert held() == before and not patching._replaced


def test_an_untested_version_works_with_one_warning(monkeypatch):
    monkeypatch.setattr(hosts, "version", lambda name: "1.99.0")
    with pytest.warns(UserWarning, match=r"trl 1.99.0 was not tested \(1.12.0 to 1.16.0 were\)") as warned:
        patch()
    assert len(warned) == 1 and utils._ChunkedLogProbFunction is not ORIGINAL
    unpatch()


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(ImportError, match=r"TRL cannot be imported .*pip install 'trl>=1.12"):
        patch()


def test_what_something_else_put_over_it_stays(monkeypatch):
    patch()
    ours = utils.selective_log_softmax
    theirs = lambda logits, index: ours(logits, index)  # noqa: E731
    with monkeypatch.context() as changed:
        changed.setattr(utils, "selective_log_softmax", theirs)
        with pytest.warns(UserWarning, match="selective_log_softmax of trl.trainer.utils was replaced after patch"):
            unpatch()
        assert utils.selective_log_softmax is theirs and utils._ChunkedLogProbFunction is ORIGINAL
    utils.selective_log_softmax = ours.__wrapped__


def adapted_head(model, **options):
    """A model with LoRA on its layers and its head, put there without a PeftModel, which TRL refuses."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **options)
    torch.manual_seed(1)
    adapted = inject_adapter_in_model(config, loaded)
    torch.nn.init.normal_(adapted.lm_head.lora_B["default"].weight, std=0.1)
    return adapted


@with_fused_head
def test_an_adapter_on_the_head_is_trained(model, tmp_path, patched):
    """SFT equals the loss of the model's own forward, which forms logits; without the patch TRL leaves it out."""
    adapted = adapted_head(model)
    trainer = make_trainer("sft", adapted, tmp_path, max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    plain = adapted_head(model)
    plain.eval()
    loss = plain(**{name: value for name, value in batch.items()}).loss
    loss.backward()
    found = run(trainer)
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        if "lora_" in name and "lm_head" in name:
            expected = parameter.detach() - 0.05 * parameter.grad
            torch.testing.assert_close(found.parameters[name], expected, rtol=1e-4, atol=1e-6)
            assert parameter.grad.abs().max() > 1e-4


@with_fused_head
def test_an_adapter_on_the_head_that_cannot_be_computed_is_refused(model, patched):
    tokens = torch.tensor([[5, 6, 7]])
    for options, outputs, message in (
        ({"lora_dropout": 0.5}, ("log_probs",), "lora_dropout: expected 0"),
        ({}, ("log_sum_sq_probs",), "adapter on lm_head: expected outputs among"),
    ):
        adapted = adapted_head(model, **options).train()
        utils.add_fused_lm_head(adapted, outputs=outputs)
        with pytest.raises(ValueError, match=message):
            adapted(tokens, labels=tokens, fused_lm_head=True)


@with_fused_head
def test_trl_goes_on_refusing_what_it_refuses(model, tmp_path, patched):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    adapted.config.name_or_path = str(model)
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        make_trainer("sft", adapted, tmp_path)
