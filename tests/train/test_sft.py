"""The SFT loop: its loss against plain transformers, its guarantees, its folders, its errors."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import peft
import pytest
import torch
import transformers

import fastrl.train.sft as sft
from fastrl.checks import NonFiniteError
from fastrl.data import Example, load_examples, shuffled_batches, split_holdout
from fastrl.data.batches import sft_batch, supervised_tokens
from fastrl.models import LoRASettings, add_lora, load_policy, load_tokenizer
from fastrl.train.losses import sft_logprobs, sft_loss

WORDS = ["sun", "moon", "a river", "tea", "stone wall", "bee", "north", "x"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """24 ragged prompt + completion records."""
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    records = [{"prompt": f"Say {w} {n} times:", "completion": " ".join([w] * n)} for w in WORDS for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def config(tiny_policy, tasks, tmp_path):
    return sft.SFTConfig(
        model=str(tiny_policy),
        data=str(tasks),
        output=str(tmp_path / "run"),
        holdout=0.25,
        max_length=64,
        max_steps=3,
        batch_size=6,
        micro_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=2,
        lora_rank=4,
        lora_alpha=8,
        eval_every=0,
        save_every=0,
        samples=0,
    )


def records(output, kind="train"):
    lines = [json.loads(line) for line in open(f"{output}/metrics.jsonl")]
    return [line for line in lines if line["kind"] == kind]


def plain_loss(model, examples):
    """Mean -log p over supervised tokens from transformers' own logits, one example at a time."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        kept = torch.tensor(example.loss_mask[1:])
        total, count = total - logprobs[kept].sum(), count + int(kept.sum())
    return total / count


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def examples(tasks, tiny_tokenizer):
    return load_examples(str(tasks), tiny_tokenizer, max_length=64)[0][:7]


def test_supervision_starts_at_the_response_and_ends_with_eos(examples, tiny_tokenizer):
    """pitfall 17: the first response token and eos are targets; the count is exact."""
    example = examples[0]
    target = [i for i, m in zip(example.input_ids, example.loss_mask, strict=True) if m]
    assert target[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(target[:-1]).strip() == "sun"
    assert supervised_tokens([example]) == len(target)


def test_loss_and_gradient_equal_plain_transformers(tiny_policy, examples):
    """pitfall 17: responses only, from hidden states, equal to eager's to 1e-5."""
    ours, plain = load_policy(tiny_policy), load_policy(tiny_policy)
    loss = sft_loss(ours, sft_batch(examples, 0), denominator=supervised_tokens(examples))
    loss.backward()
    expected = plain_loss(plain, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected_gradients = gradients(plain)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)
    logprobs = sft_logprobs(ours, sft_batch(examples, 0))
    torch.testing.assert_close(-logprobs.sum() / supervised_tokens(examples), expected.detach())


def test_head_sees_supervised_positions_only(tiny_policy, examples):
    """pitfall 9: what stands in unsupervised or padded targets does not matter."""
    model = load_policy(tiny_policy)
    batch = sft_batch(examples, 0)
    loss = sft_loss(model, batch, denominator=10)
    padded = batch.input_ids.masked_fill(~batch.attention_mask, 250)
    torch.testing.assert_close(sft_loss(model, batch._replace(input_ids=padded), denominator=10), loss)
    nothing = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
    assert sft_loss(model, nothing, denominator=1).item() == 0.0


def test_accuracy_is_the_share_of_greedy_tokens(tiny_policy):
    """Over the supervised tokens of all micro-batches, however they are cut; sums of bits, so exact."""
    model, examples = load_policy(tiny_policy), []
    for prompt, wrong in (([5, 6, 7], 1), ([9, 8], 2), ([11, 12, 13, 14], 0)):
        ids = list(prompt)
        for step in range(4):
            greedy = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(greedy - 1 if step < wrong else greedy)
        examples.append(Example(ids, [False] * len(prompt) + [True] * 4))
    for size in (1, 2, 3):
        assert sft.evaluate(model, examples, 0, size)["eval_token_accuracy"] == 9 / 12
    assert sft.evaluate(model, [Example([5, 6], [False, False])], 0, 1)["eval_token_accuracy"] == 0
    logprobs, top1 = sft_logprobs(model, sft_batch(examples, 0), return_top1=True)
    assert torch.equal(logprobs, sft_logprobs(model, sft_batch(examples, 0))) and top1.sum() == 9


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_micro_batches_add_up(config, rank):
    """pitfall 16: ragged micro-batches of 1, 2 or 6 examples make the same run."""
    runs = []
    for size in (1, 2, 6):
        cfg = replace(config, micro_batch_size=size, lora_rank=rank, output=f"{config.output}{size}")
        sft.main(cfg)
        runs.append([(r["loss"], r["grad_norm"]) for r in records(cfg.output)])
    for other in runs[1:]:
        for step, reference in zip(other, runs[0], strict=True):
            assert step == pytest.approx(reference, rel=1e-4)


def test_three_steps_equal_a_plain_loop(config):
    """Loss of three full fine-tuning steps equals plain transformers + AdamW to 1e-5."""
    cfg = replace(config, lora_rank=0, learning_rate=1e-3, schedule="linear", warmup_steps=0)
    sft.main(cfg)
    tokenizer, model = load_tokenizer(cfg.model), load_policy(cfg.model)
    data, _ = load_examples(cfg.data, tokenizer, max_length=cfg.max_length)
    train, _ = split_holdout(data, cfg.holdout, cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
    batches = shuffled_batches(len(train), cfg.batch_size, seed=cfg.seed, epoch=0)
    for step, (indices, record) in enumerate(zip(batches, records(cfg.output), strict=True)):
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * (1 - step / 3)
        assert record["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        loss = plain_loss(model, [train[i] for i in indices])
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_same_seed_same_run_bit_for_bit(config, rank):
    """pitfall 46: the adapter is drawn after seeding; another seed draws another one."""
    outputs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = replace(config, lora_rank=rank, lora_dropout=0.1, seed=seed, output=config.output + name)
        sft.main(cfg)
        file = "adapter_model.safetensors" if rank else "model.safetensors"
        outputs.append(open(f"{cfg.output}/{file}", "rb").read())
    losses = [[r["loss"] for r in records(config.output + name)] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 8], ids=["full", "lora"])
def test_overfits_and_saves_an_ordinary_folder(config, rank, capsys):
    """The loss falls to near 0, greedy answers are right, plain transformers or PEFT loads it."""
    cfg = replace(
        config, lora_rank=rank, lora_alpha=16, holdout=0.0, eval_data=config.data, max_steps=60,
        batch_size=24, micro_batch_size=24, samples=3, sample_tokens=24, learning_rate=2e-2 if rank else 1e-2,
    )  # fmt: skip
    metrics = sft.main(cfg)
    floor = 1.2 if rank else 0.15  # a frozen random head bounds how sure an adapter can be
    assert records(cfg.output)[0]["loss"] > 6 and metrics["loss"] < floor
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_loss"] < floor and (rank or metrics["eval_token_accuracy"] > 0.9)
    answers = capsys.readouterr().out.split("answer: ")[-3:]
    assert "'sun'" in answers[0] and (rank or "'sun sun sun'" in answers[2])
    auto = peft.AutoPeftModelForCausalLM if rank else transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(cfg.output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.output)
    data, _ = load_examples(cfg.data, tokenizer, max_length=cfg.max_length)
    with torch.no_grad():
        assert plain_loss(plain, data).item() == pytest.approx(metrics["eval_loss"], abs=1e-4)


def test_gradient_checkpointing_changes_nothing(config):
    runs = []
    for flag in (False, True):
        cfg = replace(config, gradient_checkpointing=flag, output=f"{config.output}{flag}")
        sft.main(cfg)
        runs.append([(r["loss"], r["grad_norm"]) for r in records(cfg.output)])
    assert runs[0] == [pytest.approx(step, rel=1e-5) for step in runs[1]]


def test_bf16_runs(config):
    metrics = sft.main(replace(config, dtype="bfloat16", max_steps=2))
    assert math.isfinite(metrics["loss"])


def test_nan_stops_and_keeps_the_last_good_checkpoint(config, monkeypatch):
    """NaN loss at step 3: the error names the step and the checkpoint proven by a finite loss."""
    calls = []

    def loss_with_nan(*arguments, **options):
        calls.append(None)
        return sft_loss(*arguments, **options) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(sft, "sft_loss", loss_with_nan)
    cfg = replace(config, save_every=1, micro_batch_size=6)
    with pytest.raises(NonFiniteError, match="nan at step 3.*step-000001"):
        sft.main(cfg)
    kept = f"{cfg.output}/checkpoints/step-000001"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(kept)
    assert all(p.isfinite().all() for p in model.parameters())


def test_divergence_stops_by_itself(config):
    with pytest.raises(NonFiniteError, match="at step 2"):
        sft.main(replace(config, learning_rate=1e30, lora_rank=0, warmup_steps=0))


def test_bad_input(config, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty data set"):
        sft.main(replace(config, data=str(tmp_path / "empty.jsonl")))
    with pytest.raises(ValueError, match="max_length: expected at most 256"):
        sft.main(replace(config, max_length=512))
    with pytest.raises(FileNotFoundError):
        sft.main(replace(config, data=str(tmp_path / "absent.jsonl")))
    with pytest.raises(ValueError, match="schedule|kind"):
        sft.main(replace(config, schedule="cosin"))


def test_evaluation_is_without_dropout(config, tiny_policy, examples):
    """pitfall 36: a model left in train mode is evaluated in eval mode, so twice the same."""
    model = add_lora(load_policy(tiny_policy), LoRASettings(4, 8, 0.5, "all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = sft_batch(examples, 0)
    model.train()
    noisy = [sft_loss(model, batch, denominator=10).item() for _ in range(2)]
    evaluations = []
    for _ in range(2):
        model.train()
        evaluations.append(sft.evaluate(model, examples, 0, 3))
    assert noisy[0] != noisy[1] and evaluations[0] == evaluations[1]


def test_no_graph_outlives_its_micro_batch(config, monkeypatch):
    """T36, pitfall 28: when the next micro-batch starts, at most the previous loss is still alive."""
    losses = []

    def watched(*arguments, **options):
        assert sum(reference() is not None for reference in losses) <= 1
        loss = sft_loss(*arguments, **options)
        losses.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(sft, "sft_loss", watched)
    sft.main(replace(config, micro_batch_size=1))
    assert len(losses) == 18
