"""Names of columns: the user's mapping, and the common names that stand for fastrl's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from fastrl.data.bad_records import BadRecord

NAMES = (
    *("messages", "prompt", "completion", "text", "instruction", "input", "output", "system", "history", "tools"),
    *("chosen", "rejected", "responses", "ranks", "scores", "margin", "criterion"),
)
DECISIVE = ("messages", "conversations", "conversation", "instances", "text")  # each makes a format of its own
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "inputs", "input")
ANSWERS = ("completion", "output", "response", "answer", "solution", "targets", "target")


def read_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """{fastrl's name: the data's name} from a mapping or from `prompt=question,completion=answer`.

    Raises:
        ValueError: no such name, or text of another form.
    """
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
        if not all(equals and name.strip() and column.strip() for name, equals, column in pairs):
            raise ValueError(f"columns: expected NAME=COLUMN,NAME=COLUMN as in prompt=question, got {columns!r}")
        columns = {name.strip(): column.strip() for name, _, column in pairs}
    for name in columns or {}:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(NAMES)}"
            raise ValueError(f"columns: {name!r} is none of fastrl's names; {hint}")
    return dict(columns or {})


def rename(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under fastrl's names. A mapping decides the format: what it does not name cannot."""
    if not columns:
        return record
    missing = [column for column in columns.values() if column not in record]
    if missing:
        raise BadRecord(
            "missing column",
            f"columns: no column {missing[0]!r}, or it is null; columns with a value: {', '.join(map(str, record))}",
        )
    rest = {name: value for name, value in record.items() if name not in columns.values() and name not in DECISIVE}
    return {**rest, **{name: record[column] for name, column in columns.items()}}


def find_column(record: dict[str, Any], names: tuple[str, ...], role: str) -> str | None:
    """The one column of the record that has one of the names; None if there is none."""
    found = [name for name in names if name in record]
    if len(found) > 1:
        raise BadRecord(
            "ambiguous columns",
            f"several columns could be the {role}: {', '.join(found)}; name one with columns: {role}={found[0]}",
        )
    return found[0] if found else None
