"""fastrl.patch(model, head=True): the models' own loss, gradients and logits are the oracle."""

from __future__ import annotations

import copy
import csv
import pickle
from contextlib import nullcontext
from functools import partial
from types import MethodType

import peft
import pytest
import torch
import transformers
from accelerate.utils.operations import convert_outputs_to_fp32
from families import TABLE, build, randomised, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrl
from fastrl.models import head_patch

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 300
IDS = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.3, -100, IDS)
FAMILIES = {
    "Llama": {}, "GPT2": {"tie_word_embeddings": True}, "Gemma2": {"tie_word_embeddings": True}, "Cohere": {},
    "Granite": {}, "FalconH1": {}, "Phi": {}, "Mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "Qwen3Moe": {"output_router_logits": True}, "Mamba": {},
}  # fmt: skip


def tiny(family="Llama", **overrides):
    model = randomised(tiny_config(getattr(transformers, f"{family}Config"), **overrides))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def with_lora(model, **options):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()


def pair(model=None, **options):
    """(the model as it was, a copy that is patched, the handle)."""
    model = tiny() if model is None else model
    patched = copy.deepcopy(model)
    return model, patched, fastrl.patch(patched, head=True, **options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, patched, rtol=1e-5, **inputs):
    """Loss to `rtol`, and every gradient to 1e-4 of its own largest value."""
    inputs = {"input_ids": IDS, "labels": LABELS, **inputs}
    want, got = model(**inputs), patched(**inputs)
    assert got.logits is None and "logits" not in got and type(got) is type(want)
    torch.testing.assert_close(got.loss, want.loss, rtol=rtol, atol=0)
    want, got = gradients(model, want.loss), gradients(patched, got.loss)
    assert got.keys() == want.keys() and len(got) > 0
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=float(want[name].abs().max()) * 1e-4, msg=name)


def label_logprobs(model, labels, temperature=1.0, **inputs):
    """(log-probs, entropies) of labels from the model's whole logits, in the places of the labels."""
    logprobs = (model(**inputs).logits.float() / temperature).log_softmax(-1)[:, :-1]
    kept = labels[:, 1:] != -100
    chosen = logprobs.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return tuple(nn.functional.pad(torch.where(kept, values, 0), (1, 0)) for values in (chosen, entropy))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family):
    """Scales, caps, biases, tied weights, and the auxiliary loss of experts."""
    model, patched, _ = pair(tiny(family, **FAMILIES[family]))
    assert_same(model, patched)
    assert_same(model, patched, num_items_in_batch=torch.tensor(7), attention_mask=torch.ones_like(IDS))


def built():
    with TABLE.open(newline="") as file:
        return [row["model_type"] for row in csv.DictReader(file) if row["outcome"] != "not built"]


@pytest.mark.families
@pytest.mark.parametrize("model_type", built())
def test_every_causal_family_has_its_own_loss_or_is_refused(model_type):
    model, reason = build(model_type)
    if model is None:
        pytest.skip(reason)
    inputs = {"input_ids": IDS[:2] % 256 + 3, "labels": LABELS[:2].clamp(max=255)}
    try:
        want = model(**inputs).loss
    except ValueError as error:  # a model of pictures
        pytest.skip(str(error))
    try:
        fastrl.patch(model, head=True, eval_logits=False)
        got = model(**inputs).loss
    except ValueError as error:
        assert str(error).startswith(("patch: ", "fused head: ")), error
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5)},
        {"ignore_index": 17, "labels": torch.where(LABELS < 0, 17, LABELS)},
        {"labels": LABELS, "shift_labels": IDS.roll(-1, 1)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_the_loss_are_the_models_own(options):
    model, patched, _ = pair()
    assert_same(model, patched, **options)


def test_shift_labels_alone_give_the_loss_too():
    """Without `labels` transformers' models return no loss; their loss function has one."""
    model, patched, _ = pair()
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(patched(IDS, shift_labels=shifted).loss, model(IDS, labels=LABELS).loss)


ADAPTED = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "a head that is trained whole": {"modules_to_save": ["lm_head"]},
    "a frozen head": {},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapters_on_the_head_count(options, tied):
    """Pitfall 30."""
    model, patched, handle = pair(with_lora(tiny(tie_word_embeddings=tied), **options))
    assert len(handle) >= 4 and handle.head is not None and "and the head" in repr(handle)
    assert_same(model, patched)
    with model.disable_adapter(), patched.disable_adapter():
        torch.testing.assert_close(patched(IDS, labels=LABELS).loss, model(IDS, labels=LABELS).loss)
    if "modules_to_save" not in options and not tied:
        model.merge_adapter(), patched.merge_adapter()
        torch.testing.assert_close(patched(IDS, labels=LABELS).loss, model(IDS, labels=LABELS).loss)


def test_another_adapter_that_leaves_the_head_out():
    model = with_lora(tiny(), target_modules=["q_proj", "lm_head"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model, patched, _ = pair(model)
    for each in (model, patched):
        each.set_adapter("second")
    assert_same(model, patched)


@pytest.mark.parametrize("shift", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mixtral"])
def test_log_probs_and_entropies_are_those_of_the_logits(family, shift):
    model, patched, _ = pair(tiny(family))
    logprobs, entropy = label_logprobs(model, LABELS, 0.7, input_ids=IDS)
    given, place = {"labels": LABELS}, slice(None)
    if shift:
        given, place = {"shift_labels": nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]}, slice(1, None)
    out = patched(IDS, return_logprobs=True, return_entropy=True, temperature=0.7, **given)
    columns = out.logprobs[:, :-1] if shift else out.logprobs
    assert out.logprobs.shape == out.entropy.shape == LABELS.shape and out.logprobs.dtype == torch.float32
    torch.testing.assert_close(columns, logprobs[:, place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy[:, :-1] if shift else out.entropy, entropy[:, place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, -logprobs.sum() / (LABELS[:, 1:] != -100).sum())
    upstream = torch.randn(columns.shape, generator=torch.Generator().manual_seed(2))
    want = gradients(model, (logprobs[:, place] * upstream).sum())
    got = gradients(patched, (columns * upstream).sum())
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=float(want[name].abs().max()) * 1e-4, msg=name)
    assert patched(IDS, return_logprobs=True, **given).entropy is None


def test_log_probs_go_through_the_adapters_wrapper_in_any_mode():
    model, patched, _ = pair(with_lora(tiny()))
    model.eval(), patched.eval()
    with torch.no_grad():
        found = patched(input_ids=IDS, labels=LABELS, return_logprobs=True)
        torch.testing.assert_close(found.logprobs, label_logprobs(model, LABELS, input_ids=IDS)[0])
    assert "logits" not in found


def test_what_is_no_loss_stays_the_models_own_to_the_bit():
    """Logits, generation with a cache and log-likelihoods in evaluation mode; training mode has no logits."""
    model, patched, _ = pair(with_lora(tiny("Gemma2", tie_word_embeddings=True)), eval_logits=True)
    fastrl.patch(model)
    assert torch.equal(patched(IDS).logits, model(IDS).logits)
    model.eval(), patched.eval()
    greedy = [each.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False) for each in (model, patched)]
    assert torch.equal(*greedy)
    want, got = (each(input_ids=IDS, labels=LABELS) for each in (model, patched))
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)


def test_logits_are_skipped_where_it_is_asked_for():
    _, patched, handle = pair()
    assert patched(IDS, labels=LABELS, skip_logits=False).logits.shape == (3, 11, VOCABULARY)
    patched.eval()
    assert patched(IDS, labels=LABELS, skip_logits=True).logits is None
    handle.undo()
    fastrl.patch(patched, head=True, eval_logits=False)
    assert patched(IDS, labels=LABELS).logits is None


def test_a_tuple_is_returned_where_it_is_asked_for():
    model, patched, _ = pair()
    (loss, *rest), want = patched(IDS, labels=LABELS, return_dict=False, use_cache=False), model(IDS, labels=LABELS)
    torch.testing.assert_close(loss, want.loss)
    assert rest == []


class Largest(TorchDispatchMode):
    """The largest tensor that torch makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_logits_are_formed():
    model, patched, _ = pair(with_lora(tiny(vocab_size=5000)))
    for each, formed in ((model, True), (patched, False)):
        with Largest() as seen:
            each(input_ids=IDS, labels=LABELS).loss.backward()
        assert (seen.numel >= IDS.numel() * 5000) == formed


def test_positions_without_a_label_may_hold_anything():
    """Pitfall 9: what is not predicted adds nothing, in the loss and in the gradients."""
    _, patched, _ = pair()
    nothing = torch.full_like(LABELS, -100)
    loss = patched(IDS, labels=nothing).loss
    assert loss == 0  # transformers: NaN
    assert all(grad.abs().max() == 0 for grad in gradients(patched, loss).values())


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(autocast):
    """Within twice the error of the model's own loss, which rounds the logits to bfloat16."""
    model = tiny() if autocast else tiny().bfloat16()
    model, patched, _ = pair(model)
    truth = copy.deepcopy(model).double()(IDS, labels=LABELS).loss
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        want, got = (each(IDS, labels=LABELS).loss for each in (model, patched))
    assert got.dtype == torch.float32
    assert abs(got - truth) <= 2 * abs(want - truth) + 2e-2 * truth
    assert len(gradients(patched, got)) == len(gradients(model, want))


def test_gradient_checkpointing():
    model, patched, _ = pair()
    for each in (model, patched):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(model, patched)


def test_undo_brings_back_exactly_what_was_there():
    model = with_lora(tiny())
    base = model.get_base_model()
    before = [dict(module.__dict__) for module in base.modules()]
    want = model(input_ids=IDS, labels=LABELS)
    handle = fastrl.patch(model, head=True)
    assert "forward" in base.__dict__ and model(input_ids=IDS, labels=LABELS).logits is None
    handle.undo()
    handle.undo()
    assert all(module.__dict__.keys() == own.keys() for module, own in zip(base.modules(), before, strict=True))
    got = model(input_ids=IDS, labels=LABELS)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)
    with fastrl.patch(model, head=True):
        assert model(input_ids=IDS, labels=LABELS).logits is None
    assert model(input_ids=IDS, labels=LABELS).logits is not None


def test_a_second_patch_leaves_the_head_to_the_first():
    model = tiny()
    first, second = fastrl.patch(model, head=True), fastrl.patch(model, head=True)
    assert first.head is not None and second.head is None
    second.undo()
    assert model(IDS, labels=LABELS).logits is None
    first.undo()
    assert model(IDS, labels=LABELS).logits is not None and "forward" not in model.__dict__


def test_layers_alone_keep_the_head():
    model = with_lora(tiny())
    handle = fastrl.patch(model)
    assert handle.head is None and len(handle) == 8 and "head" not in repr(handle)
    assert model(input_ids=IDS, labels=LABELS).logits is not None


def wrapped_by_accelerate(model):
    """As `Accelerator.prepare` does for mixed precision."""
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    return model.forward


def wrapped_by_a_partial(model):
    model.forward = partial(type(model).forward, model)
    return model.forward


@pytest.mark.parametrize("wrap", [wrapped_by_accelerate, wrapped_by_a_partial], ids=lambda f: f.__name__)
def test_a_forward_that_is_wrapped_already_stays_inside(wrap):
    model = tiny()
    want, inner = model(IDS, labels=LABELS).loss, wrap(model)
    handle = fastrl.patch(model, head=True)
    torch.testing.assert_close(model(IDS, labels=LABELS).loss, want)
    handle.undo()
    assert model.__dict__["forward"] is inner


def test_undo_in_the_wrong_order_says_so_and_changes_nothing():
    model = with_lora(tiny())
    base = model.get_base_model()
    handle = fastrl.patch(model, head=True)
    patched = base.forward
    wrapped_by_accelerate(base)
    assert fastrl.patch(model, head=True).head is None  # ours is below
    with pytest.raises(ValueError, match="undo: LlamaForCausalLM.forward: .* undo in the reverse order"):
        handle.undo()
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear" and len(fastrl.patch(model)) == 0
    base.forward = patched
    handle.undo()
    assert "forward" not in base.__dict__ and len(fastrl.patch(model)) == 8


def test_a_copy_is_patched_like_its_model_and_a_pickle_is_not():
    model, patched, handle = pair()
    copied = copy.deepcopy(patched)
    with torch.no_grad():
        patched.lm_head.weight.zero_()
    assert_same(model, copied)
    handle.undo()
    assert copied(IDS, labels=LABELS).logits is None
    data = pickle.dumps(copied)
    assert b"fastrl" not in data
    assert torch.equal(pickle.loads(data)(IDS, labels=LABELS).logits, model(IDS, labels=LABELS).logits)


def test_arguments_are_read_as_before():
    """Trainer keeps the columns that forward names, and passes num_items_in_batch where it takes further keywords."""
    import inspect

    model = tiny()
    before = inspect.signature(model.forward)
    fastrl.patch(model, head=True)
    assert inspect.signature(model.forward) == before


def test_a_model_on_the_meta_device_is_patched_before_its_weights_are_there():
    model = tiny()
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config).train()
    handle = fastrl.patch(empty, head=True)
    assert empty(IDS.to("meta"), labels=LABELS.to("meta")).loss.is_meta
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    empty.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # a buffer outside of the state dict
    assert_same(model, empty)
    handle.undo()


@pytest.mark.hosts
@pytest.mark.slow
def test_a_patched_model_is_one_graph_for_the_compiler():
    _, patched, _ = pair(tiny(num_hidden_layers=1))
    want = patched(IDS, labels=LABELS).loss
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    found = gradients(patched, compiled(IDS, labels=LABELS).loss)
    torch.testing.assert_close(compiled(IDS, labels=LABELS).loss, want)
    for name, grad in gradients(patched, want).items():
        torch.testing.assert_close(found[name], grad, msg=name)


# what is refused: the error names the model, what was expected and what was there; nothing is changed


def quantised():
    class Packed(nn.Linear):
        def forward(self, x):
            raise AssertionError

    model = tiny()
    model.lm_head = Packed(32, VOCABULARY, bias=False)
    return model


def of_integers():
    model = tiny()
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 32, dtype=torch.int8), requires_grad=False)
    return model


def sharded_by_zero3():
    model = tiny()
    model.lm_head.weight.ds_id = 7
    return model


def with_padded_rows():
    model = tiny()
    model.config.unpadded_vocab_size = VOCABULARY - 3
    return model


def with_its_own_loss():
    model = tiny()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.mean()
    return model


class Own(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None):
        return nn.functional.cross_entropy(self.lm_head(self.model(input_ids).last_hidden_state), labels)


REFUSED = {
    "no language model": (lambda: nn.Linear(2, 2), "expected a causal language model .* got Linear"),
    "a classifier": (
        lambda: transformers.LlamaForSequenceClassification(tiny_config(transformers.LlamaConfig)),
        "expected a causal language model .* got LlamaForSequenceClassification",
    ),
    "an encoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "T5ForConditionalGeneration: loss_function: expected ForCausalLMLoss of a decoder",
    ),
    "a head with a product of its own": (quantised, "output head: expected nn.Linear's own product, got Packed"),
    "a quantised head": (of_integers, r"expected floating-point weights, got torch.int8 \(quantised\?\)"),
    "ZeRO-3": (sharded_by_zero3, "expected whole weights .* DeepSpeed ZeRO-3 shards"),
    "a padded vocabulary": (with_padded_rows, "unpadded_vocab_size: expected 300, one for each row .*, got 297"),
    "another loss": (with_its_own_loss, "loss_function: expected ForCausalLMLoss of a decoder, got <lambda>"),
    "an inline loss": (
        lambda: Own(tiny_config(transformers.LlamaConfig)),
        "forward: expected a call of self.loss_function",
    ),
    "dropout before the head": (
        lambda: with_lora(tiny(), target_modules=["lm_head"], lora_dropout=0.1),
        "LlamaForCausalLM: .*lora_dropout: expected 0 on an adapted output head",
    ),
    "DoRA on the head": (
        lambda: with_lora(tiny(), target_modules=["lm_head"], use_dora=True),
        "adapter default: expected plain LoRA on the output head",
    ),
    "trained tokens": (
        lambda: with_lora(tiny(tie_word_embeddings=True), trainable_token_indices=[3]),
        "output head: expected nn.Linear, got TrainableTokensWrapper",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_a_head_that_is_not_understood_is_refused_by_name(make, message):
    model = make()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        fastrl.patch(model, head=True)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert [type(module) for module in model.modules()] == types


class Extended(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids, **kwargs)


def test_a_model_that_extends_the_forward_of_another_is_understood():
    assert_same(*pair(Extended(tiny_config(transformers.LlamaConfig)).train())[:2])


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state) * 2
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Cut(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)[..., :5]
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Penalised(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        loss = loss + 0.1 * logits.logsumexp(-1).square().mean()
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Relabelled(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels.roll(1), self.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Twice(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden) + self.lm_head(hidden)
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class PastIt(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.T
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Unused(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, self.vocab_size) if input_ids is None else None
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


SURPRISING = {
    Doubled: r"logits: .*to be \[-4.0, -1.0, 0.0, 1.0, 4.0\] at the loss, .* got \[-8.0, -2.0, 0.0, 2.0, 8.0\]",
    Cut: "logits: expected them whole at the loss",
    Penalised: "loss: expected no other use of the logits",
    Relabelled: "labels: expected those of the call at the loss, got others",
    Twice: "output head: expected one call of it in a forward pass, got a second",
    PastIt: "output head: expected a call of it before the loss, got none",
    Unused: "loss_function: expected a call of it, got none",
}


@pytest.mark.parametrize("kind, message", SURPRISING.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_that_does_more_with_its_logits_is_refused_in_its_first_step(kind, message):
    model = kind(tiny_config(transformers.LlamaConfig)).train()
    handle = fastrl.patch(model, head=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"fused head: {kind.__name__}: {message}.*undo"):
            model(IDS, labels=LABELS)
    handle.undo()
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_bad_input_is_named():
    _, patched, _ = pair()
    with pytest.raises(ValueError, match="return_logprobs: expected labels or shift_labels with it, got none"):
        patched(IDS, return_logprobs=True)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels: expected ids in \[0, 300\), got 300"):
        patched(IDS, labels=torch.where(LABELS < 0, LABELS, 300))
    with pytest.raises(ValueError, match=r"labels: expected shape \(3, 11\), got \(3, 4\)"):
        patched(IDS, labels=LABELS[:, :4])
    with pytest.raises(ValueError, match="linear_logprobs: temperature: expected a positive number, got 0"):
        patched(IDS, labels=LABELS, return_logprobs=True, temperature=0)
    two = with_lora(tiny(), target_modules=["lm_head"])
    two.add_adapter("second", peft.LoraConfig(target_modules=["lm_head"]))
    fastrl.patch(two, head=True)
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active adapters: expected one"):
        two(input_ids=IDS, labels=LABELS)
    assert "forward" not in two.get_base_model().lm_head.__dict__  # an error leaves nothing in place
    assert head_patch.causal_lm(two) is two.get_base_model()
