"""Model folders that are broken, half there or moved: one line that names the file, and exit status 2."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrl import cli
from fastrl.models import LoRASettings, adapter_base, add_lora, load_policy, load_scalar_model, load_tokenizer
from fastrl.models.saving import save_merged_base, save_model

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tiny_policy, tmp_path):
    return shutil.copytree(tiny_policy, tmp_path / "model")


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def shards(folder: Path) -> None:
    model = load_policy(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")


def without_a_shard(folder: Path) -> None:
    shards(folder)
    next(iter(sorted(folder.glob("model-00002-*")))).unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def setting(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


BROKEN = {
    "cut short": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors: expected \d+ bytes, .* got \d+"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors: .*got 0 bytes"),
    "a page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), r"model\.safetensors: .*none or cut"),
    "git-lfs": (lambda f: lfs(f / "model.safetensors"), r"model\.safetensors: .*git-lfs pointer; run `git lfs"),
    "pickled": (pickled, r"expected weights as safetensors, got pytorch_model\.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "expected weights as safetensors, got none"),
    "no shard": (without_a_shard, r"model\.safetensors\.index\.json: expected .*, 1 not there: model-00002"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: not found; give a folder"),
    "config cut short": (lambda f: cut(f / "config.json"), r"config\.json: expected JSON, got"),
    "config too deep": (lambda f: (f / "config.json").write_text(DEEP), r"config\.json: .*nested too deep"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: .* object, got list"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json: expected JSON"),
    "unknown family": (lambda f: setting(f, model_type="new"), "model: cannot be read: .*`new`"),
    "wrong type": (lambda f: setting(f, hidden_size="wide"), "model: cannot be read: "),
    "quantised": (
        lambda f: setting(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config\.json: quantization_config: expected weights in float32, bfloat16 or float16, got gptq",
    ),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        "expected a tokenizer beside the model, got none",
    ),
    "tokenizer cut short": (lambda f: cut(f / "tokenizer.json"), "model: cannot be read: "),
    "tokenizer too deep": (lambda f: (f / "tokenizer.json").write_text(DEEP), "model: cannot be read: "),
    "tokenizer config cut": (lambda f: cut(f / "tokenizer_config.json"), r"tokenizer_config\.json: expected JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_line(kind, folder, tmp_path, capsys):
    """By `fastrl sft`, export and chat alike; nothing is written."""
    damage, message = BROKEN[kind]
    damage(folder)
    capsys.readouterr()
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    run, out = tmp_path / "run", tmp_path / "out"
    for arguments in (
        ["sft", "--model", folder, "--data", tmp_path / "data.jsonl", "--output", run, "--max_length", 64],
        ["reward", "--model", folder, "--data", tmp_path / "pairs.jsonl", "--output", run, "--max_length", 64],
        ["export", folder, out],
        ["chat", folder],
    ):
        assert cli.main([str(a) for a in arguments]) == 2, arguments[0]
        text = capsys.readouterr().err.rstrip("\n")
        lines = [line for line in text.splitlines() if line.startswith("fastrl: error: ")]
        assert len(lines) == 1 and text.endswith(lines[0])
        assert re.search(message, lines[0]), lines[0]
    assert not run.exists() and not out.exists()


def save_adapter(folder: Path, base: str) -> Path:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "adapter_model.safetensors"), r"adapter_model\.safetensors: expected \d+ bytes"),
        (lambda f: lfs(f / "adapter_model.safetensors"), "git-lfs pointer"),
        (lambda f: cut(f / "adapter_config.json"), r"adapter_config\.json: expected JSON"),
        (lambda f: (f / "adapter_config.json").write_text(DEEP), r"adapter_config\.json: .*nested too deep"),
    ],
    ids=["cut short", "git-lfs", "config cut short", "config too deep"],
)
def test_a_broken_adapter(damage, message, folder, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", str(folder))
    damage(adapter)
    for load in (load_policy, load_scalar_model, load_tokenizer):
        with pytest.raises(ValueError, match=message):
            load(adapter)


def test_an_adapter_of_an_unknown_method(folder, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", str(folder))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "NEWEST"}))
    with pytest.raises(ValueError, match="adapter: cannot be read: .*NEWEST"):
        load_policy(adapter)


def test_bases_named_by_relative_paths(folder, tmp_path, monkeypatch):
    """As PEFT reads them, from the working directory; else from the adapter's folder; else one line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "runs/a/own")
    save_adapter(tmp_path / "runs/a", "model")
    assert adapter_base("runs/a") == "model"
    want = load_policy("runs/a")(torch.tensor([[5, 6]])).logits
    (tmp_path / "elsewhere").mkdir()
    for cwd, base in [("elsewhere", "../../model"), ("elsewhere", "own"), (".", "./model"), (".", "runs/a/own")]:
        monkeypatch.chdir(tmp_path / cwd)
        settings = json.loads((tmp_path / "runs/a/adapter_config.json").read_text())
        (tmp_path / "runs/a/adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        assert torch.equal(load_policy(tmp_path / "runs/a")(torch.tensor([[5, 6]])).logits, want)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: .* the folder runs/a/own is not there; write"):
        load_policy(tmp_path / "runs/a")


def test_bases_that_moved_with_their_adapters(folder, tiny_tokenizer, tmp_path, monkeypatch):
    """What our loops save names the whole path, from any working directory, and is found after a move of all."""
    monkeypatch.chdir(folder.parent)
    project = tmp_path / "project"
    shutil.copytree(folder, project / "models/base")
    first = add_lora(load_policy(project / "models/base"), LoRASettings(2, 4))
    first.base_model.model.name_or_path = "project/models/base"
    save_model(first, tiny_tokenizer, project / "runs/first")
    merged = load_policy(project / "runs/first")
    save_merged_base(merged, tiny_tokenizer, project / "runs/second")
    second = add_lora(merged, LoRASettings(2, 4))
    save_model(second, tiny_tokenizer, project / "runs/second")
    save_model(second, tiny_tokenizer, project / "runs/second/checkpoints/step-000001")
    names = ["first", "second", "second/checkpoints/step-000001"]
    assert all(Path(adapter_base(project / "runs" / name)).is_absolute() for name in names)
    (tmp_path / "far").mkdir()
    project.rename(tmp_path / "far/project")
    monkeypatch.chdir("/")
    for name in names:
        assert adapter_base(tmp_path / "far/project/runs" / name).startswith(str(tmp_path / "far/project"))
        load_policy(tmp_path / "far/project/runs" / name)
    shutil.rmtree(tmp_path / "far/project/models")
    with pytest.raises(FileNotFoundError, match=r"runs/first/adapter_config\.json: .*models/base is not there"):
        load_policy(tmp_path / "far/project/runs/first")


def test_an_adapter_that_names_itself(folder, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", str(folder))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(adapter)}))
    with pytest.raises(ValueError, match="expected the adapter's base, got the adapter's own folder"):
        load_policy(adapter)


def test_a_home_folder_in_yaml_and_options(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (tmp_path / "run.yaml").write_text(
        "model: ~/model\ndata: ~/data.jsonl\noutput: ~/run\nmax_length: 64\nmax_steps: 1\n"
    )
    assert cli.main(["sft", "--config", str(tmp_path / "run.yaml"), "--samples", "0"]) == 0
    assert (tmp_path / "run/adapter_config.json").exists()
    assert cli.main(["export", "~/run", "~/merged"]) == 0
    assert (tmp_path / "merged/config.json").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert cli.main(["chat", "~/merged", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
