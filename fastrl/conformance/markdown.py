"""The page docs/conformance.md: every implementation against every case, failing inputs, notes, what is left out."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

from fastrl.conformance.cases import Case
from fastrl.conformance.left_out import LEFT_OUT
from fastrl.conformance.run import DIFFERS, FAIL, NOT_OFFERED, PASS, Verdict, summary
from fastrl.versions import versions

SIGNS = {PASS: "yes", FAIL: "**no**", DIFFERS: "differs", NOT_OFFERED: ""}
INTRODUCTION = """# Conformance

What is known to break in RLHF code, tried on implementations of it. Each case was somebody's bug once: T1 to T38 in
kernels, pitfalls 1 to 48 in training loops. The cases ask an implementation's own functions, through a few plain
signatures (`fastrl.conformance.Adapter`), and compare with float64. "yes": holds. "**no**": does not; the input is
below. "differs": the implementation means something else on purpose; its note is below. Empty: it does not offer this
as something that can be called, which says nothing against it. Plain torch, written with care, shows that no case asks
for more than torch can give. Edge cases are meant to be rare: a "no" says what to expect there, not that training is
wrong.

Written by `fastrl conformance --markdown` on {date} with {versions}. On your own code, in a module `mine`:

```python
from fastrl.conformance import Adapter, NotOffered


def token_logprobs(logits, token_ids, *, temperature=1.0, softcap=None):
    if softcap is not None:
        raise NotOffered("no softcap")
    return (logits / temperature).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


adapter = Adapter("mine", "1.0", token_logprobs=token_logprobs)
```

```bash
fastrl conformance mine:adapter
pytest -p fastrl.conformance.plugin --pyargs fastrl.conformance --impl mine:adapter
```
"""


def page(verdicts: Sequence[Verdict], cases: Sequence[Case], missing: Sequence[str]) -> str:
    columns = list(dict.fromkeys(verdict.implementation for verdict in verdicts))
    parts = [
        INTRODUCTION.format(date=datetime.date.today().isoformat(), versions=_versions()),
        _rows(["implementation", "verdicts"], ([column, summary(verdicts, column)] for column in columns)),
        *(f"Not run: {line}\n" for line in missing),
        "## Cases\n",
        *_tables(verdicts, cases, columns),
        *_details(verdicts, cases, FAIL, "Failing inputs"),
        *_details(verdicts, cases, DIFFERS, "Differences by convention"),
        *_absent(verdicts, columns),
        "## Left out\n\nWhat cannot be asked of all alike. fastrl's own tests have all but pitfall 27.\n",
        _rows(["case", "why"], ([number, why] for number, why in LEFT_OUT.items())),
    ]
    return "\n".join(parts)


def _versions() -> str:
    return ", ".join(f"{name} {number}" for name, number in versions().items() if number != "not installed")


def _tables(verdicts: Sequence[Verdict], cases: Sequence[Case], columns: list[str]) -> Iterable[str]:
    """One table for each file of cases, with the implementations that offer something of it."""
    found = {(v.case, v.implementation): v.outcome for v in verdicts}
    for module in dict.fromkeys(case.name.split(".")[0] for case in cases):
        own = [case for case in cases if case.name.startswith(f"{module}.")]
        able = [c for c in columns if any(found[case.name, c] != NOT_OFFERED for case in own)]
        yield f"### {module}\n"
        rows = ([", ".join(c.numbers), c.sentence, *(SIGNS[found[c.name, column]] for column in able)] for c in own)
        yield _rows(["case", "what must hold", *able], rows)


def _details(verdicts: Sequence[Verdict], cases: Sequence[Case], kind: str, title: str) -> Iterable[str]:
    """The inputs or notes of all verdicts of a kind."""
    found = [verdict for verdict in verdicts if verdict.outcome == kind]
    if not found:
        return
    numbers = {case.name: ", ".join(case.numbers) for case in cases}
    yield f"## {title}\n"
    yield _rows(
        ["implementation", "case", "input" if kind == FAIL else "note"],
        ([v.implementation, f"{numbers[v.case]} ({v.case})", v.detail] for v in found),
    )


def _absent(verdicts: Sequence[Verdict], columns: list[str]) -> Iterable[str]:
    """Why cases do not apply, in each implementation's own words."""
    reasons = {(v.implementation, v.detail): None for v in verdicts if v.outcome == NOT_OFFERED}
    rows = [[column, "; ".join(why for who, why in reasons if who == column)] for column in columns]
    rows = [row for row in rows if row[1]]
    if rows:
        yield "## Not offered\n"
        yield _rows(["implementation", "what"], rows)


def _rows(header: list[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
