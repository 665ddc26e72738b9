"""Processes that train one model together, one rank each; beside trackers the only module that knows of accelerate.

    torchrun --nproc_per_node 2 -m fastrl.cli sft --model ...

Every rank holds the whole model and takes its `share` of each batch. Losses, gradients and statistics are summed over
ranks with the denominators of the whole batch, so that the ranks' number changes rounding alone. In a plain process
every function here is the identity, and neither accelerate nor torch.distributed is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrl.devices import usable_device

T = TypeVar("T")
Items = TypeVar("Items", bound=Any)  # a sequence or a tensor

BUCKET = 2**23  # numbers that are summed over ranks at once: 32 MiB in float32
_state: Any = None  # accelerate's PartialState where there are several processes


class RankError(RuntimeError):
    """Another rank failed or is gone."""


def join(device: str) -> str:
    """Join the processes that a launcher started beside this one; the device of this one.

    Raises:
        ValueError: the device is not there.
    """
    global _state
    device = str(usable_device(device))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return device
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu and torch.cuda.device_count() <= int(os.environ.get("LOCAL_RANK", "0")):
        raise ValueError(
            f"device: expected a GPU for each process of this machine, got {torch.cuda.device_count()} GPUs; start"
            " fewer processes, or give --device cpu"
        )
    from accelerate import PartialState

    _state = PartialState(cpu=on_cpu)
    if _state.num_processes != launched:
        raise ValueError(f"device {device}: expected {launched} processes, got {_state.num_processes} that talk")
    return str(_state.device)


def leave() -> None:
    """Close the connections between the ranks; call it when all of them have ended well."""
    global _state
    if _state is not None:
        _state.destroy_process_group()
        _state = None


def world_size() -> int:
    """Number of ranks."""
    return 1 if _state is None else _state.num_processes


def rank() -> int:
    """This process's number among the ranks."""
    return 0 if _state is None else _state.process_index


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return rank() == 0


def share(items: Items) -> Items:
    """This rank's part of a list or tensor that all ranks hold: every `world_size()`-th item. Sort by length first, and
    the parts cost about the same.
    """
    return items if _state is None else items[rank() :: world_size()]


def unshare(part: Sequence[T]) -> list[T]:
    """The whole list of whose items every rank has its `share`."""
    if _state is None:
        return list(part)
    parts = gather(list(part))
    return [parts[i % world_size()][i // world_size()] for i in range(sum(map(len, parts)))]


def gather(item: T) -> list[T]:
    """The ranks' items, in their order."""
    if _state is None:
        return [item]
    from accelerate.utils import gather_object

    with _talking():
        return gather_object([item])


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors of equal shape, on the same device and with the same bits on every rank."""
    if _state is None:
        return tensor
    total = tensor.to(_state.device, copy=True)
    with _talking():
        torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers."""
    if _state is None:
        return number
    largest = torch.tensor(number, device=_state.device)
    with _talking():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def on_main(function: Callable[[], T]) -> T:
    """What the function returns, which runs on rank 0 alone; what it raises there, every rank raises."""
    if _state is None:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:  # noqa: BLE001 raised below, on every rank
            outcome[1] = error
    original = outcome[1]
    if original is not None:
        announce(original)
        outcome[1] = _portable(original)
    with _talking():
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise original or outcome[1]
    return outcome[0]


@torch.no_grad()
def sum_gradients(tensors: Iterable[Tensor]) -> None:
    """Sum the tensors' gradients over ranks, in flat buckets; one that is None counts as zeros, and stays None where it
    is so on every rank.
    """
    if _state is None:
        return
    for bucket in _buckets(tensors):
        present = bucket[0].new_tensor([t.grad is not None for t in bucket])
        gradients = [(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in bucket]
        flat = torch.cat([present, *gradients])
        with _talking():
            torch.distributed.all_reduce(flat)
        sums = flat[len(bucket) :].split([t.numel() for t in bucket])
        for tensor, total, ranks in zip(bucket, sums, flat[: len(bucket)].tolist(), strict=True):
            if tensor.grad is not None:
                tensor.grad.copy_(total.view_as(tensor))
            elif ranks:
                tensor.grad = total.view_as(tensor).clone()


def announce(error: BaseException) -> None:
    """Leave why this rank fails where the others find it, if none of them failed before."""
    if _state is None or isinstance(error, RankError):
        return
    with suppress(Exception):  # the store lives in another process, which may be gone
        _store().compare_set("fastrl/failure", "", json.dumps([rank(), _text(error)]))  # sets it if nobody has


def is_told(error: BaseException) -> bool:
    """Whether another rank failed first with this very error: the user then reads it from that one."""
    if _state is None:
        return int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1
    failure = _failure()
    return failure is not None and failure[0] != rank() and failure[1] == _text(error)


def _failure() -> tuple[int, str] | None:
    """Rank and error of the one that failed first."""
    with suppress(Exception):
        if _store().check(["fastrl/failure"]):
            number, text = json.loads(_store().get("fastrl/failure"))
            return number, text
    return None


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


@contextmanager
def _talking() -> Iterator[None]:
    """What torch raises when another rank is gone, as a RankError that says why it is."""
    try:
        yield
    except RuntimeError as error:
        failure = _failure()
        if failure is None:
            lines = str(error).splitlines() or [type(error).__name__]
            why = f"another rank is gone (killed, or out of memory?): {lines[0]}"
        else:
            why = f"rank {failure[0]} failed: {failure[1]}"
        raise RankError(f"rank {rank()} ended: {why}") from error


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and (numbers + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


def _portable(error: Exception) -> Exception:
    """One of the same kind that any process can make: what users can mend stays so."""
    kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RankError)
    return kind(_text(error))


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
