"""`fastrl run PIPELINE`: SFT, reward model and PPO one after the other, and a report of what came of them.

    fastrl run pipeline.yaml
    fastrl run smollm2-hh --output runs/mine --ppo.iterations 100

PIPELINE is a YAML file, or the name of a recipe that comes with fastrl. Its keys `sft`, `reward` and `ppo` hold the
settings of these loops; any other key is a setting of all stages that have it, and `output` is the folder that gets a
folder for each stage. The reward model starts from what SFT gives, PPO takes both, unless a stage names its own
`model` or `reward_model`. `--KEY VALUE` and `--STAGE.KEY VALUE` change a setting.

Started again, it skips the stages that are finished and goes on inside the one that was interrupted. If their settings
have changed, it says how and stops: `--redo` trains them again, and all that came of them (the earlier runs are moved
to OUTPUT.previous); `--resume_changed true` keeps what is finished and goes on with what is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrl.commands.stages import (
    Stage,
    check_inputs,
    find_pipeline,
    is_missing,
    read_overrides,
    read_stages,
    reads,
    recipes,
)
from fastrl.run import distributed
from fastrl.run.output import REPORT, check_output
from fastrl.run.record import begun_at, models_read, read_record
from fastrl.run.resume import changed, newest_state
from fastrl.run.runfiles import duration, highlights, read_run
from fastrl.run.signals import Interrupted
from fastrl.run.summary import save_pipeline

TRAIN, RESUME, SKIP = "train", "resume", "skip"


def main(argv: Sequence[str]) -> None:
    """Read and check all stages, then train those that are due."""
    options, overrides = _parser().parse_known_args(list(argv))
    if options.list or not options.pipeline:
        print("\n".join(f"{name:34}{_first_comment(path)}" for name, path in recipes().items()))
        return
    path = find_pipeline(options.pipeline)
    folder, stages = read_stages(path, read_overrides(overrides))
    if options.dry_run:
        show(folder, stages, plan(stages, options.redo))
        return
    check_inputs(stages)
    distributed.join(stages[0].settings.device)
    run(folder, stages, distributed.on_main(lambda: plan(stages, options.redo)))


def plan(stages: Sequence[Stage], redo: bool = False) -> list[tuple[str, str]]:
    """(train, resume or skip; why) for each stage.

    Raises:
        ValueError: an output folder cannot be written, or what is there was trained with other settings or from models
            that have changed since, and the user did not say what to do.
    """
    chosen: list[tuple[str, str]] = []
    trained: set[str] = set()  # outputs of the stages that are trained now
    refused = []
    for stage in stages:
        action, why, changes = _choose(stage, trained, redo)
        if changes and action != TRAIN and not stage.settings.resume_changed:
            refused.append(f"{stage.name} ({stage.output}): {', '.join(changes)}")
        if action == TRAIN:
            trained.add(stage.settings.output)
        if action != SKIP:
            check_output(replace(stage.settings, resume=False))
        chosen.append((action, why))
    if refused:
        raise ValueError(
            f"run: what was trained is not what these settings give: {'; '.join(refused)}; give the settings as they"
            " were, --redo to train it again, or --resume_changed true to keep it"
        )
    return chosen


def show(folder: Path, stages: Sequence[Stage], chosen: Sequence[tuple[str, str]]) -> None:
    """Print what each stage would do, read and write, with the settings that were given."""
    print(f"{len(stages)} stages, into {folder}")
    outputs = [stage.settings.output for stage in stages]
    for stage, (action, why) in zip(stages, chosen, strict=True):
        print(f"\n{stage.name}: {action} ({why})")
        for name, value in reads(stage):
            missing = "  (not there)" if value not in outputs and is_missing(value) else ""
            print(f"  reads   {name}: {value}{missing}")
        print(f"  writes  {stage.output}")
        shown = [name for name in stage.given if name not in ("output", *dict(reads(stage)))]
        print(f"  with    {', '.join(f'{name}: {getattr(stage.settings, name)}' for name in shown) or 'defaults'}")
    print("\nThis was a dry run: nothing was trained or written.")


def run(folder: Path, stages: Sequence[Stage], chosen: Sequence[tuple[str, str]]) -> None:
    """Train the stages that are due, and write the pipeline's report after each."""
    for number, (stage, (action, why)) in enumerate(zip(stages, chosen, strict=True), 1):
        _say(f"\n== {number}/{len(stages)}  {stage.name}: {action} ({why})")
        if action != SKIP:
            try:
                stage.main(replace(stage.settings, resume=action == RESUME))
            except Interrupted:
                _say(f"{stage.name} was stopped; the same `fastrl run` goes on with it")
                raise
        if distributed.is_main():
            done = read_run(stage.output)
            _say(f"   {'; '.join([*highlights(done), duration(done.record.get('seconds', 0.0))])}")
            save_pipeline(folder, [one.output for one in stages[:number]])
    _say(f"\nreport: {folder / REPORT}")


def _choose(stage: Stage, trained: set[str], redo: bool) -> tuple[str, str, list[str]]:
    """(action, why, what has changed since the run that is in the stage's folder)."""
    record = read_record(stage.output)
    finished = record.get("state") == "finished"
    if not finished and newest_state(stage.output) is None:
        return TRAIN, "not begun" if not record else "no checkpoint to go on from", []
    if not record:
        return SKIP, "", ["it has no run.json, so its settings are not known"]
    changes = changed(record.get("settings") or {}, stage.settings) + _changed_models(stage, record, trained)
    if changes and redo:
        return TRAIN, f"again: {', '.join(changes)}", changes
    why = "finished" if finished else "interrupted"
    if changes:
        why += f", although {', '.join(changes)}"
    return SKIP if finished else RESUME, why, changes


def _changed_models(stage: Stage, record: dict[str, Any], trained: set[str]) -> list[str]:
    """Models that the stage's run started from and that are others by now, or will be."""
    found, before = [], record.get("reads") or {}
    for name, model in models_read(stage.settings):
        if model in trained:
            found.append(f"{name} {model} is trained anew")
        elif model in before and begun_at(model) != before[model]:
            found.append(f"{name} {model} was trained anew since")
    return found


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrl run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pipeline", metavar="PIPELINE", nargs="?", help="YAML file, or the name of a recipe")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="check all settings, show the stages, end")
    parser.add_argument("--redo", action="store_true", help="train stages again whose settings or models have changed")
    parser.add_argument("--list", action="store_true", help="names of the recipes")
    return parser
