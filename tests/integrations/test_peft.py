"""fastrl.patch on PEFT models: what its summary says, bad input, and layers that are fused from the start."""

import copy
import json
import sys

import peft
import pytest
import torch
from peft.tuners import lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import IDS, assert_same, fused_calls, pair, tiny_llama, with_lora
from torch import nn

import fastrl
from fastrl.integrations.peft import FusedLinear, register
from fastrl.models import fused_linear
from fastrl.models import lora as integration

LAYERS = "base_model.model.model.layers"


@pytest.fixture
def calls(monkeypatch):
    return fused_calls(monkeypatch)


class Quantised(nn.Linear):
    """A linear layer with 8-bit weights, as bitsandbytes has them: its product is of weights made float again."""

    def forward(self, x):
        scale = self.weight.abs().max() / 127
        return nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)


class Linear8bitLt(nn.Module, lora.LoraLayer):
    """Named and built as PEFT's layer on bitsandbytes' weights: no lora.Linear."""

    def __init__(self, base_layer, adapter_name, config, r, lora_alpha, **options):
        super().__init__()
        lora.LoraLayer.__init__(self, base_layer)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x):
        a, b = self.lora_A["default"], self.lora_B["default"]
        return self.base_layer(x) + b(a(x)) * self.scaling["default"]


class Mixed(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 1)
        self.quantised, self.one, self.two = Quantised(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.two(self.one(self.quantised(x)))


def mixed_model(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["embed", "conv", "quantised", "one", "two"], init_lora_weights=False)
    config._register_custom_module({Quantised: Linear8bitLt})
    return peft.get_peft_model(Mixed(), config)


def test_the_summary_counts_and_names_what_is_left_alone(calls):
    model = mixed_model()
    want = model(IDS % 9)
    handle = fastrl.patch(model)
    assert handle.summary().splitlines() == [
        "fastrl.patch: 5 LoRA layers, 2 fused by this patch",
        "  1 left alone: lora.Embedding is no plain lora.Linear (base_model.model.embed)",
        "  1 left alone: lora.Conv1d is no plain lora.Linear (base_model.model.conv)",
        "  1 left alone: its base is quantised (lora.Linear8bitLt) (base_model.model.quantised)",
        "  calls with adapter_names (a mixed batch) or other arguments run PEFT's forward",
    ]
    torch.testing.assert_close(model(IDS % 9), want)
    assert len(calls) == 2
    handle.undo()
    assert handle.summary().splitlines()[0] == "fastrl.patch: 5 LoRA layers, 0 fused by this patch (undone)"


@pytest.mark.parametrize("flag", [False, True], ids=["lora.Linear", "lora.Linear4bit"])
@pytest.mark.parametrize("registered", [False, True])
def test_layers_on_weights_of_bitsandbytes_stay_pefts(registered, flag):
    """Four bits, on a CPU. PEFT takes its own class for them if the model says that it was loaded so."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32), nn.Linear(64, 64))
    net[0].weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    net.is_loaded_in_4bit = flag
    config = peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    model = peft.get_peft_model(net, register(config) if registered else config)
    x = torch.randn(200, 64)
    want = model(x)
    reason = "its base is quantised (lora.Linear4bit)" if flag else "its base layer is a Linear4bit"
    assert fastrl.patch(model).skipped["base_model.model.0"] == reason
    assert isinstance(model.base_model.model[1], FusedLinear)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def several(model):
    model.base_model.set_adapter(["default", "second"])


def hooked(model):
    for module in model.modules():
        if isinstance(module, lora.Linear):
            module.lora_A["default"].register_forward_hook(lambda *_: None)


def elsewhere(model):
    model.add_adapter("head", peft.LoraConfig(target_modules=["lm_head"]))
    model.set_adapter("head")


def swappable(model):
    prepare_model_for_compiled_hotswap(model, target_rank=8)


STATES = {
    "its scaling is a tensor, for PEFT's hot swap": swappable,
    "several adapters are active": several,
    "adapters are merged": lambda model: model.merge_adapter(),
    "adapters are disabled": lambda model: model.base_model.disable_adapter_layers(),
    "no adapter is active": elsewhere,
    "hooks or wrapped weights in its parts": hooked,
}


@pytest.mark.parametrize("reason", STATES)
def test_the_summary_tells_the_state_of_the_adapters(calls, reason):
    """And it is true: a layer runs PEFT's forward exactly where the summary has a reason."""
    model = with_lora(names=("default", "second"))
    handle = fastrl.patch(model)
    assert "14 fused by this patch" in handle.summary() and "PEFT's forward for now" not in handle.summary()
    STATES[reason](model)
    first, line, *_ = handle.summary().splitlines()
    assert "0 fused by this patch" in first
    assert line == f"  14 run PEFT's forward for now: {reason} ({LAYERS}.0.self_attn.q_proj and 13 more)"
    model(IDS)
    assert not calls


def test_dora_is_named_and_rank_stabilised_lora_is_fused(calls):
    model, patched, handle = pair(use_dora=True)
    assert f"14 run PEFT's forward for now: DoraLinearVariant ({LAYERS}.0" in handle.summary()
    assert_same(model, patched)
    assert not calls
    model, patched, handle = pair(use_rslora=True, r=16, lora_alpha=8)
    assert "14 fused" in handle.summary()
    assert_same(model, patched)
    assert len(calls) == 14


def test_float32_adapters_on_a_bfloat16_base_are_named():
    """PEFT's default. How far the numbers are from its own is measured in the next test."""
    handle = fastrl.patch(with_lora(tiny_llama(torch.bfloat16)))
    assert f"  14 note: float32 adapters multiply in bfloat16 in the kernels ({LAYERS}.0" in handle.summary()
    for model in (with_lora(tiny_llama(torch.bfloat16), adapter_dtype=False), with_lora()):
        assert "note" not in fastrl.patch(model).summary()


def test_float32_adapters_on_a_bfloat16_base_train_as_in_peft(calls):
    """Outputs err as PEFT's do; the adapters' gradients have bfloat16's rounding, in PEFT they have float32's."""
    net = nn.Sequential(nn.Linear(96, 160, bias=False)).bfloat16()
    torch.manual_seed(0)
    model = peft.get_peft_model(net, peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    x, dy = torch.randn(300, 96).bfloat16(), torch.randn(300, 160).bfloat16()

    def results(model, double=False):
        layer = model.base_model.model[0]
        y = model(x.double() if double else x)
        leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return [y.double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy.to(y.dtype)))]

    def errors(results):
        return [((got - want).norm() / want.norm()).item() for got, want in zip(results, truth, strict=True)]

    truth = results(copy.deepcopy(model).double(), double=True)
    own = errors(results(model))
    fastrl.patch(model)
    fused = errors(results(model))
    assert fused[0] < 1.5 * own[0] < 6e-3
    assert max(own[1:]) < 1e-6 and max(fused[1:]) < 4e-3
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(model, x))


def trained(model, x):
    model(x).float().square().mean().backward()
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_a_small_batch_has_the_bits_of_peft(monkeypatch, dtypes, autocast, dropout):
    """Values, gradients and dropout masks, where PEFT's own line is the faster one."""
    monkeypatch.setattr(fused_linear, "is_widened", lambda dtype: False)
    net = nn.Sequential(nn.Linear(48, 24)).to(dtypes[0])
    config = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    model = peft.get_peft_model(net, config, autocast_adapter_dtype=dtypes[1] == torch.float32)

    def results(rows):
        x = torch.ones(2, rows, 48, dtype=dtypes[0], requires_grad=True)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
        with torch.no_grad():
            return [y, *gradients, model(x)]

    want = results(5)
    fastrl.patch(model)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results(5), want, strict=True))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [127, 128])
def test_float32_adapters_stay_float32_where_a_cpu_emulates_bfloat16(monkeypatch, rows, fast):
    monkeypatch.setattr(fused_linear, "FAST_BFLOAT16", fast)
    monkeypatch.setattr(fused_linear, "is_widened", lambda dtype: False)
    seen = []
    monkeypatch.setattr(fused_linear, "lora_linear", lambda x, *_, **__: seen.append(len(x)) or x)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)).bfloat16(), peft.LoraConfig(target_modules=["0"]))
    fastrl.patch(model)
    model(torch.randn(rows, 8).bfloat16())
    assert seen == ([128] if fast and rows == 128 else [])


@pytest.mark.parametrize(
    ("rows", "training", "fused"), [(63, True, False), (64, True, True), (15, False, False), (16, False, True)]
)
def test_sixteen_bits_that_a_cpu_does_not_multiply_are_widened(monkeypatch, rows, training, fused):
    """Where torch's own loops take longer than the weight's conversion."""
    monkeypatch.setattr(fused_linear, "is_widened", lambda dtype: True)
    monkeypatch.setattr(sys.modules["fastrl.ops.lora_linear"], "WIDENED_WORK", 64 * 8 * 8)
    seen = []
    monkeypatch.setattr(fused_linear, "lora_linear", lambda x, *_, **__: seen.append(len(x)) or x)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)).bfloat16(), peft.LoraConfig(target_modules=["0"]))
    fastrl.patch(model)
    with torch.set_grad_enabled(training):
        model(torch.randn(rows, 8).bfloat16())
    assert bool(seen) == fused


def test_a_small_batch_goes_to_the_op_where_a_backend_is_asked_for(monkeypatch):
    monkeypatch.setenv("FASTRL_BACKEND", "triton")
    model = with_lora()
    fastrl.patch(model)
    with pytest.raises(ValueError, match="lora_linear: FASTRL_BACKEND='triton' is not possible"):
        model(IDS)


def test_patching_twice_takes_each_layer_once_and_undoes_in_any_order():
    for order in ((0, 1), (1, 0)):
        model = with_lora(target_modules=["q_proj"])
        types = {name: type(module) for name, module in model.named_modules()}
        handles = [fastrl.patch(model)]
        model.add_adapter("more", peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        handles.append(fastrl.patch(model))
        assert [len(handle) for handle in handles] == [2, 2]
        assert set(handles[1].skipped.values()) == {"fused already"}
        for n in order:
            handles[n].undo()
            handles[n].undo()
        assert not any(isinstance(module, FusedLinear) for module in model.modules())
        assert all(type(model.get_submodule(name)) is kind for name, kind in types.items() if "v_proj" not in name)


def test_undo_before_what_came_later_is_refused_and_undoes_nothing():
    """Another library that puts a class over ours, as torch's fully_shard does, has to go first."""
    model = with_lora()
    handle = fastrl.patch(model)
    layer = model.get_submodule(handle.layers[3])
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match=r"undo: \S*layers.0.self_attn.o_proj: expected .* got a Sharded on top"):
        handle.undo()
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 14
    layer.__class__ = FusedLinear
    handle.undo()
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_a_model_without_lora_is_left_as_it_is_with_a_warning():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="expected LoRA layers of PEFT, found none in a LlamaForCausalLM; call"):
        handle = fastrl.patch(model)
    assert len(handle) == 0 and handle.summary() == "fastrl.patch: 0 LoRA layers, 0 fused by this patch"
    handle.undo()


def test_a_model_on_the_meta_device_is_patched_before_its_weights_come(calls):
    """Built and patched without memory, then materialised: the same as one that was there from the start."""
    model = with_lora()
    want = model(IDS).logits
    with torch.device("meta"):
        empty = with_lora()
    assert len(fastrl.patch(empty)) == 14
    assert empty(IDS.to("meta")).logits.shape == want.shape
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.base_model.model.model.rotary_emb = model.base_model.model.model.rotary_emb  # its buffers are not saved
    calls.clear()
    torch.testing.assert_close(empty(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 14


def test_another_lora_layer_than_the_known_one_is_refused_before_anything_changes(monkeypatch):
    model = with_lora()
    monkeypatch.setattr(integration, "PARTS", (*integration.PARTS, "lora_C"))
    with pytest.raises(RuntimeError, match=r"expected its lora.Linear as in 0.20 to .*, got one without lora_C"):
        fastrl.patch(model)
    monkeypatch.undo()
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, scale, *args, **kwargs: x)
    with pytest.raises(RuntimeError, match=r"got forward\(self, x, scale, args, kwargs\); nothing was patched"):
        fastrl.patch(model)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_an_untested_version_works_with_one_warning(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "9.1.0")
    with pytest.warns(UserWarning, match="peft 9.1.0 is not tested") as seen:
        handles = [fastrl.patch(with_lora()), fastrl.patch(with_lora())]
    assert sum("not tested" in str(warning.message) for warning in seen) == 1
    assert [len(handle) for handle in handles] == [14, 14]


def test_registered_layers_are_fused_from_the_start(calls):
    """The same numbers, gradients and parameters as PEFT's own layers with the same seed."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    model, made = (
        with_seed(lambda config=config: peft.get_peft_model(tiny_llama(), config).eval())
        for config in (peft.LoraConfig(**options), register(peft.LoraConfig(**options)))
    )
    for (name, want), (other, got) in zip(model.named_parameters(), made.named_parameters(), strict=True):
        assert name == other and torch.equal(got, want)
    assert sum(isinstance(module, FusedLinear) for module in made.modules()) == 14
    assert_same(model, made)
    assert len(calls) == 14


def with_seed(make):
    torch.manual_seed(3)
    return make()


def test_a_registration_takes_plain_linear_layers_alone():
    """Quantised ones are subclasses of nn.Linear; parameters of a module are no layers."""
    config = register(peft.LoraConfig(target_modules=["embed", "conv", "quantised", "one"], fan_in_fan_out=True))
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        model = peft.get_peft_model(Mixed(), config).base_model.model
    kinds = {name: type(getattr(model, name)) for name in ("embed", "conv", "quantised", "one")}
    assert kinds == {"embed": lora.Embedding, "conv": lora.layer.Conv1d, "quantised": lora.Linear, "one": FusedLinear}
    assert type(model.two) is nn.Linear
    config = register(peft.LoraConfig(target_modules=[], target_parameters=["one.weight"]))
    assert type(peft.get_peft_model(Mixed(), config).base_model.model.one) is lora.ParamWrapper


def test_a_registration_is_not_saved(tmp_path):
    """An adapter of fused layers is any adapter: loaded without fastrl it gives the same numbers."""
    model = with_seed(lambda: peft.get_peft_model(tiny_llama(), register(peft.LoraConfig(init_lora_weights=False))))
    model.save_pretrained(tmp_path)
    assert "fastrl" not in (tmp_path / "adapter_config.json").read_text()
    assert not json.loads((tmp_path / "adapter_config.json").read_text()).get("_custom_modules")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not any(isinstance(module, FusedLinear) for module in loaded.modules())
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_registration_needs_pefts_hook():
    with pytest.raises(RuntimeError, match="register: config: expected a peft.LoraConfig with _register_custom_module"):
        register(object())
