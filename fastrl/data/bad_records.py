"""Records that become nothing: dropped, counted by reason, the first of each with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

ALWAYS_ALLOWED = 10  # bad records, however few records there are


class Unusable(Exception):
    """A sound record that holds nothing to learn from, or that is too long: dropped and counted."""


class BadRecord(ValueError):
    """A record with a mistake: dropped, counted under `reason`, and an error where there are too many of them."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Dropped:
    """What was left out of a data source so far."""

    def __init__(self) -> None:
        self.records = 0
        self.bad = 0
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Work on the record at `where`: if it raises Unusable or BadRecord, it is dropped."""
        try:
            yield
        except Unusable as error:
            self.add(str(error), where)
        except BadRecord as error:
            self.bad += 1
            detail = "" if str(error) == error.reason else f": {error}"
            self.add(error.reason, where + detail)

    def add(self, reason: str, where: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    def check(self, report: object, max_bad_records: float) -> None:
        """Raise ValueError, with the report, if more than a share of `max_bad_records` of the records, and more than
        ten, are bad; 0 allows none."""
        if not 0 <= max_bad_records <= 1:
            raise ValueError(f"max_bad_records: expected a share in [0, 1], got {max_bad_records}")
        allowed = max(ALWAYS_ALLOWED, int(max_bad_records * self.records)) if max_bad_records else 0
        if self.bad > allowed:
            raise ValueError(
                f"max_bad_records {max_bad_records}: expected at most {allowed} bad records of {self.records}, got "
                f"{self.bad}: {report}; mend them, or raise max_bad_records"
            )
