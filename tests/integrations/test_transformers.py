"""FastRLCallback and causal_lm_loss in transformers' own Trainer: same losses and parameters as without them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import trainer_runs
import transformers
from torch import nn

import fastrl
from fastrl.integrations.transformers import FastRLCallback, causal_lm_loss

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # of losses and trained parameters after a few steps

FULL = {
    "lora": False,
    "optim": "sgd",
    "learning_rate": 1.0,
}  # Adam makes steps of one size of gradients that are rounding


def train(folder, model=None, callbacks=(), lora=True, **options):
    """(the Trainer after training, its logs with a loss)."""
    model = trainer_runs.tiny_model(lora) if model is None else model
    trainer = trainer_runs.trainer(folder, model, callbacks=list(callbacks), **options)
    trainer.train()
    return trainer, [log for log in trainer.state.log_history if "loss" in log]


def assert_same_training(want, got):
    (plain, logs), (patched, found) = want, got
    assert len(found) == len(logs) > 1
    for name in ("loss", "grad_norm"):
        values = [[log[name] for log in each] for each in (found, logs)]
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-3 if name == "grad_norm" else 1e-4, atol=2e-4)
    before, after = plain.model.state_dict(), patched.model.state_dict()
    assert before.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], **TOLERANCE, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        FULL,
        {"bf16": True},
    ],
    ids=lambda options: "-".join(options) or "LoRA",
)
def test_training_is_the_unpatched_one(tmp_path, options):
    """Losses, gradient norms and every parameter after four steps; accumulated by the labels of the whole batch."""
    want = train(tmp_path, **options)
    got = train(tmp_path, callbacks=[FastRLCallback()], **options)
    if options.get("bf16"):
        losses = [[log["loss"] for log in logs] for _, logs in (want, got)]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=2e-2)
    else:
        assert_same_training(want, got)


def test_the_patch_is_there_in_training_alone(tmp_path):
    class Watch(transformers.TrainerCallback):
        seen = False

        def on_step_end(self, args, state, control, model=None, **_):
            base = model.get_base_model()
            self.seen = "forward" in base.__dict__ and callback.patch.head is not None and len(callback.patch) == 8

    callback, watch = FastRLCallback(), Watch()
    model = trainer_runs.tiny_model()
    types = [type(module) for module in model.modules()]
    train(tmp_path, model, callbacks=[callback, watch], max_steps=1)
    assert watch.seen and callback.patch is None
    assert "forward" not in model.get_base_model().__dict__ and [type(m) for m in model.modules()] == types
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (model, model.get_base_model()))


class Stop(RuntimeError):
    pass


class Raises(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
        raise Stop


def test_an_interrupted_training_is_undone_by_the_context_or_the_next_training(tmp_path):
    model = trainer_runs.tiny_model()
    with pytest.raises(Stop), FastRLCallback() as callback:
        train(tmp_path, model, callbacks=[callback, Raises()])
    assert "forward" not in model.get_base_model().__dict__ and not model._forward_hooks
    callback = FastRLCallback()
    with pytest.raises(Stop):
        train(tmp_path, model, callbacks=[callback, Raises()])
    assert "forward" in model.get_base_model().__dict__  # Trainer tells callbacks nothing
    train(tmp_path, model, callbacks=[callback], max_steps=1)
    assert "forward" not in model.get_base_model().__dict__ and not model._forward_hooks
    callback.undo()


def test_logs_have_speed_phases_and_memory(tmp_path):
    _, logs = train(tmp_path, callbacks=[FastRLCallback()], gradient_accumulation_steps=2, max_steps=3)
    for log in logs:
        assert log["tokens_per_second"] > 0 and log["peak_memory_mib"] > 50
        phases = [log[f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer")]
        assert min(phases) >= 0 and sum(phases) > 0
        tokens = log["tokens_per_second"] * sum(phases)
        assert 4 * 2 <= tokens <= 2 * 4 * 12  # two micro-batches of four examples of up to twelve tokens
    _, logs = train(tmp_path, max_steps=2)
    assert "tokens_per_second" not in logs[0]


def test_evaluation_keeps_its_logits_unless_it_is_told(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"columns": prediction.predictions.shape[-1]}

    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    model = trainer_runs.tiny_model()
    want, _ = train(tmp_path, copy.deepcopy(model), **options)
    got, _ = train(tmp_path, copy.deepcopy(model), callbacks=[FastRLCallback()], compute_metrics=metrics, **options)
    less, _ = train(tmp_path, model, callbacks=[FastRLCallback(eval_logits=False)], **options)
    losses = [[log["eval_loss"] for log in each.state.log_history if "eval_loss" in log] for each in (want, got, less)]
    assert seen and seen[0][-1] == trainer_runs.VOCABULARY
    for found in losses[1:]:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses[0]), **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_function_is_the_models_own_loss(tmp_path, steps):
    options = {**FULL, "gradient_accumulation_steps": steps, "max_steps": 2}
    assert_same_training(train(tmp_path, **options), train(tmp_path, compute_loss_func=causal_lm_loss, **options))


def test_the_loss_function_takes_a_count_or_the_mean():
    logits = torch.randn(2, 5, 9, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3, 8], [-100, -100, 0, 4, 5]])
    kept = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(causal_lm_loss({"logits": logits}, labels), kept / 6)
    torch.testing.assert_close(causal_lm_loss({"logits": logits}, labels, torch.tensor(11)), kept / 11)
    with pytest.raises(ValueError, match="causal_lm_loss: labels: expected"):
        causal_lm_loss({"logits": logits}, None)


def test_a_head_that_is_not_understood_stays_with_one_warning(tmp_path):
    model = trainer_runs.tiny_model(False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.1))
    callback = FastRLCallback()
    with pytest.warns(UserWarning, match="the head stays the model's own: .*lora_dropout"):
        _, logs = train(tmp_path, model, callbacks=[callback], max_steps=1)
    assert "tokens_per_second" in logs[0]


@pytest.mark.parametrize("name, value, reason", [("n_gpu", 2, "DataParallel"), ("use_liger_kernel", True, "Liger")])
def test_hosts_that_have_the_head_in_hand_keep_it(name, value, reason):
    arguments = transformers.TrainingArguments(report_to=[], use_cpu=True)
    arguments.__dict__["_n_gpu" if name == "n_gpu" else name] = value
    model, callback = trainer_runs.tiny_model(), FastRLCallback()
    with pytest.warns(UserWarning, match=f"the head stays the model's own: .*{reason}"):
        callback.on_train_begin(arguments, None, None, model=model)
    assert callback.patch.head is None and len(callback.patch) == 8
    callback.undo()


def test_trls_trainers_keep_their_own_head():
    trl = pytest.importorskip("trl")
    model, callback = trainer_runs.tiny_model(), FastRLCallback()
    callback.on_train_begin(trl.SFTConfig(report_to=[], use_cpu=True, bf16=False), None, None, model=model)
    assert callback.patch.head is None and len(callback.patch) == 8
    callback.undo()


def test_a_host_without_a_model_is_refused():
    with pytest.raises(ValueError, match="FastRLCallback: on_train_begin: expected a model from the Trainer"):
        FastRLCallback().on_train_begin(None, None, None)


def test_layers_alone(tmp_path):
    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            assert callback.patch.head is None and len(callback.patch) == 8

    callback = FastRLCallback(head=False)
    options = {"max_steps": 2}
    assert_same_training(train(tmp_path, **options), train(tmp_path, callbacks=[callback, Watch()], **options))


@pytest.mark.ranks
@pytest.mark.slow
def test_processes_train_as_one_does(tmp_path):
    """Two gloo processes: the Trainer under DDP, and FSDP2 with the head gathered with the root or as a unit."""
    root = Path(fastrl.__file__).parents[1]
    path = os.pathsep.join(map(str, (root, root / "tests/support")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, trainer_runs.__file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() == second.keys() and len(first) == 4
    for name, (want, got) in first.items():
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-4, msg=name)
        assert second[name][1] == got or name.startswith("FSDP2")
