"""A model card for a model that a run trained: what the files of its run know, and blanks for what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastrl.folders import adapter_base, is_adapter
from fastrl.run.output import LOG
from fastrl.run.runfiles import RunFiles, held_out, is_time, number, read_run, state

KEY_SETTINGS = (
    "tuner lora_rank lora_alpha packing learning_rate critic_learning_rate schedule epochs max_steps iterations"
    " batch_size minibatch_size max_length max_prompt_length max_new_tokens temperature kl_coef kl_estimator clip_coef"
    " gae_lambda kl_target no_stop_score score_clip score_norm length_penalty ptx_coef center_coef dtype seed"
).split()
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".ndjson")  # of local files
WHAT = {
    "sft": "supervised fine-tuning",
    "reward": "a reward model on preferences",
    "ppo": "PPO against a reward model",
}


def model_card(model: str | Path, *, task: str = "text-generation") -> str:
    """README.md of a model's folder, or of a checkpoint in one, with the header that the hub reads."""
    run = find_run(Path(model))
    settings = run.mapping("settings") if run else {}
    bases, first = _bases(str(model), run)
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["fastrl"]}
    if run and run.record.get("loop"):
        header["tags"] += [run.record["loop"]]
    if bases and first and _is_hub(bases[0]):
        header["base_model"] = bases[0]
    if data := [source.partition(":")[0] for source in _sources(settings.get("data")) if _is_hub(source)]:
        header["datasets"] = data
    blank = "# license: to be filled in; it depends on the base model and the data"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}{blank}\n---",
        f"# {Path(model).resolve().name}",
        _origin(run, bases),
        _held_out(run) if run else "",
        _settings(run) if run else "",
        "## Use and limits\n\nTo be filled in: what the model is for, what it was not tested for, the data's licence.",
        _versions(run) if run else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def find_run(model: Path) -> RunFiles | None:
    """The run that wrote a model: in its folder, or above it where that is a checkpoint; None for any other model."""
    places = [model, *([model.parents[1]] if model.parent.name == "checkpoints" else [])]
    return next((read_run(place) for place in places if (place / LOG).is_file()), None)


def _bases(model: str, run: RunFiles | None) -> tuple[list[str], bool]:
    """What the model was trained from, back to the first that is known, and whether that is no run's: a run starts from
    the model of another, which is looked for where it was and beside the run's folder.
    """
    found: list[str] = [] if run or not is_adapter(model) else [adapter_base(model)]
    first = True
    while run and (name := run.mapping("settings").get("model")) and name not in found:
        found.insert(0, name)
        first = name not in run.mapping("reads")
        places = [Path(name).expanduser(), run.folder.resolve().parent / Path(name).name]
        run = next((read_run(place) for place in places if not first and (place / LOG).is_file()), None)
    return found, first


def _origin(run: RunFiles | None, bases: list[str]) -> str:
    lines = []
    if run:
        loop = str(run.record.get("loop", ""))
        lines.append(f"Trained with fastrl: {WHAT.get(loop, loop or 'a run without run.json')} ({state(run)}).")
        settings = run.mapping("settings")
        names = {
            "data": "Data",
            "eval_data": "Held-out data",
            "ptx_data": "Data mixed in",
            "reward_model": "Reward model",
        }
        names |= {"reward_weights": "Weights of its criteria", "rewards": "Further rewards"}
        found = {label: _sources(settings.get(name)) for name, label in names.items()}
        rows = {"Base model": [" → ".join(bases)] if bases else [], **found}
    else:
        lines.append(
            "Exported with fastrl. The folder of the model has no files of a run: how it was trained is unknown."
        )
        rows = {"Base model": bases}
    return (
        "\n\n".join(lines)
        + "\n\n"
        + "\n".join(f"- {label}: {', '.join(f'`{text}`' for text in texts)}" for label, texts in rows.items() if texts)
    )


def _held_out(run: RunFiles) -> str:
    shown = {name: pair for name, pair in held_out(run).items() if not is_time(name)}
    rows = [f"| {name} | {number(a, name)} | {number(b, name)} |" for name, (a, b) in shown.items()]
    if not rows:
        return "## Held-out metrics\n\nNone: no data were held out."
    return "## Held-out metrics\n\n| metric | before | after |\n| --- | ---: | ---: |\n" + "\n".join(rows)


def _settings(run: RunFiles) -> str:
    settings = run.mapping("settings")
    rows = [f"{name}: {settings[name]}" for name in KEY_SETTINGS if settings.get(name) not in (None, "")]
    return "## Settings\n\n```yaml\n" + "\n".join(rows) + "\n```" if rows else ""


def _versions(run: RunFiles) -> str:
    parts = [f"{name} {version}" for name, version in run.mapping("versions").items() if version != "not installed"]
    device = f" on {run.record['device']}" if run.record.get("device") else ""
    return "## Versions\n\n" + ", ".join(parts) + device + "." if parts else ""


def _sources(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}={weight}" for name, weight in value.items()]
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one]


def _is_hub(name: str) -> bool:
    """Whether a name is a hub id: no file or folder of this machine, which nobody else has."""
    path = Path(name).expanduser()
    return (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not path.exists()
        and path.suffix not in SUFFIXES
    )
