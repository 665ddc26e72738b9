"""The command line: dispatch, errors, doctor, chat and export."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import fastrl
from fastrl import cli
from fastrl.commands import doctor
from fastrl.commands.chat import beside
from fastrl.commands.export import export
from fastrl.data.messages import Message

ROOT = Path(fastrl.__file__).parents[1]


def run_isolated(*argv, blocked=(), **environment):
    """`fastrl ARGV` in a process of its own, in which the modules in `blocked` cannot be imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(',')))\n"
        "from fastrl.cli import main\n"
        "status = main(sys.argv[2:])\n"
        "print('imported:', sorted({'torch', 'transformers', 'datasets', 'jsonargparse'} & sys.modules.keys()))\n"
        "sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, ",".join(blocked), *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


def test_help_and_version_need_no_heavy_import():
    """`fastrl --help` and `--version` are quick: neither torch nor transformers is imported."""
    for flag in ("--help", "--version"):
        done = run_isolated(flag)
        assert done.returncode == 0 and "imported: []" in done.stdout
    assert done.stdout.startswith(f"fastrl {fastrl.__version__}")


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == cli.main([]) == 0
    text = capsys.readouterr().out
    for command in "demo sft reward ppo run report bench doctor chat export".split():
        assert f"\n  {command} " in text


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["docter"]) == 2
    assert capsys.readouterr().err == "fastrl: error: unknown command 'docter'; did you mean 'doctor'?\n"
    assert cli.main(["xyz"]) == 2
    assert "expected one of demo, sft" in capsys.readouterr().err


@dataclass(frozen=True)
class LoopConfig:
    steps: int = 1


@pytest.fixture
def loop(monkeypatch):
    """A module in place of the SFT loop, whose main can be replaced."""
    module = types.ModuleType("loop", "A loop of a test.")
    module.SFTConfig = LoopConfig
    module.main = lambda cfg: print("ran", cfg)
    monkeypatch.setitem(sys.modules, "loop", module)
    monkeypatch.setitem(cli.COMMANDS, "sft", ("loop", "SFTConfig", "summary"))
    return module


def test_loop_gets_its_config(loop, capsys):
    assert cli.main(["sft", "--steps", "3"]) == 0
    assert capsys.readouterr().out == "ran LoopConfig(steps=3)\n"
    assert cli.main(["sft", "--stepz", "3"]) == 2
    assert capsys.readouterr().err == "fastrl: error: unknown option --stepz; did you mean '--steps'?\n"


class NonFinite(RuntimeError):
    __module__ = "fastrl.run.optim"


@pytest.mark.parametrize(
    "error", [ValueError("bad\nvalue"), FileNotFoundError("no file"), ImportError("no module"), NonFinite("NaN")]
)
def test_user_errors_are_one_message_and_status_2(error, loop, capsys, monkeypatch):
    def fail(cfg):
        raise error

    loop.main = fail
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert cli.main(["sft"]) == 2
    assert capsys.readouterr().err == f"fastrl: error: {error}\n"
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["sft"])


@pytest.mark.parametrize("error", [RuntimeError("a\nbug"), KeyError("key"), RecursionError("too deep")])
def test_unforeseen_errors_are_one_line_that_says_where_to_report(error, loop, capsys, monkeypatch):
    def fail(cfg):
        raise error

    loop.main = fail
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert cli.main(["sft"]) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"fastrl: error: unforeseen {type(error).__name__}: ") and text.count("\n") == 1
    assert "FASTRL_DEBUG=1" in text and "report" in text
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["sft"])


def test_out_of_memory_says_what_to_lower(loop, capsys):
    def fail(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    loop.main = fail
    assert cli.main(["sft"]) == 2
    assert "Tried to allocate 2 GiB; lower micro_batch_size" in capsys.readouterr().err


def test_interrupt_is_quiet(loop, capsys):
    def interrupt(cfg):
        raise KeyboardInterrupt

    loop.main = interrupt
    assert cli.main(["sft"]) == 130
    assert capsys.readouterr().err == "fastrl: interrupted\n"


@pytest.mark.slow
def test_missing_module_is_named():
    done = run_isolated("chat", "model", blocked=["transformers"])
    assert done.returncode == 2
    assert "fastrl: error: 'fastrl chat' needs a module that is not installed: transformers" in done.stderr


# --- doctor


def test_doctor_reports_versions_and_backends(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("fastrl", "python", "torch", "triton", "transformers", "peft", "native module", "OpenMP", "CUDA"):
        assert f"\n  {name} " in "\n" + text
    assert torch.__version__.partition("+")[0] in text
    from fastrl.ops.backend import explain

    for op, backend, _ in explain(torch.device("cpu"), torch.float32):
        assert any(line.split()[:2] == [op, backend] for line in text.splitlines())


@pytest.mark.slow
def test_doctor_without_native_module_triton_and_transformers():
    """Where `_C` cannot be imported, everything is on `reference` and doctor says why."""
    done = run_isolated("doctor", blocked=["fastrl._C", "triton", "transformers", "peft"])
    assert done.returncode == 0, done.stderr
    assert "native module  missing: " in done.stdout and "to do: pip install ." in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  token_logprobs ")]
    assert rows[0][1] == "reference" and "native module fastrl._C is missing" in " ".join(rows[0])


@pytest.mark.slow
def test_doctor_without_torch():
    done = run_isolated("doctor", blocked=["torch"])
    assert done.returncode == 0 and "torch does not load" in done.stdout


def test_doctor_shows_an_impossible_request(capsys, monkeypatch):
    monkeypatch.setenv("FASTRL_BACKEND", "fpga")
    assert cli.main(["doctor", "--dtype", "bfloat16"]) == 0
    assert "expected one of reference, cpu, triton, cuda, got 'fpga'" in capsys.readouterr().out


def test_doctor_sees_several_openmp_runtimes(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    doctor.main([])
    assert "libgomp.so.1, libiomp5.so  more than one" in capsys.readouterr().out


# --- chat and export


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return tokenizer


def config(**overrides):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 258, "pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **tokens, "initializer_range": 0.5, **overrides})


@pytest.fixture
def policy(tmp_path):
    """Folder of a one-layer Llama with random weights and a byte tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def adapter(tmp_path, policy):
    """Folder of a LoRA adapter on `policy` whose weights are not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(policy), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def talk(monkeypatch, capsys, *argv, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert cli.main(["chat", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_chat_answers_every_line(policy, monkeypatch, capsys):
    """Greedy answers of a pipe equal what `generate` gives for the same conversation."""
    out, _ = talk(
        monkeypatch, capsys, policy, "--temperature", "0", "--max-new-tokens", "8", text="hi\n\nho\n/exit\nx\n"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    messages: list[Message] = []
    expected = []
    for line in ("hi", "ho"):
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(output, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": expected[-1].strip()})
    assert out.split() == "\n".join(expected).split()
    assert len(expected[0]) > 0


def test_chat_repeats_with_the_seed(policy, monkeypatch, capsys):
    def answers(seed):
        arguments = ("--temperature", "1.5", "--max-new-tokens", "8", "--seed", seed)
        return talk(monkeypatch, capsys, policy, *arguments, text="hi\n")[0]

    assert answers(0) == answers(0) != answers(1)


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(policy, monkeypatch, capsys):
    """64 tokens of context: long talks go on, a message that alone is too long is refused."""
    out, err = talk(
        monkeypatch,
        capsys,
        policy,
        "--max-new-tokens",
        "8",
        text="hello hello\n" * 6 + "x" * 80 + "\nhello\n/reset\nhi\n",
    )
    assert err.count("does not fit the model's context") == 1


def test_chat_stops_at_named_tokens(policy, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(policy)
    output = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    third = tokenizer.convert_ids_to_tokens(output[2])
    arguments = ("--temperature", "0", "--max-new-tokens", "8", "--stop", third)
    stopped = talk(monkeypatch, capsys, policy, *arguments, text="hi\n")[0]
    assert third not in map(tokenizer.convert_ids_to_tokens, output[:2])
    assert stopped == tokenizer.decode(output[:3]) + "\n" != tokenizer.decode(output) + "\n"


def test_chat_refuses_bad_options(policy, capsys):
    for arguments, message in [
        (["--stop", "nothing"], "stop token 'nothing': expected one token"),
        (["--temperature", "-1"], "temperature must be 0 (greedy) or positive, got -1.0"),
        (["--temperature", "nan"], "temperature must be 0 (greedy) or positive, got nan"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--seed", "-1"], "seed must be at least 0 and below 2**32, got -1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    ]:
        assert cli.main(["chat", str(policy), *arguments]) == 2
        assert f"fastrl: error: {message}" in capsys.readouterr().err


def compared(out: str) -> list[list[str]]:
    """The answers in each of two columns, one an answer, without their line breaks."""
    blocks = [[line.partition(" | ")[::2] for line in block.splitlines()] for block in out.strip().split("\n\n")]
    return [["".join(row[column].strip() for row in block[2:]) for block in blocks] for column in (0, 1)]


def test_chat_compares_two_models(policy, adapter, monkeypatch, capsys):
    """Each column holds what its model alone says, in a conversation of its own; an adapter is merged as ever."""
    monkeypatch.setenv("COLUMNS", "203")
    arguments = ("--temperature", "0", "--max-new-tokens", "4", "--system", "s")
    out, _ = talk(monkeypatch, capsys, "--compare", policy, adapter, *arguments, text="hi\nho\n/reset\nhi\n")
    assert out.startswith(str(policy)[-100:].ljust(100) + " | " + str(adapter)[-100:])
    for column, model in zip(compared(out), (policy, adapter), strict=True):
        alone, _ = talk(monkeypatch, capsys, model, *arguments, text="hi\nho\n")
        assert "".join("".join(column[:2]).split()) == "".join(alone.split()) and column[0] == column[2]


def test_compared_models_draw_the_same_random_numbers(policy, monkeypatch, capsys):
    arguments = ("--temperature", "1.5", "--max-new-tokens", "8")
    out, _ = talk(monkeypatch, capsys, "--compare", policy, policy, *arguments, text="hi\nho\n")
    left, right = compared(out)
    assert left == right and left[0] != left[1]


def test_texts_beside_each_other_are_wrapped_and_filled():
    assert beside(["a", "long/" + "x" * 16], ["one two three four five", "1\n\n2"], width=35).splitlines() == [
        "a                | " + "x" * 16,
        "---------------- | ----------------",
        "one two three    | 1",
        "four five        |",
        "                 | 2",
    ]


def test_chat_takes_one_model_or_two(policy, capsys):
    for arguments in ([], [str(policy), "--compare", str(policy), str(policy)]):
        assert cli.main(["chat", *arguments]) == 2
        assert "expected one MODEL, or two after --compare" in capsys.readouterr().err


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10, 30)[None]).logits


def test_export_merges_an_adapter(policy, adapter, tmp_path, capsys):
    """The written folder loads with transformers alone and gives the logits of base + adapter."""
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    assert cli.main(["export", str(adapter), str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert "pipeline_tag: text-generation" in (out / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(out)
    expected = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(policy)) - expected).abs().max() > 0.1
    assert not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer().chat_template


def test_export_dtype(policy, tmp_path):
    export(str(policy), tmp_path / "half", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    export(str(tmp_path / "half"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_reward_model(tmp_path):
    """A reward model stays one: head, one output, and the stored bias of its scores."""
    source = tmp_path / "reward"
    model = LlamaForSequenceClassification(config(num_labels=1, fastrl_score_bias=0.25))
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    export(str(source), tmp_path / "out")
    copy = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert copy.config.fastrl_score_bias == 0.25 and copy.config.num_labels == 1
    assert torch.equal(logits(copy), logits(model.eval()))


def test_export_refuses_to_overwrite(policy, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "adapter_config.json").write_text("{}")
    assert cli.main(["export", str(adapter), str(out)]) == 2
    assert "is not empty; name another folder or give --overwrite" in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "notes.txt"]
    assert cli.main(["export", str(adapter), str(out), "--overwrite"]) == 0
    (out / "README.md").write_text("my card")
    assert cli.main(["export", str(adapter), str(out), "--overwrite"]) == 0
    assert (out / "README.md").read_text() == "my card"
    assert (out / "notes.txt").read_text() == "mine" and not (out / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(out)


def test_export_never_writes_over_its_source(policy, adapter, tmp_path):
    for source, out in [(policy, policy), (adapter, adapter), (adapter, policy)]:
        with pytest.raises(ValueError, match="holds the model that is being read"):
            export(str(source), out, overwrite=True)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        export(str(policy), policy / "config.json")


def test_export_of_a_missing_model(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "fastrl: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
