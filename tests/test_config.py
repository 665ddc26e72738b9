"""Configuration from defaults, YAML and the command line; every kind of mistake in it."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Literal

import pytest
import yaml
from loops import MAINS

from fastrl.run.config import checked, option, parse


@dataclass(frozen=True)
class Config:
    """Settings of a test."""

    model: str = field(metadata={"help": "folder with 100% of the model"})
    data: str = field(metadata={"help": "where the records are"})
    learning_rate: float = field(default=1e-5, metadata={"help": "peak rate"})
    steps: int = 10
    lora: bool = True
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    clip: float | None = None
    names: list[str] = field(default_factory=list)


def load(*argv, config_class=Config):
    return parse(config_class, argv, prog="fastrl test", description="Settings of a test.\n\n    on its own line")


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


BASE = "model: m\ndata: d\n"


def test_later_wins_defaults_yaml_command_line(config_file):
    path = config_file(BASE + "learning_rate: 1e-4\nsteps: 5\nclip: 0.2\n")
    cfg = load("--config", path, "--steps=3", "--lora", "false", "--targets", "[a,b]", "--clip", "null")
    assert cfg == Config("m", "d", learning_rate=1e-4, steps=3, lora=False, targets=("a", "b"), clip=None)
    assert load("--steps", "3", "--config", path).steps == 5


def test_defaults_and_exact_types():
    cfg = load("--model", "1", "--data", "d", "--learning_rate", "3", "--clip", "-1.5")
    assert cfg == Config("1", "d", learning_rate=3.0, clip=-1.5)
    assert isinstance(cfg.learning_rate, float) and isinstance(cfg.targets, tuple)
    assert cfg.names is not load("--model", "1", "--data", "d").names


def test_dashes_and_underscores_are_the_same_key(config_file):
    path = config_file(BASE)
    assert load("--config", path, "--learning-rate=2").learning_rate == 2.0
    assert load(f"--config={path}", "--learning_rate", "2").learning_rate == 2.0


def test_print_config_round_trips(config_file, capsys):
    arguments = [
        "--config",
        config_file(BASE + "learning_rate: 1e-4"),
        "--clip=1e-5",
        "--names=[x, '1']",
        "--lora=false",
    ]
    expected = load(*arguments)
    for flag in ("--print-config", "--print_config"):
        with pytest.raises(SystemExit) as exit_info:
            load(*arguments, flag)
        assert exit_info.value.code in (0, None)
        printed = capsys.readouterr().out
        assert list(yaml.safe_load(printed)) == [f.name for f in fields(Config)]
        assert load("--config", config_file(printed)) == expected


def test_help_shows_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit):
        load("--help")
    out = capsys.readouterr().out
    assert "\n    on its own line\n" in out
    text = " ".join(out.split())
    assert "usage: fastrl test" in text and "Settings of a test." in text
    assert "folder with 100% of the model (required, type: str)" in text
    assert "peak rate (type: float, default: 1e-05)" in text
    for item in fields(Config):
        assert f"--{item.name} " in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rat", "learning_rate"), ("Model", "model"), ("kl-estimator", "kl_estimator"), ("step", "steps")],
)
def test_unknown_key_names_the_nearest(key, nearest, config_file):
    path = config_file(BASE + f"{key}: 1\n")
    with pytest.raises(ValueError, match=rf"run\.yaml: unknown key '{key}'; did you mean '{nearest}'\?"):
        load("--config", path)
    if key == "kl-estimator":  # dashes are fine on the command line
        return
    with pytest.raises(ValueError, match=rf"unknown option --{key}; did you mean '--{nearest}'\?"):
        load("--config", config_file(BASE), f"--{key}", "1")


def test_unknown_key_far_from_all_lists_them(config_file):
    with pytest.raises(ValueError, match="unknown option --zzz; known keys: model, data, learning_rate, steps"):
        load("--config", config_file(BASE), "--zzz=1")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", "fast", "expected float, got fast"),
        ("steps", "3.5", "expected int, got 3.5"),
        ("lora", "maybe", "expected bool, got maybe"),
        ("kl_estimator", "k9", r"expected Literal\['k1', 'k2', 'k3'\], got k9"),
        ("clip", "x", "expected float or null, got x"),
        ("targets", "3", "expected tuple, got 3"),
        ("names", "3", r"expected list, got 3"),
    ],
)
def test_wrong_type_names_key_expected_got(key, value, message, config_file):
    with pytest.raises(ValueError, match=rf"key '{key}': {message}"):
        load("--config", config_file(BASE), f"--{key}", value)
    with pytest.raises(ValueError, match=rf"key '{key}': {message}"):
        load("--config", config_file(BASE + f"{key}: {value}\n"))


def test_number_for_a_string_in_yaml(config_file):
    with pytest.raises(ValueError, match="key 'model': expected str, got 1"):
        load("--config", config_file("model: 1\ndata: d\n"))


def test_missing_required_keys_are_named(config_file):
    with pytest.raises(ValueError, match="required: model, data"):
        load()
    with pytest.raises(ValueError, match="required: data"):
        load("--config", config_file("model: m\n"))


def test_config_files_that_cannot_be_read(config_file, tmp_path):
    with pytest.raises(ValueError, match=r"config file not found: .*nope\.yaml"):
        load("--config", str(tmp_path / "nope.yaml"))
    with pytest.raises(ValueError, match="expected 'key: value' lines, got list"):
        load("--config", config_file("- a\n"))
    with pytest.raises(ValueError, match="expected 'key: value' lines, got an empty file"):
        load("--config", config_file(""))
    with pytest.raises(ValueError, match=r"run\.yaml is not readable YAML: (?s:.*)line 1"):
        load("--config", config_file("model: [a"))
    with pytest.raises(ValueError, match="config file .* is not readable"):
        load("--config", str(tmp_path))


def test_stray_words_and_missing_values(config_file):
    path = config_file(BASE)
    with pytest.raises(ValueError, match="unrecognized arguments: stray"):
        load("--config", path, "stray")
    with pytest.raises(ValueError, match="--steps: expected one argument"):
        load("--config", path, "--steps")


def test_a_config_may_refuse_values(config_file):
    @dataclass(frozen=True)
    class Strict:
        rank: int = 1

        def __post_init__(self):
            if self.rank < 1:
                raise ValueError(f"rank: expected at least 1, got {self.rank}")

    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        load("--rank", "0", config_class=Strict)


# --- values


@dataclass(frozen=True)
class Bounded:
    rate: float = option(0.1, "", above=0)
    share: float | None = option(None, "", at_least=0, below=1)
    steps: int = option(1, "", at_least=1, at_most=9)
    free: float = 1.0
    schedule: str = option("linear", "", choices=("linear", "cosine"))
    model: str = option("m", "", path=True)
    extra: str = option("", "", path=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "rate: expected a number above 0, got 0.0"),
        ({"rate": -1}, "rate: expected a number above 0, got -1"),
        ({"rate": math.nan}, "rate: expected a number above 0, got nan"),
        ({"rate": math.inf}, "rate: expected a number above 0, got inf"),
        ({"free": math.nan}, "free: expected a number that is finite, got nan"),
        ({"share": 1.0}, "share: expected a number of at least 0 and below 1, got 1.0"),
        ({"steps": 0}, "steps: expected a number of at least 1 and of at most 9, got 0"),
        ({"steps": 10}, "got 10"),
        ({"schedule": "cosin"}, "schedule: expected one of linear, cosine, got 'cosin'; did you mean 'cosine'?"),
        ({"model": ""}, "model: expected a path, got an empty text"),
    ],
)
def test_values_out_of_bounds(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(Bounded(**values))


def test_values_in_bounds(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = checked(Bounded(rate=1e9, share=0.0, steps=9, model="~/models/m"))
    assert cfg == Bounded(rate=1e9, share=0.0, steps=9, model="/home/me/models/m")
    assert checked(Bounded()) == Bounded()


@pytest.mark.parametrize("settings", [settings for _, settings in MAINS.values()])
def test_every_number_of_the_loops_has_bounds(settings):
    """And every default is within them; a path is one that may begin with ~."""
    needed = {item.name: "x" for item in fields(settings) if item.default is MISSING}
    checked(settings(**needed))
    free = {"no_stop_score"}
    for item in fields(settings):
        if isinstance(item.default, (int, float)) and not isinstance(item.default, bool):
            assert item.metadata["bounds"], item.name
            with pytest.raises(ValueError, match=f"{item.name}: expected a number"):
                checked(replace(settings(**needed), **{item.name: -1}))
        elif item.type == "float | None" and item.name not in free:
            assert item.metadata["bounds"], item.name
    for name in ("model", "output", "reward_model"):  # sources of data are expanded where they are read
        found = [item.metadata["path"] for item in fields(settings) if item.name == name]
        assert all(found)


@pytest.mark.parametrize("settings", [settings for _, settings in MAINS.values()])
def test_help_shows_the_loops_options_in_groups(settings, capsys):
    with pytest.raises(SystemExit):
        parse(settings, ["--help"], prog="fastrl loop")
    text = capsys.readouterr().out
    groups = [f"{base.__doc__}:" for base in reversed(settings.__mro__[:-1])]
    places = [text.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)
    # a restated option stays among its neighbours
    assert places[groups.index("Run:")] < text.index("--output ") < places[groups.index("Data:")]


GROUPS = {base.__name__: base for _, settings in MAINS.values() for base in settings.__mro__[1:-1]}  # in this order


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_group_of_settings_is_small_and_has_no_behaviour(group):
    assert len(group.__annotations__) <= 8
    assert not [name for name, value in vars(group).items() if callable(value) and not name.startswith("__")]
