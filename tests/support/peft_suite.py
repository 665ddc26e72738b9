"""A pytest plugin for PEFT's own tests: without a hub, on LoRA alone, on fused layers if PEFT_SUITE_FUSED is set.

PEFT_SUITE_REPORT names the file that gets what became of each test: {test: [outcome, calls of the fused op]}.
"""

import contextlib
import importlib
import json
import os
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.model import LoraModel

from fastrl.models import fused_linear
from fastrl.models.lora import patch

SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 4, "max_position_embeddings": 128}
OPT = {**SIZES, "num_hidden_layers": 5, "ffn_dim": 48, "max_position_embeddings": 128}
GPT = {"vocab_size": 1000, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
# Stand-ins for the tiny random models of the hub that PEFT's tests of decoders load.
MODELS = {
    "tiny-random-OPTForCausalLM": lambda: transformers.OPTConfig(**OPT),
    "tiny-random-GPT2LMHeadModel": lambda: transformers.GPT2Config(**GPT),
    "tiny-random-gpt2": lambda: transformers.GPT2Config(**GPT),
    "tiny-random-GPTJForCausalLM": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4),
    "tiny-random-LlamaForCausalLM": lambda: transformers.LlamaConfig(**MLP),
    "tiny-random-MistralForCausalLM": lambda: transformers.MistralConfig(**MLP),
    "tiny-dummy-qwen2": lambda: transformers.Qwen2Config(**MLP),
    "tiny-random-Gemma3ForCausalLM": lambda: transformers.Gemma3TextConfig(**MLP, head_dim=16),
}
REPORT: dict[str, tuple[str, int]] = {}
calls = 0  # of the fused op, in the test that runs


def pytest_configure(config):
    from tests import testing_utils  # PEFT's, in the working directory

    testing_utils.hub_online_once = lambda name: contextlib.nullcontext()  # it would wait for a network
    auto = transformers.AutoModelForCausalLM
    auto.from_pretrained = types.MethodType(stand_in(auto.from_pretrained.__func__), auto)
    if os.environ.get("PEFT_SUITE_FUSED"):
        fuse_layers()


def stand_in(from_pretrained):
    """`from_pretrained` that builds the models of MODELS, with the same weights each time, and skips those unknown."""

    def build(cls, name, *args, **kwargs):
        stem = str(name).rpartition("/")[2]
        if Path(name).exists():
            return from_pretrained(cls, name, *args, **kwargs)
        if stem not in MODELS:
            pytest.skip(f"needs {name} of the hub")
        config = MODELS[stem]()
        for option in config.to_dict().keys() & kwargs.keys():
            setattr(config, option, kwargs[option])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls.from_config(config).eval()
        model.config._name_or_path = model.name_or_path = name
        return model.to(kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32)

    return build


def fuse_layers():
    """Every layer that LoRA makes is patched, and the kernels run at any size."""
    op = importlib.import_module("fastrl.ops.lora_linear")  # as an attribute of the package it is the function
    create, lora_linear = LoraModel._create_new_module, fused_linear.lora_linear

    def created(*args, **kwargs):
        module = create(*args, **kwargs)
        if isinstance(module, peft.tuners.lora.LoraLayer):
            patch(module)
        return module

    def counted(*args, **kwargs):
        global calls
        calls += 1
        return lora_linear(*args, **kwargs)

    LoraModel._create_new_module = staticmethod(created)
    fused_linear.lora_linear = counted
    fused_linear._line_is_faster = lambda *_: False
    op.EAGER_ROWS = op.EAGER_TRAINING_ROWS = 0


def pytest_collection_modifyitems(config, items):
    """Leaves out what is run with the configurations of other tuners."""
    others = [item for item in items if not is_of_lora(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def is_of_lora(item):
    given = getattr(item, "callspec", None)
    configs = [value for value in (given.params.values() if given else ()) if isinstance(value, type)]
    configs = [value for value in configs if issubclass(value, peft.PeftConfig)]
    return not configs or peft.LoraConfig in configs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    global calls
    calls = 0
    try:
        return (yield)
    finally:
        item.user_properties.append(("fused", calls))


def pytest_runtest_logreport(report: pytest.TestReport):
    if report.when == "call" or not report.passed:
        REPORT[report.nodeid] = (report.outcome, dict(report.user_properties).get("fused", 0))


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # of xdist
        Path(os.environ["PEFT_SUITE_REPORT"]).write_text(json.dumps(REPORT))
