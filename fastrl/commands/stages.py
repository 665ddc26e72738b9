"""The stages of `fastrl run`: what a pipeline's file says, as the settings of loops that take each other's outputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import fastrl
from fastrl.cli import COMMANDS
from fastrl.run.config import from_mapping, nearest, read_yaml
from fastrl.run.record import models_read
from fastrl.run.trackers import check_trackers

RECIPES = Path(fastrl.__file__).parent / "recipes"
GIVES = {"sft": "model", "reward": "reward_model"}  # the setting of later stages that an earlier one's output is for
LOCAL = (".jsonl", ".json", ".csv", ".gz", ".parquet")


class Stage(NamedTuple):
    """A loop with its settings, and the names of those that were given."""

    name: str
    main: Callable[[Any], Any]
    settings: Any
    given: tuple[str, ...]

    @property
    def output(self) -> Path:
        return Path(self.settings.output)


def recipes() -> dict[str, Path]:
    """The pipelines that come with fastrl, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)}


def find_pipeline(name: str) -> Path:
    """The file of that name, or the recipe.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = recipes()
    if name in known:
        return known[name]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ValueError(f"run: pipeline: file not found: {name}")
    raise ValueError(f"run: pipeline: no file or recipe '{name}'{nearest(name, list(known), what='recipes')}")


def read_stages(path: Path, overrides: Mapping[str, Any] | None = None) -> tuple[Path, list[Stage]]:
    """The output folder and the stages of a pipeline's file, with all settings parsed and checked.

    Args:
        overrides: {"key" or "stage.key": value} in place of what the file has.
    Raises:
        ValueError: unknown keys (with the nearest known one), values that do not fit, no stage, one output for two.
    """
    loops = {name: _loop(name) for name, (_, config, _) in COMMANDS.items() if config}
    content = read_yaml(path)
    parts = {name: content.pop(name) or {} for name in loops if name in content}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{path}: {name}: expected 'key: value' lines, got {part!r}")
    if not parts:
        raise ValueError(f"{path}: expected at least one of the stages {', '.join(loops)}, got none")
    known = {item.name for name in parts for item in fields(loops[name][1])}
    for key in content:
        if key not in known:
            raise ValueError(f"{path}: unknown key '{key}'{nearest(str(key), [*loops, *sorted(known)])}")
    _override(content, parts, known, overrides or {})

    folder = Path(content.pop("output", f"runs/{path.stem}")).expanduser()
    stages: list[Stage] = []
    for name, part in parts.items():
        main, config = loops[name]
        names = {item.name for item in fields(config)}
        earlier = {GIVES[stage.name]: stage.settings.output for stage in stages if stage.name in GIVES}
        values = {"output": str(folder / name), **content, **earlier}
        values = {key: value for key, value in values.items() if key in names} | part
        stages.append(Stage(name, main, from_mapping(config, values, f"{path}: {name}"), tuple(values)))
    folders = [stage.output.resolve() for stage in stages]
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"{path}: output: expected a folder of its own for each stage, got {', '.join(map(str, folders))}"
        )
    return folder, stages


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """{"key": value} of `--key value` and `--key=value`, with values as in YAML.

    Raises:
        ValueError: an argument is neither.
    """
    found: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not key.startswith("--") or len(key) < 3:
            raise ValueError(f"run: expected --KEY VALUE or --STAGE.KEY VALUE, got '{argument}'")
        text = value if equals else next(rest, None)
        if text is None:
            raise ValueError(f"run: {key}: expected a value after it")
        found[key[2:].replace("-", "_")] = _value(text)
    return found


def check_inputs(stages: Sequence[Stage]) -> None:
    """Refuse what would end a later stage, before the first one trains.

    Raises:
        FileNotFoundError: a local file or folder that a stage reads is not there.
        ValueError: a tracker is not installed.
    """
    outputs = [stage.settings.output for stage in stages]
    for stage in stages:
        check_trackers(stage.settings.tracker)
        for name, value in reads(stage):
            if value not in outputs and is_missing(value):
                raise FileNotFoundError(f"run: {stage.name}: {name}: not found: {value} (looked in {Path.cwd()})")


def reads(stage: Stage) -> list[tuple[str, str]]:
    """(option, source) of the models and data that a stage reads."""
    found = list(models_read(stage.settings))
    for name in (item.name for item in fields(stage.settings) if item.name.endswith("data")):
        value = getattr(stage.settings, name)
        found += [(name, source) for source in ([value] if isinstance(value, str) else value) if source]
    return found


def is_missing(source: str) -> bool:
    """Whether a source that can only be a local file or folder is not there; a hub id is never looked for."""
    path = Path(source).expanduser()
    local = source.startswith(("/", ".", "~")) or len(path.parts) > 2 or path.suffix in LOCAL
    return local and not any(mark in source for mark in "*?[:") and not path.exists()


def _loop(name: str) -> tuple[Callable[[Any], Any], type]:
    module_name, config, _ = COMMANDS[name]
    module = importlib.import_module(module_name)
    return module.main, getattr(module, config)


def _override(
    shared: dict[str, Any], parts: dict[str, dict[str, Any]], known: set[str], overrides: Mapping[str, Any]
) -> None:
    """Put the overrides in their places; a shared one replaces the stages' own, but for `output` and `model`."""
    for key, value in overrides.items():
        stage, dot, name = key.partition(".")
        if dot:
            if stage not in parts:
                raise ValueError(f"run: --{key}: unknown stage '{stage}'{nearest(stage, list(parts))}")
            parts[stage][name] = value
        elif key not in known:
            raise ValueError(f"run: unknown option --{key}{nearest(key, sorted(known), '--')}")
        else:
            shared[key] = value
            for part in parts.values():
                if key not in ("output", "model"):
                    part.pop(key, None)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
