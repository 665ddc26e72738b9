"""Model folders as users have them: cut short, half downloaded, moved. What is wrong is said in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LFS = b"version https://git-lfs"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*", "spiece.model")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What other libraries raise while they read a model or tokenizer, as a ValueError of one line that names it.

    An OSError stays one; running out of memory is no fault of the files.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub client raise many unrelated types
        text = " ".join(str(error).split())
        cause = text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
        message = cause if str(path) in cause else f"{path}: cannot be read: {cause}"
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is not text, not JSON, nested too deep, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {_why(error)}; get the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def check_files(folder: Path) -> None:
    """Raise ValueError if a file of the folder that a model would be loaded from is broken, or its index names weights
    that are not there. Only headers are read.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name in ("config.json", ADAPTER_CONFIG, "tokenizer_config.json", "generation_config.json"):
            settings = read_json(file)
            if file.name == "config.json" and settings.get("quantization_config"):
                method = settings["quantization_config"].get("quant_method", "unknown")
                raise ValueError(
                    f"{file}: quantization_config: expected weights in float32, bfloat16 or float16, got {method};"
                    " quantised weights cannot be trained or merged: give the model that they were made from"
                )
    for file in sorted(folder.glob("*.safetensors.index.json")):
        shards = {str(name) for name in dict(read_json(file).get("weight_map") or {}).values()}
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ValueError(
                f"{file}: expected {len(shards)} files of weights, {len(missing)} not there: {', '.join(missing[:4])};"
                " get them again"
            )
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def check_has_weights(folder: Path) -> None:
    """Raise FileNotFoundError if the folder lacks config.json or weights as safetensors."""
    if not (folder / "config.json").is_file():
        interrupted = "; a save into it was interrupted" if (folder / ".partial").exists() else ""
        raise FileNotFoundError(
            f"{folder}/config.json: not found{interrupted}; give a folder that save_pretrained or fastrl wrote"
        )
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    got = f"got {', '.join(others[:4])}" if others else "got none"
    raise FileNotFoundError(
        f"{folder}: expected weights as safetensors, {got}; load them with transformers where you trust them and call"
        " save_pretrained"
    )


def read_config(path: str | Path) -> Any:
    """transformers' config of a model: folder or hub id.

    Raises:
        OSError, ValueError: there is none, or none that transformers knows; in one line that names the path.
    """
    if Path(path).is_dir():
        check_has_weights(Path(path))
    with reading(path):
        return transformers.AutoConfig.from_pretrained(path)


def check_has_tokenizer(folder: Path) -> None:
    """Raise FileNotFoundError if the folder holds no tokenizer."""
    if not any(file for pattern in TOKENIZER for file in folder.glob(pattern)):
        raise FileNotFoundError(
            f"{folder}: expected a tokenizer beside the model, got none of {', '.join(TOKENIZER)}; save the model's"
            " tokenizer there with save_pretrained"
        )


def find_base(base: str, adapter: str | Path) -> str:
    """Folder or hub id of the base that an adapter folder names.

    PEFT's reading first: a path seen from the working directory, or a hub id. A relative path may also be meant from
    the adapter's folder; and where base and adapter were moved together, the base is at its old place below a folder of
    the same name.

    Raises:
        FileNotFoundError: a path to nothing.
        ValueError: the adapter names itself.
    """
    named, folder = Path(base).expanduser(), Path(adapter).resolve()
    places = [named]
    if not named.is_absolute():
        places.append(folder / named)
    for ancestor in (folder, *folder.parents):
        if named.is_absolute() and ancestor.name and ancestor.name in named.parts:
            place = len(named.parts) - named.parts[::-1].index(ancestor.name)
            places.append(ancestor.joinpath(*named.parts[place:]))
    found = next((place for place in places if place.is_dir()), None)
    where = f"{folder}/adapter_config.json: base_model_name_or_path"
    if found is not None and found.resolve() == folder:
        raise ValueError(f"{where}: expected the adapter's base, got the adapter's own folder; write the base's path")
    if found is None and (named.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1):
        raise FileNotFoundError(f"{where}: the folder {base} is not there; write the path of the adapter's base")
    return base if found is None else str(found)


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(LFS):
            raise ValueError(f"{file}: expected weights, got a git-lfs pointer; run `git lfs pull` in its repository")
        if size < 8 or length + 8 > size:
            raise ValueError(f"{file}: expected safetensors, got {size} bytes that are none or cut short; get it again")
        stream.seek(8)
        header = stream.read(length)
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: expected safetensors, got a broken header; get the file again") from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise ValueError(f"{file}: expected {whole} bytes, as its header says, got {size}; get the file again")


def _why(error: Exception) -> str:
    return "lists or objects nested too deep" if isinstance(error, RecursionError) else str(error)


def is_adapter(path: str | Path) -> bool:
    """Whether path is a folder that holds a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_weights(path: str | Path) -> Path:
    """The file that holds an adapter folder's weights.

    Raises:
        FileNotFoundError: it is not there.
    """
    file = Path(path) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; save the adapter as safetensors")
    return file


def adapter_base(path: str | Path) -> str:
    """Folder or hub id of the model that an adapter folder was trained on."""
    base = read_json(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{Path(path) / ADAPTER_CONFIG}: expected base_model_name_or_path to name the"
            " adapter's base model,"
            f" got {base!r}; write the base model's folder or hub id there"
        )
    return find_base(base, path)
