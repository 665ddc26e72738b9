"""fastrl.patch: PEFT's own layers are the oracle."""

import copy
import pickle
from contextlib import nullcontext

import peft
import pytest
import torch
from oracle import assert_as_accurate
from peft.tuners import lora
from peft_models import IDS, assert_same, fused_calls, losses, pair, results, tiny_llama, with_lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrl
from fastrl.models import lora as integration


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Every size goes to the op; the line that small batches take is in tests/integrations/test_peft.py."""
    return fused_calls(monkeypatch)


def test_values_and_gradients_equal_peft(calls):
    model, patched, handle = pair()
    assert len(handle) == 14 and not handle.skipped
    assert "base_model.model.model.layers.1.mlp.down_proj" in handle.layers
    assert_same(model, patched)
    assert len(calls) == 14


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [True, False], ids=["float32 adapters", "adapters like base"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_one_layer(calls, x_dtype, base, adapter_dtype, autocast):
    """T22: result and gradient dtypes are PEFT's, and the error is within twice that of an all-base-dtype PEFT."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(40, 24, dtype=base)

    def layer(adapter_dtype=adapter_dtype):
        torch.manual_seed(0)
        model = with_lora(Net(), adapter_dtype=adapter_dtype, target_modules=["lin"], task_type=None)
        return model, model.base_model.model.lin

    def run(lin, x, dy):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = lin(x)
        lora = [lin.lora_A["default"].weight, lin.lora_B["default"].weight]
        return [y, *torch.autograd.grad(y, [x, *lora], dy.to(y.dtype))]

    x, dy = torch.randn(9, 40).to(x_dtype), torch.randn(9, 24).bfloat16()
    (_, own), (model, fused), (_, half) = layer(), layer(), layer(adapter_dtype=False)
    fastrl.patch(model)
    if x_dtype != base and not autocast:
        with pytest.raises(RuntimeError):
            run(own, x, dy)
        with pytest.raises(RuntimeError):
            run(fused, x, dy)
        return
    truth = run(copy.deepcopy(own).double(), x.double(), dy.double())
    for got, want, eager, exact in zip(run(fused, x, dy), run(own, x, dy), run(half, x, dy), truth, strict=True):
        assert got.dtype == want.dtype
        assert_as_accurate(got, eager, exact)
    assert len(calls) == 1


def test_disabled_adapters_give_the_base_model(calls):
    """Pitfalls 33, 34: inside disable_adapter() the model is the base model, afterwards the adapted one again."""
    base = tiny_llama()(IDS).logits
    _, patched, _ = pair()
    adapted = patched(IDS).logits
    calls.clear()
    with patched.disable_adapter():
        assert torch.equal(patched(IDS).logits, base)
    assert not calls
    assert torch.equal(patched(IDS).logits, adapted)
    assert (adapted - base).abs().max() > 1e-3


def several_active(model):
    model.base_model.set_adapter(["default", "second"])


def merged(model):
    model.merge_adapter()


def hooked(model):
    for layer in model.base_model.model.model.layers:
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [several_active, merged, hooked], ids=lambda f: f.__name__)
def test_unusual_states_run_peft(calls, change):
    """kernels.md 3.4: what the fused op does not compute is left to PEFT, whenever the state asks for it."""
    model, patched, _ = pair(names=("default", "second"))
    for each in (model, patched):
        change(each)
    torch.testing.assert_close(patched(IDS).logits, model(IDS).logits)
    assert not calls


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_run_peft(calls, options):
    if "lora_bias" in options:
        options = {**options, "target_modules": ["q_proj"]}
    with pytest.warns(UserWarning) if "lora_bias" in options else nullcontext():
        model, patched, _ = pair(**options)
    assert_same(model, patched)
    assert not calls


def test_mixed_batches_run_peft(calls):
    model, patched, _ = pair(names=("default", "second"))
    names = ["default", "second"]
    model.eval(), patched.eval()
    torch.testing.assert_close(patched(IDS, adapter_names=names).logits, model(IDS, adapter_names=names).logits)
    assert not calls


def test_switching_adapters(calls):
    """The active adapter is read on every call."""
    model, patched, _ = pair(names=("default", "second"))
    first = patched(IDS).logits
    for each in (model, patched):
        each.set_adapter("second")
    assert_same(model, patched)
    assert (patched(IDS).logits - first).abs().max() > 1e-4
    assert len(calls) == 3 * 14


def test_layers_that_are_skipped_say_why():
    class Odd(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.odd, self.lin = nn.Embedding(9, 8), Odd(8, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.lin(self.odd(self.embed(ids)))

    model = with_lora(Net(), target_modules=["embed", "odd", "lin"], task_type=None)
    want = model(IDS % 9)
    handle = fastrl.patch(model)
    assert handle.layers == ["base_model.model.lin"]
    assert handle.skipped == {
        "base_model.model.embed": "lora.Embedding is no plain lora.Linear",
        "base_model.model.odd": "its base layer is a Odd",
    }
    assert "1 layers fused" in repr(handle) and "lora.Embedding" in repr(handle)
    torch.testing.assert_close(model(IDS % 9), want)


def test_undo(calls):
    """undo() and leaving the context give PEFT's layers back; patching twice takes the layers once."""
    model = with_lora()
    types = [type(m) for m in model.modules()]
    want = model(IDS).logits
    with fastrl.patch(model) as handle:
        assert len(handle) == 14 and len(fastrl.patch(model)) == 0
        model(IDS)
        assert len(calls) == 14
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(IDS).logits, want) and len(calls) == 14
    handle.undo()
    fastrl.patch(model)
    model(IDS)
    assert len(calls) == 28


def test_merge_and_unload():
    model, patched, _ = pair()
    patched.merge_adapter()
    torch.testing.assert_close(patched(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    patched.unmerge_adapter()
    assert_same(model, patched)
    merged = patched.merge_and_unload()
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_while_sampling(dtype):
    """Outputs as from PEFT's merge_adapter(); afterwards the same bits in every weight, also after an error."""
    model = with_lora(tiny_llama(dtype))
    fastrl.patch(model)
    other = copy.deepcopy(model)
    other.merge_adapter()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unmerged = model(IDS).logits
    with torch.no_grad(), integration.merged(model):
        assert torch.equal(model(IDS).logits, other(IDS).logits)
        with pytest.raises(ValueError, match="merged: model: expected adapters that are not merged"):
            with integration.merged(model):
                pass
        with model.disable_adapter():  # PEFT unmerges for good here
            model(IDS)
    with pytest.raises(KeyboardInterrupt), integration.merged(model):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(IDS).logits, unmerged)
    scale = unmerged.float().abs().max().item()
    assert (other(IDS).logits - unmerged).abs().max().item() < scale * (1e-5 if dtype == torch.float32 else 0.05)


def test_a_shared_weight_is_not_merged():
    """Folding the adapter of a head into a weight that is the embedding's too would change the embedding."""
    base = tiny_llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    model = with_lora(base, target_modules=["q_proj", "lm_head"])
    want = model(IDS).logits
    with torch.no_grad(), integration.merged(model):
        torch.testing.assert_close(model(IDS).logits, want)
        assert model.base_model.model.model.layers[0].self_attn.q_proj.merged and not model.base_model.lm_head.merged


def test_save_and_load(tmp_path):
    """A patched model's adapter loads into plain PEFT, and the other way round."""
    model, patched, _ = pair()
    assert patched.state_dict().keys() == model.state_dict().keys()
    patched.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    want = model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert len(fastrl.patch(loaded)) == 14
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-4, atol=1e-5)
    patched.load_adapter(tmp_path, "again")
    patched.set_adapter("again")
    torch.testing.assert_close(patched(IDS).logits, want, rtol=1e-4, atol=1e-5)
    patched.delete_adapter("again")


def test_modules_to_save_and_adapted_head():
    """Pitfall 30: a trained copy of a module and a LoRA on lm_head stay part of the result."""
    assert_same(*pair(modules_to_save=["lm_head"])[:2])
    model, patched, handle = pair(target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head" in handle.layers
    assert_same(model, patched)


def test_dropout_only_in_training(calls):
    """Pitfall 36: eval mode has no dropout and equals PEFT; training mode drops, seeded by torch.manual_seed."""
    model, patched, _ = pair(lora_dropout=0.5)
    model.eval(), patched.eval()
    assert_same(model, patched)
    evaluated = patched(IDS).logits
    assert torch.equal(patched(IDS).logits, evaluated)
    assert {call["dropout"] for call in calls} == {0.0}
    calls.clear()
    patched.train()
    torch.manual_seed(5)
    first = patched(IDS).logits
    second = patched(IDS).logits
    torch.manual_seed(5)
    assert torch.equal(patched(IDS).logits, first)
    assert not torch.equal(first, second) and not torch.equal(first, evaluated)
    assert {call["dropout"] for call in calls} == {0.5}


def test_gradient_checkpointing_with_dropout():
    """kernels.md 3.4, T23: recomputed layers draw the same masks and give the same gradients."""
    model = with_lora(lora_dropout=0.3)
    fastrl.patch(model)
    model.train()
    model.enable_input_require_grads()
    torch.manual_seed(4)
    want, want_grads = results(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(4)
    got, grads = results(model)
    assert torch.equal(got, want)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], msg=name)


def test_patching_draws_no_random_numbers_and_copies_work():
    """Pitfall 46: the adapter and the generator are untouched by patch; a deep copy stays fused and independent."""
    model = with_lora()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fastrl.patch(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model)
    want = twin(IDS).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(twin(IDS).logits, want) and not torch.equal(model(IDS).logits, want)


def test_training_follows_peft():
    """Five AdamW steps give PEFT's losses."""
    model, patched, _ = pair()
    want, got = losses(model, 5), losses(patched, 5)
    assert want[-1] < want[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_patched_layer_compiles_without_graph_breaks(dropout):
    """T32: torch.compile(fullgraph=True) on a patched layer."""
    model = with_lora(lora_dropout=dropout)
    fastrl.patch(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    torch.manual_seed(0)
    want = layer(x)
    want_grad = torch.autograd.grad(want.sum(), layer.lora_A["default"].weight)[0]
    torch.manual_seed(0)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), layer.lora_A["default"].weight)[0], want_grad)


def test_a_patched_model_looks_like_its_own(tmp_path):
    """Names, status, pickles and copies are PEFT's; a copy stays fused, a pickle needs no fastrl."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=0.1)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()
    seen = repr(model), model.get_layer_status(), model.get_model_status()
    fastrl.patch(model)
    assert (repr(model), model.get_layer_status(), model.get_model_status()) == seen
    layer, x = model.base_model.model[0], torch.randn(300, 8)
    names = [(t.__name__, t.__qualname__, t.__module__) for t in (type(layer), lora.Linear)]
    assert names[0] == names[1]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(model, protocol)
        assert b"fastrl" not in data
        loaded = pickle.loads(data)
        assert type(loaded.base_model.model[0]) is lora.Linear
        torch.testing.assert_close(loaded(x), model(x))
        assert len(fastrl.patch(loaded)) == 1
    copied = copy.deepcopy(model)
    assert type(copied.base_model.model[0]) is type(layer)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        copied.base_model.model[0].base_layer.weight.zero_()
    assert not torch.equal(copied(x), model(x))


@pytest.mark.parametrize("rows", [4, 300])
def test_outputs_may_be_changed_in_place(rows):
    """OLMo clamps its projections so; at every size, and with dropout."""
    for dropout in (0.0, 0.2):
        config = peft.LoraConfig(target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        x = torch.randn(2, rows, 8)

        def gradients(clamp, model=model, x=x):
            model.zero_grad()
            torch.manual_seed(1)
            clamp(model(x)).square().sum().backward()
            return [p.grad.clone() for p in model.parameters() if p.requires_grad]

        fastrl.patch(model)
        found, want = gradients(lambda y: y.clamp_(-0.5, 0.5)), gradients(lambda y: y.clamp(-0.5, 0.5))
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("rows", [4, 300])
def test_functional_transforms_run_pefts_own_line(rows):
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(rows, 8)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    want = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:3])
    fastrl.patch(model)
    for found, expected in ((torch.func.grad(loss)(parameters, x), want),
                            (torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:3]), each)):  # fmt: skip
        for name in want:
            torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("rows", [4, 300])
def test_unusual_inputs_run_pefts_own_line(rows):
    """What a plain layer takes, a patched one takes: nested rows, fake and meta tensors."""
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(target_modules=["0"]))
    ragged = torch.nested.nested_tensor([torch.randn(rows, 8), torch.randn(3, 8)], layout=torch.jagged)
    want = model(ragged)
    fastrl.patch(model)
    torch.testing.assert_close(model(ragged).values(), want.values())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(rows, 8)).shape == (rows, 6)
    assert model.to("meta")(torch.randn(rows, 8, device="meta")).shape == (rows, 6)
