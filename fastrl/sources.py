"""Records of a data source: a local file, an Arrow folder or a Hugging Face dataset.

`read_records` yields (where, record) pairs; `where` names file and line for error messages.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# CSV has text cells only; these columns hold JSON.
JSON_COLUMNS = ("messages", "responses", "ranks", "scores", "margin")


def read_records(source: str | os.PathLike[str]) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) for every record of `source`; null fields count as absent.

    Args:
        source: a `.jsonl`, `.ndjson`, `.json` (lines or one array) or `.csv` file, each also as
            `.gz`; a `.parquet` file; a folder written by `Dataset.save_to_disk`; or a hub id.
            A local path wins over a hub id. `name:split` picks a split, `train` otherwise.
    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: unreadable file, unknown kind, broken line; the message names file and line.
    """
    name = os.fspath(source)
    for where, record in _reader(name):
        yield where, {key: value for key, value in record.items() if value is not None}


def _reader(name: str) -> Iterator[tuple[str, Record]]:
    path, split = Path(name), None
    if not path.exists() and ":" in name:
        name, _, split = name.rpartition(":")
        path = Path(name)
    if path.is_dir():
        return _read_arrow_folder(path, split)
    if path.exists():
        if split is not None:
            raise ValueError(f"{name}: a file has no splits, got ':{split}'")
        return _read_file(path)
    if _kind(path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"data file not found: {name} (looked in {Path.cwd()})")
    return _read_hub(name, split or "train")


def _kind(path: Path) -> str | None:
    """The file kind, `.json` for `a.json.gz`; None if unknown."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _read_file(path: Path) -> Iterator[tuple[str, Record]]:
    kind = _kind(path)
    if kind is None:
        raise ValueError(
            f"{path}: unknown kind of data file; expected {', '.join(SUFFIXES)} "
            "(text kinds also with .gz) or a folder of Dataset.save_to_disk"
        )
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    reader = _read_csv if kind == ".csv" else _read_json
    try:
        with _open_text(path) as file:
            yield from reader(path, file)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path}: not readable as {kind[1:]} text: {error}") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _read_json(path: Path, file: IO[str]) -> Iterator[tuple[str, Record]]:
    """JSON lines, or one JSON array of records."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _read_json_array(path, line + file.read(), number)
            return
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: broken JSON: {error.msg} at column {error.colno}; "
                f"expected one JSON object per line, got {_shorten(line)}"
            ) from error
        yield where, _as_record(where, record)


def _read_json_array(path: Path, text: str, first_line: int) -> Iterator[tuple[str, Record]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: broken JSON array: {error.msg}") from error
    for index, record in enumerate(records):
        where = f"{path}[{index}]"
        yield where, _as_record(where, record)


def _read_csv(path: Path, file: IO[str]) -> Iterator[tuple[str, Record]]:
    reader = csv.DictReader(file, restkey="", strict=True)
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if "" in row or None in row.values():
            raise ValueError(
                f"{where}: expected {len(reader.fieldnames or [])} columns as in the header, "
                f"got {sum(v is not None for k, v in row.items() if k) + len(row.get('', ()))}"
            )
        for column in JSON_COLUMNS:
            if row.get(column):
                try:
                    row[column] = json.loads(row[column])
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: column '{column}' must be JSON: {error}") from error
        yield where, {k: v for k, v in row.items() if v != "" or k not in JSON_COLUMNS}


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path} row {row}", record
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _read_arrow_folder(path: Path, split: str | None) -> Iterator[tuple[str, Record]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: this folder was not written by Dataset.save_to_disk; "
            f"name one data file ({', '.join(SUFFIXES)}) in it instead"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        split = split or "train"
        if split not in data:
            raise ValueError(f"{path}: no split '{split}', found {sorted(data)}")
        data = data[split]
    elif split is not None:
        raise ValueError(f"{path}: this dataset has no splits, got ':{split}'")
    for row, record in enumerate(data):
        yield f"{path} row {row}", record


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Record]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"data source '{name}' is no local path, and loading it from the hub failed "
            f"(split '{split}'): {type(error).__name__}: {error}"
        ) from error
    for row, record in enumerate(data):
        yield f"{name}[{split}] row {row}", record


def _as_record(where: str, record: Any) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_shorten(json.dumps(record))}")
    return record


def _shorten(text: str, length: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= length else text[:length] + "..."
