"""Configuration: a flat dataclass, or a sum of them, filled from a YAML file and the command line.

    fastrl sft --config run.yaml --learning_rate 1e-4

jsonargparse does the parsing and the type checks; this module names the nearest key where
one is unknown and says plainly what is wrong with a value.
"""

from __future__ import annotations

import argparse
import difflib
import math
import operator
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, replace
from typing import Any, TypeVar, get_type_hints

import jsonargparse
import yaml

Config = TypeVar("Config")

BOUNDS = {
    "at_least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("of at most", operator.le),
    "below": ("below", operator.lt),
}


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    path: bool = False,
) -> Any:
    """A dataclass field with the text that `--help` prints; `MISSING` as default makes it required.

    What `checked` refuses is declared beside it: values out of bounds, or not among `choices`. In a `path` a leading ~
    is the home folder.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"help": help, "bounds": bounds, "choices": tuple(choices), "path": path})


def checked(settings: Config) -> Config:
    """The settings with ~ expanded in their paths; call it before anything is loaded.

    Raises:
        ValueError: a value is out of its option's bounds, not finite, or not among its choices; or the settings' own
            `check`, where they have one, finds options that contradict each other.
    """
    paths: dict[str, Any] = {}
    for item in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, item.name)
        _check_value(item, value)
        if item.metadata.get("path"):
            paths[item.name] = _expanded(value)
    settings = replace(settings, **paths)  # type: ignore[type-var]
    if hasattr(settings, "check"):
        settings.check()
    return settings


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
) -> Config:
    """An instance of the flat dataclass `config_class`.

    Later wins: field defaults, then `--config FILE` (YAML), then `--key value` or `--key=value`.
    `--learning-rate` and `--learning_rate` are the same key. `--help` shows each field's
    `field(metadata={"help": ...})`, in groups that the docstrings of the class and its bases name;
    `--print-config` prints the YAML that would be used.

    Raises:
        ValueError: unknown key (with the nearest known one), wrong type (with expected and got),
            missing required keys, or a missing or broken YAML file.
        SystemExit: after `--help` and `--print-config`.
    """
    arguments = _normalise(sys.argv[1:] if argv is None else list(argv))
    parser = _parser(config_class, prog, description)
    names = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    _check_keys(arguments, names)
    try:
        namespace = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise ValueError(_readable(str(error))) from error
    try:
        return config_class(**{name: namespace[name] for name in names})
    except TypeError as error:
        raise ValueError(f"{config_class.__name__}: {error}") from error


def from_mapping(config_class: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """An instance of the flat dataclass from the keys and values of a mapping, checked; `where` begins what errors say.

    Raises:
        ValueError: unknown key (with the nearest known one), wrong type, a value out of bounds, missing required keys.
    """
    names = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: unknown key '{key}'{nearest(str(key), names)}")
    parser = _parser(config_class, "fastrl", "")
    try:
        namespace = parser.parse_string(yaml.safe_dump(dict(values)))
        return checked(config_class(**{name: namespace[name] for name in names}))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {_readable(str(error))}") from error


def _check_value(item: Field[Any], value: Any) -> None:
    choices = item.metadata.get("choices", ())
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{item.name}: expected one of {', '.join(choices)}, got {value!r}{hint}")
    if item.metadata.get("path") and value == "" != item.default:
        raise ValueError(f"{item.name}: expected a path, got an empty text")
    if not isinstance(value, (int, float)):
        return
    bounds = item.metadata.get("bounds", {})
    if not math.isfinite(value) or not all(BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
        limits = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
        raise ValueError(f"{item.name}: expected a number {limits or 'that is finite'}, got {value}")


def _expanded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_expanded, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """jsonargparse's help with types and defaults; the description keeps its lines."""


def _parser(config_class: type, prog: str, description: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        metavar="FILE",
        help="YAML file with any of the keys below; what comes later on the command line wins",
    )
    hints, groups = get_type_hints(config_class), {}
    for item in fields(config_class):
        owner = _introduced_in(config_class, item.name)
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__doc__)
        text = item.metadata.get("help", "")
        options: dict[str, Any] = {"type": hints[item.name], "help": text}
        if _required(item):
            options["required"] = True
        else:
            factory = item.default_factory
            options["default"] = item.default if factory is MISSING else factory()
        groups[owner].add_argument(f"--{item.name}", **options)
    return parser


def _introduced_in(config_class: type, name: str) -> type:
    """The class of a field; one that is restated stays in the class, and so in the group of `--help`, it came from."""
    return next(owner for owner in reversed(config_class.__mro__) if name in owner.__dict__.get("__annotations__", {}))


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _normalise(arguments: list[str]) -> list[str]:
    """`--learning-rate=1` as `--learning_rate=1`; only `--print-config` keeps its dash."""
    normalised = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.startswith("--"):
            key = "--" + key[2:].replace("-", "_")
            key = "--print-config" if key == "--print_config" else key
        normalised.append(key + equals + value)
    return normalised


def _check_keys(arguments: list[str], names: list[str]) -> None:
    """Unknown keys, on the command line and in YAML files, with the nearest known one."""
    known = [*names, "config", "help", "print-config"]
    keys = [a[2:].partition("=")[0] for a in arguments if a.startswith("--") and a != "--"]
    for key in keys:
        if key.rstrip("+") not in known:
            raise ValueError(f"unknown option --{key}{nearest(key, names, '--')}")
    for path in _config_files(arguments):
        for key in read_yaml(path):
            if key not in names:
                raise ValueError(f"{path}: unknown key '{key}'{nearest(str(key), names)}")


def _config_files(arguments: list[str]) -> list[str]:
    following = [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--config"]
    return following + [a.partition("=")[2] for a in arguments if a.startswith("--config=")]


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: it is not there, no YAML, or holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise ValueError(f"config file not found: {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config file {path} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise ValueError(f"config file {path}: expected 'key: value' lines, got {got}")
    return content


def nearest(key: str, names: Sequence[str], prefix: str = "", *, what: str = "keys") -> str:
    """What an error says of an unknown key (or `what` else): the known one that is nearest, or all of them."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    return f"; known {what}: {', '.join(names)}"


def _readable(message: str) -> str:
    """jsonargparse's message as one plain line: key, expected, got."""
    message = " ".join(message.split()).replace("typing.", "")
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("NoneType", "null")
    key = re.match(r'Parser key "(\w+)": ', message)
    expected = re.findall(r"Expected an? (.+?)(?=\. Got value| - Expected| Given value)", message)
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and expected and got:
        return f"key '{key[1]}': expected {' or '.join(expected)}, got {got[1]}"
    return message
