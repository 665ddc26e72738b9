"""What a response's score is the sum of: criteria of the reward model, other reward models, functions in Python.

    reward_weights: {helpful: 1, harmless: 0.5}      criteria of `reward_model`
    rewards:                                         added to it; without a weight, 1
      - 0.5*runs/politeness                          a reward model of one score
      - 2*runs/hh#honest                             a criterion of one with several
      - -0.1*my_rewards:length_penalty               a function

A function gets all responses of an iteration at once, and gives one number for each:

    def length_penalty(prompts: list[str], responses: list[str], **columns: list) -> list[float]

`columns` are the other columns of the prompts' records, null where a record has none; a function without `**columns` is
given those that it names.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

FORMS = "WEIGHT*MODEL, WEIGHT*MODEL#CRITERION or WEIGHT*module:function"
SHOWN = 200  # characters of a text in an error
MOST = 3e38  # scores are float32

Function = Callable[..., Any]


class Term(NamedTuple):
    """One of `rewards`."""

    weight: float
    source: str  # module:function, or a reward model's folder or hub id
    criterion: str = ""  # of a reward model with several

    @property
    def is_function(self) -> bool:
        return re.fullmatch(r"[\w.]+:[\w.]+", self.source) is not None

    @property
    def text(self) -> str:
        return f"{self.source}#{self.criterion}" if self.criterion else self.source


def parse_weights(weights: str | Mapping[str, float]) -> dict[str, float]:
    """{criterion: weight} from a mapping or from `helpful=1,harmless=0.5`; {} if there are none.

    Raises:
        ValueError: text of another form, or a weight that is no finite number.
    """
    if isinstance(weights, str):
        pairs = [pair.partition("=") for pair in weights.split(",") if pair.strip()]
        if not all(equals and name.strip() for name, equals, _ in pairs):
            raise ValueError(f"reward_weights: expected NAME=NUMBER,... as in helpful=1,harmless=0.5, got {weights!r}")
        return {name.strip(): _number(weight, "reward_weights", weights) for name, _, weight in pairs}
    return {name: _number(weight, "reward_weights", weights) for name, weight in weights.items()}


def check_weights(weights: Mapping[str, float], names: Sequence[str], path: str) -> None:
    """Raise ValueError unless the weights are of criteria of the reward model in `path`, and there are some where there
    are several criteria.
    """
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(
            f"reward_weights: expected criteria of {path}, {', '.join(names)}, got {', '.join(unknown)}"
            f"{_nearest(unknown[0], names)}"
        )
    if len(names) > 1 and not weights:
        raise ValueError(
            f"reward_weights: expected a weight for some of the criteria of {path}, {', '.join(names)}, got none; say"
            f" how they add up, as in {','.join(f'{name}=1' for name in names)}"
        )


def parse_rewards(rewards: str | Sequence[str]) -> list[Term]:
    """The terms of a list, or of a text with commas between them.

    Raises:
        ValueError: a term of another form, or one that is there twice.
    """
    texts = rewards.split(",") if isinstance(rewards, str) else list(rewards)
    terms: list[Term] = []
    for text in (text.strip() for text in texts if text.strip()):
        weight, star, source = text.rpartition("*")
        source, mark, criterion = (part.strip() for part in source.partition("#"))
        if not source or (mark and not criterion):
            raise ValueError(f"rewards: expected {FORMS}, got {text!r}")
        term = Term(_number(weight, "rewards", text) if star else 1.0, source, criterion)
        if term.is_function and criterion:
            raise ValueError(f"rewards: expected a reward model before '#', got the function {source}")
        if term.text in [other.text for other in terms]:
            raise ValueError(f"rewards: expected each reward once, got {term.text} twice; add up its weights")
        terms.append(term)
    return terms


def short_names(terms: Sequence[Term], taken: Iterable[str]) -> list[str]:
    """What each term's mean is reported as: its function's, folder's or criterion's name, or where another has that,
    all of it.
    """
    short = [re.split(r"[:/#]", term.text.rstrip("/"))[-1] for term in terms]
    used = [*taken, *short]
    return [name if used.count(name) == 1 else term.text for name, term in zip(short, terms, strict=True)]


def load_function(source: str) -> Function:
    """The function that `module:function` names; modules of the working directory are found, too.

    Raises:
        ValueError: there is no such module or function, or the module raises.
    """
    module_name, _, name = source.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"rewards: {source}: no module {error.name} is installed, or lies in {here}") from error
        raise ValueError(f"rewards: {source}: the module raised {_described(error)}") from error
    try:
        function = attrgetter(name)(module)
    except AttributeError as error:
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"rewards: {source}: {module_name} has no {name}{_nearest(name, known)}") from error
    if not callable(function):
        raise ValueError(f"rewards: {source}: expected a function, got {type(function).__name__}")
    return function


def taken_columns(source: str, function: Function, names: Sequence[str]) -> list[str]:
    """Those of the named columns that the function is given: all with `**columns`, else those that it names.

    Raises:
        ValueError: it cannot be called with prompts, responses and these.
    """
    names = [name for name in names if name not in ("prompts", "responses")]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return []
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        names = [name for name in names if name in signature.parameters]
    try:
        signature.bind([], [], **dict.fromkeys(names))
    except TypeError as error:
        raise ValueError(
            f"rewards: {source}: expected a function of (prompts, responses, **columns), got one of {signature}:"
            f" {error}; columns of the prompts: {', '.join(names) or 'none'}"
        ) from error
    return names


def function_scores(
    source: str,
    function: Function,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """The function's number for each response.

    Raises:
        ValueError: it raises, or what it gives is not one finite number a response. The first response for which it
            raises, alone, is named; it is called once more for each response to find out.
    """

    def call(rows: Sequence[int]) -> Any:
        own = {name: [values[row] for row in rows] for name, values in columns.items()}
        given = function([prompts[row] for row in rows], [responses[row] for row in rows], **own)
        return list(given) if inspect.isgenerator(given) else given

    def record(row: int) -> str:
        return f"the response {_shortened(responses[row])} to the prompt {_shortened(prompts[row])}"

    every = range(len(responses))
    try:
        given = call(every)
    except Exception as error:
        row = next((row for row in every if _raises(call, row)), None)
        where = f"a batch of {len(responses)}, of which no one raises alone" if row is None else record(row)
        raise ValueError(f"rewards: {source} raised {_described(error)}, for {where}") from error
    try:
        values = list(given)
    except TypeError as error:
        raise ValueError(
            f"rewards: {source}: expected a list of {len(responses)} numbers, got {type(given).__name__}, for"
            f" {record(0)} and what follows"
        ) from error
    if len(values) != len(responses):
        raise ValueError(
            f"rewards: {source}: expected {len(responses)} numbers, one a response, got {len(values)}, for {record(0)}"
            " and what follows"
        )
    for row, value in enumerate(values):
        if not _is_finite(value):
            raise ValueError(f"rewards: {source}: expected a finite number, got {value!r}, for {record(row)}")
    return [float(value) for value in values]


def _raises(call: Callable[[Sequence[int]], Any], row: int) -> bool:
    try:
        call([row])
    except Exception:  # noqa: BLE001 what the function raises is told by the caller
        return True
    return False


def _is_finite(value: Any) -> bool:
    """Whether it is a number, of Python or another library, and finite in float32; a text is none."""
    try:
        return hasattr(type(value), "__float__") and math.isfinite(value) and abs(float(value)) < MOST
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # several numbers, or one of 400 digits
        return False


def _number(value: Any, option: str, given: object) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{option}: expected a finite number as the weight, got {value!r} in {given!r}")
    return number


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {_shortened(' '.join(str(error).split()), quoted=False)}"


def _shortened(text: str, *, quoted: bool = True) -> str:
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return repr(cut) if quoted else cut


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
