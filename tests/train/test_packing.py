"""Packing: sequences that share a row train as each does alone, and see nothing of each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from families import byte_tokenizer, randomised, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import reported, tiny_run
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastrl.data import Example
from fastrl.data.batches import chunks, sft_batch, supervised_tokens
from fastrl.data.packing import arrange, balanced_rows, packed_batch
from fastrl.models import LoRASettings, add_lora, final_hidden, packed_attention
from fastrl.models.forward import as_policy
from fastrl.models.packed_attention import attend_by_sequence
from fastrl.models.probe import check_packing, check_policy
from fastrl.run.config import checked
from fastrl.train import sft
from fastrl.train.losses import sft_logprobs, sft_loss

LENGTHS = (40, 9, 13, 1, 70, 17, 2)
PACKED = ["balanced", "padding-free"]
FAMILIES = {
    "Llama": {},
    "GPT2": {},  # learned absolute positions
    "Gemma3Text": {"sliding_window": 8},  # layers that see 8 tokens, and layers that see all
    "Mixtral": {},  # experts
}


def family(name: str, by_sequence: bool = True) -> transformers.PreTrainedModel:
    model = randomised(tiny_config(getattr(transformers, f"{name}Config"), **FAMILIES.get(name, {})))
    if by_sequence:
        attend_by_sequence(model)
    return model


def ragged(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    """Examples of random tokens, about half of them targets; one example is a single token, one has no target."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    kept = [(torch.rand(length, generator=generator) < 0.5).tolist() for length in lengths]
    kept[-1] = [False] * lengths[-1]
    return [Example(*pair) for pair in zip(ids, [[False, *mask[1:]] for mask in kept], strict=True)]


def batches(examples, packing, size=3, max_length=80):
    rows, size = arrange(examples, packing, max_length=max_length, size=size)
    return [packed_batch(micro, 0) for micro in chunks(rows, size)]


def loss_and_gradients(model, examples, packing) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    denominator = supervised_tokens(examples)
    loss = torch.zeros(())
    for batch in batches(examples, packing):
        part = sft_loss(model, batch, denominator=denominator)
        part.backward()
        loss = loss + part.detach()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- which example stands where


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 60))
@settings(deadline=None, max_examples=60)
def test_every_sequence_is_in_one_row_and_no_row_is_too_long(lengths, capacity):
    rows = balanced_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < length <= capacity for length in used)
    assert sum(length <= capacity / 2 for length in used) <= 1  # two such rows would have been one


def test_rows_are_as_few_and_as_equal_as_they_come():
    assert balanced_rows([3, 6, 5, 4, 2], 20) == [[1, 2, 3, 0, 4]]
    assert balanced_rows([3, 6, 5, 4, 2], 11) == [[1, 0, 4], [2, 3]]
    assert balanced_rows([100, 40, 30, 20, 10], 150) == [[0], [1, 2, 3, 4]]
    assert balanced_rows([5, 5, 5], 10) == [[0, 2], [1]]
    assert balanced_rows([6, 6, 6], 11) == [[0], [1], [2]]  # two rows hold 18 tokens, and no two sequences
    assert balanced_rows([], 10) == []


def test_a_sequence_longer_than_a_row_is_an_error():
    """The loader cuts at max_length: it cannot occur in a run, and is not cut here."""
    with pytest.raises(ValueError, match="packing: expected sequences of at most 69 tokens, got one of 70"):
        arrange(ragged(), "balanced", max_length=69, size=1)


def test_an_unknown_packing_names_the_known_ones(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="packing: expected one of none, balanced, padding-free, got 'ffd'"):
        arrange(ragged(), "ffd", max_length=80, size=1)
    _, cfg = tiny_run("sft", tmp_path, tiny_policy, tiny_policy)
    with pytest.raises(ValueError, match="packing: expected one of none, balanced, padding-free, got 'ffd'"):
        checked(replace(cfg, packing="ffd"))


@pytest.mark.parametrize("packing", ["none", *PACKED])
def test_every_token_stands_once_and_every_target_counts_once(packing):
    """Pitfall 17: tokens and targets are those of the examples; positions count from 0 in each."""
    examples = ragged()
    tokens, targets, starts = [], 0, 0
    for batch in batches(examples, packing):
        tokens += batch.input_ids[batch.attention_mask].tolist()
        targets += int(batch.loss_mask.sum())
        positions = batch.packed_positions
        starts += len(batch.input_ids) if positions is None else int((positions[batch.attention_mask] == 0).sum())
        assert not batch.loss_mask[~batch.attention_mask].any()
    assert sorted(tokens) == sorted(token for example in examples for token in example.input_ids)
    assert targets == supervised_tokens(examples)
    assert starts == len(examples)


def test_rows_of_one_sequence_are_the_batch_without_packing():
    examples = ragged()
    got, want = packed_batch([[example] for example in examples], 0), sft_batch(examples, 0)
    assert got.packed_positions is None is want.packed_positions
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


# --- what a packed pass gives


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_equal_unpacked_ones(name, packing):
    same_training(family(name), packing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_attends_to_the_whole_row_learns_the_same(attention):
    """Behind transformers' masks: other attentions than sdpa, and passes of a model that was not prepared."""
    model = family("Gemma3Text", by_sequence=False)
    model.set_attn_implementation(attention)
    same_training(model, "balanced")


@pytest.mark.parametrize("packing", PACKED)
def test_adapters_learn_the_same(packing):
    model = add_lora(family("Llama"), LoRASettings(4, 8, 0.0, "all-linear"))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    same_training(model, packing)


def same_training(model, packing):
    examples = ragged()
    want_loss, want = loss_and_gradients(model, examples, "none")
    loss, got = loss_and_gradients(model, examples, packing)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert want.keys() == got.keys() and want
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=2e-5 * gradient.abs().max().item() + 1e-8)


@pytest.mark.parametrize("packing", PACKED)
def test_float64_leaves_rounding_alone(packing):
    """States of the targets, and the gradients of a sum over them."""
    model, examples = family("Llama").double(), ragged()
    found = []
    for layout in ("none", packing):
        model.zero_grad()
        parts = [
            final_hidden(model, b.input_ids, b.attention_mask, b.packed_positions)[b.loss_mask].sin().sum()
            for b in batches(examples, layout)
        ]
        total = torch.stack(parts).sum()
        total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_neighbour_holds_changes_no_bit(name):
    """Of the log-probs on either side of it."""
    model = family(name).eval()
    before, neighbour, after = (Example(e.input_ids, [True] * len(e.input_ids)) for e in ragged(lengths=(20, 12, 25)))
    other = neighbour._replace(input_ids=[260 - token for token in neighbour.input_ids])
    with torch.no_grad():
        first, second = (sft_logprobs(model, packed_batch([[before, x, after]], 0))[0] for x in (neighbour, other))
    assert torch.equal(first[:19], second[:19]) and torch.equal(first[32:], second[32:])
    assert not torch.equal(first[20:31], second[20:31])


def test_the_first_token_of_a_sequence_is_never_predicted():
    """Whatever the masks say: nothing of its own sequence stands before it."""
    model = family("Llama")
    marked = [Example(e.input_ids, [True] * len(e.input_ids)) for e in ragged(lengths=(5, 1, 4))]
    batch = packed_batch([marked], 0)
    assert batch.loss_mask.tolist() == [[False, *[True] * 4, False, False, *[True] * 3]]
    every = torch.ones(1, 9).bool()
    logprobs = as_policy(model)(
        batch.input_ids, batch.attention_mask, every, packed_positions=batch.packed_positions
    ).detach()
    assert (logprobs != 0).tolist() == batch.loss_mask[:, 1:].tolist()


def test_packed_rows_may_be_padded_on_the_left():
    model = family("Llama").eval()
    batch = packed_batch([ragged()[:2], ragged()[2:4]], 0)
    kept = batch.attention_mask
    shifted = [
        torch.zeros_like(x).masked_scatter(kept.flip(1), x[kept]) for x in (batch.input_ids, batch.packed_positions)
    ]
    with torch.no_grad():
        want = final_hidden(model, batch.input_ids, kept, batch.packed_positions)
        got = final_hidden(model, shifted[0], kept.flip(1), shifted[1])
    assert torch.equal(got[kept.flip(1)], want[kept])


def test_the_square_of_a_row_is_not_computed(monkeypatch):
    """Attention of a row costs what its sequences cost, and the padding behind a shorter row; unpacked it is sdpa's."""
    model, sizes = family("Llama"), []
    original = packed_attention.sdpa_attention_forward

    def watched(module, query, key, *arguments, **options):
        sizes.append((query.shape[2], key.shape[2]))
        return original(module, query, key, *arguments, **options)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", watched)
    examples = ragged(lengths=(7, 5, 9, 1))
    sft_logprobs(model, packed_batch([examples[:2], examples[2:3], examples[3:]], 0))
    layers = model.config.num_hidden_layers
    assert sizes == [(n, n) for n in (7, 5, 9, 3, 1, 11)] * layers
    want = family("Llama", by_sequence=False)
    batch = sft_batch(examples, 0)
    assert torch.equal(sft_logprobs(model, batch), sft_logprobs(want, batch))


def test_a_saved_model_knows_nothing_of_how_it_attended(tmp_path):
    model = family("Llama")
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def flash_like(module, query, key, value, attention_mask, position_ids=None, scaling=None, dropout=0.0, **_):
    """What transformers' flash attention does: no mask, and sequences are found in a batch of one row alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    starts = [0]
    if len(query) == 1:
        starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), is_causal=True)
        for a, b in zip(starts, [*starts[1:], query.shape[2]], strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def test_flash_attention_gets_one_row(monkeypatch):
    model, examples = family("Llama", by_sequence=False), ragged()
    want = loss_and_gradients(model, examples, "none")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_like", flash_like)
    model.config._attn_implementation = "flash_like"
    for packing in ("none", *PACKED):
        loss, gradients = loss_and_gradients(model, examples, packing)
        torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=0)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[1][key], rtol=1e-4, atol=1e-5)
    check_packing(model, byte_tokenizer(), "m")


# --- models that cannot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_probe_lets_a_right_family_pass(name, dtype, capsys):
    model = family(name, by_sequence=False).to(dtype)
    check_packing(model, byte_tokenizer(), "m")
    assert model.config._attn_implementation == packed_attention.NAME
    check_policy(model, byte_tokenizer(), "m")  # and as before in everything else, decoding too
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, reason",
    [
        ("Mamba", "packing failed: ValueError: packing: MambaModel takes no position_ids"),  # a state
        ("OPT", "packing: states beside another neighbour: expected a difference below .* got"),  # a mask of its own
        ("Falcon", "packing: states beside another neighbour: expected a difference below .* got"),
    ],
)
def test_the_probe_refuses_a_family_whose_sequences_mix(name, reason, dtype):
    with pytest.raises(ValueError, match=f"m: {name}ForCausalLM: {reason}.*use --packing none"):
        check_packing(family(name).to(dtype), byte_tokenizer(), "m")


def test_positions_that_do_not_restart_are_refused():
    """Sequences that do not see each other are not enough: each must stand where it stands alone."""
    model = family("GPT2")
    wpe = model.transformer.wpe
    wpe.register_forward_pre_hook(lambda layer, ids: (torch.arange(ids[0].shape[1]).expand_as(ids[0]),))
    with pytest.raises(ValueError, match="m: GPT2LMHeadModel: packing: states beside a neighbour: .*--packing none"):
        check_packing(model, byte_tokenizer(), "m")


def test_a_run_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "opt"
    family("OPT").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    main, cfg = tiny_run("sft", tmp_path, folder, folder)
    with pytest.raises(ValueError, match="OPTForCausalLM: packing: .*use --packing none"):
        main(replace(cfg, packing="balanced"))
    assert not (tmp_path / "run").exists()


# --- runs


@pytest.fixture
def run(tiny_policy, tmp_path):
    """The loop with settings, under a name: what it reported of training and of evaluations."""

    def go(name: str, tuner: str = "lora", **settings):
        folder = tmp_path / name
        folder.mkdir()
        main, cfg = tiny_run(f"sft, {tuner}", folder, tiny_policy, tiny_policy)
        main(replace(cfg, max_steps=2, save_every=0, eval_every=0, samples=0, **settings))
        return reported(cfg.output)

    return go


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_packed_run_is_the_unpacked_one_but_for_rounding(run, tuner):
    """Losses, gradients, evaluations; with checkpointing, too."""
    want = run("none", tuner)
    assert {record["kind"] for record in want} == {"train", "eval"}
    for packing, more in (("balanced", {"gradient_checkpointing": True}), ("padding-free", {})):
        for got, record in zip(run(packing, tuner, packing=packing, **more), want, strict=True):
            assert got.pop("kind") == record["kind"]
            assert got == pytest.approx({k: v for k, v in record.items() if k != "kind"}, rel=2e-4)


def test_micro_batches_of_one_are_the_same_bits(run):
    assert run("none", micro_batch_size=1) == run("free", micro_batch_size=1, packing="padding-free")


def test_a_resumed_packed_run_gives_the_same_bits(tiny_policy, tmp_path, monkeypatch):
    main, cfg = tiny_run("sft", tmp_path, tiny_policy, tiny_policy)
    cfg = replace(cfg, max_steps=3, save_every=2, eval_every=0, samples=0, packing="balanced", lora_dropout=0.2)
    whole = replace(cfg, output=str(tmp_path / "whole"))
    main(whole)
    calls = []

    def stop(*arguments, **options):
        calls.append(None)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return sft_loss(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sft, "sft_loss", stop)
        main(cfg)
    main(replace(cfg, resume=True))
    assert reported(cfg.output) == reported(whole.output)
    adapters = [open(f"{c.output}/adapter_model.safetensors", "rb").read() for c in (cfg, whole)]
    assert adapters[0] == adapters[1]


def test_virtual_tokens_are_not_packed(tmp_path, tiny_policy, tiny_scalar):
    """They would stand before the first sequence of a row alone: refused before anything is written."""
    main, cfg = tiny_run("sft, prefix", tmp_path, tiny_policy, tiny_scalar)
    with pytest.raises(ValueError, match="packing: expected none with virtual tokens .*; use --packing none"):
        main(replace(cfg, packing="balanced"))
    assert not (tmp_path / "run").exists()
