"""Records of a data source: local files, folders and globs, an Arrow folder or a Hugging Face dataset.

`read_records` yields (where, record) pairs; `where` names file and line for error messages.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# CSV has text cells only; these columns hold JSON.
JSON_COLUMNS = ("responses", "ranks", "scores", "margin")
SPLITS = {"train": ("train",), "test": ("test", "eval"), "validation": ("validation", "valid", "val", "dev")}


def read_records(source: Source) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) for every record of `source`; null fields count as absent.

    Args:
        source: a `.jsonl`, `.ndjson`, `.json` (lines or one array) or `.csv` file, each also as
            `.gz`; a `.parquet` file; a folder of such files, or one written by `Dataset.save_to_disk`; a
            glob of files; or a hub id; or a list of these, read one after the other. A local path
            wins over a hub id. `name:split` picks a split, `train` otherwise.
    Raises:
        FileNotFoundError: the path does not exist, or nothing matches the glob.
        ValueError: unreadable file, unknown kind, broken line; the message names file and line.
    """
    names = [source] if isinstance(source, (str, os.PathLike)) else source
    for name in names:
        for where, record in _reader(os.path.expanduser(os.fspath(name))):
            yield where, {key: value for key, value in record.items() if value is not None}


def source_name(source: Source) -> str:
    """The source as text, for reports and messages."""
    names = [source] if isinstance(source, (str, os.PathLike)) else source
    return ", ".join(os.fspath(name) for name in names)


def _reader(name: str) -> Iterator[tuple[str, Record]]:
    path, split = Path(name), None
    if not path.exists() and ":" in name:
        name, _, split = name.rpartition(":")
        path = Path(name)
    if path.is_dir():
        return _read_folder(path, split)
    if path.exists():
        if split is not None:
            raise ValueError(f"{name}: a file has no splits, got ':{split}'")
        return _read_file(path)
    if glob.has_magic(name):
        return _read_files(sorted(map(Path, glob.glob(name, recursive=True))), name)
    if _kind(path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"data file not found: {name} (looked in {Path.cwd()})")
    return _read_hub(name, split or "train")


def _kind(path: Path) -> str | None:
    """The file kind, `.json` for `a.json.gz`; None if unknown."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _read_folder(path: Path, split: str | None) -> Iterator[tuple[str, Record]]:
    """A folder of Dataset.save_to_disk, or data files, of one split if their names tell splits apart."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_arrow_folder(path, split)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
    splits = {name for file in files if (name := _split_of(file.relative_to(path)))}
    if split is not None:
        return _read_files([file for file in files if _split_of(file.relative_to(path)) == split], f"{path}:{split}")
    if len(splits) > 1:
        raise ValueError(f"{path}: this folder holds the splits {', '.join(sorted(splits))}; name one: {path}:train")
    return _read_files(files, str(path))


def _split_of(path: Path) -> str | None:
    """The split that a file's name or folder speaks of, as in `data/train-00000-of-00002.parquet`."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((split for split, names in SPLITS.items() if any(name in words for name in names)), None)


def _read_files(files: Sequence[Path], name: str) -> Iterator[tuple[str, Record]]:
    if not files:
        raise FileNotFoundError(
            f"{name}: no data file there; expected {', '.join(SUFFIXES)} (text kinds also with .gz) "
            "or a folder written by Dataset.save_to_disk"
        )
    for file in files:
        yield from _read_file(file)


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
        except RecursionError as error:
            raise ValueError(f"{where}: JSON nested too deep to read, got {_shorten(line)}") from error
        yield where, _as_record(where, record)


def _read_json_array(path: Path, text: str, first_line: int) -> Iterator[tuple[str, Record]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: broken JSON array: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path}:{first_line}: JSON array nested too deep to read") from error
    for index, record in enumerate(records):
        where = f"{path}[{index}]"
        yield where, _as_record(where, record)


def _read_csv(path: Path, file: IO[str]) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(sys.maxsize)  # of the process; csv refuses cells beyond 128 KiB otherwise
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

    data = datasets.load_from_disk(str(path))
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
