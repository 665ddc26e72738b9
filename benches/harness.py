"""One way to measure every op: check the result first, then time all providers in turn.

A `Case` is one op at one shape, dtype and direction with the functions that compete on it. `measure` turns it into rows
(columns: `records.COLUMNS`); `fastrl.commands.bench` runs many of them, `records` keeps and shows them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastrl.benches import memory
from fastrl.benches.machine import cache_bytes, host_seconds, seconds_of, short
from fastrl.ops import backend

Inputs = dict[str, Any]
Provider = Callable[[Inputs], "torch.Tensor | tuple[torch.Tensor, ...]"]

# Largest error against float64 that passes, relative to the largest value of the result.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Overwriting:
    """A provider that leaves other values in its inputs; no other provider is timed on them."""

    provider: Provider

    def __call__(self, inputs: Inputs) -> Any:
        return self.provider(inputs)


@dataclass(frozen=True)
class Case:
    """One op at one shape. The first provider is the baseline that `speedup` refers to."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[int], Inputs]  # number of rows -> fresh inputs
    rows: int
    truth: Provider  # gets float64 copies of the inputs
    providers: dict[str, Provider]
    wrt: tuple[str, ...] = ()  # inputs that want a gradient; none: forward only
    bound: str = "gemm"  # the ceiling that counts: read, copy or gemm
    bytes: int = 0  # read and written at least once, for read and copy
    flops: int = 0  # for gemm
    gate_rows: int = 16  # rows of the check against float64
    floors: dict[str, Provider] = field(default_factory=dict)  # part of the work only: timed, not checked
    tolerance: float | None = None  # TOLERANCE of the dtype
    captured: bool = False  # timed as replays of a CUDA graph: the device alone, whatever the host takes to launch

    @property
    def direction(self) -> str:
        return ("fwd+bwd" if self.wrt else "fwd") + (" captured" if self.captured else "")

    @property
    def ceiling(self) -> str:
        return f"gemm {short(self.dtype)}" if self.bound == "gemm" else self.bound

    @property
    def label(self) -> str:
        return f"{self.op} {self.shape} {short(self.dtype)} {self.direction}"


@dataclass(frozen=True)
class Budget:
    """Seconds per case, shared evenly by its providers, and rounds per provider."""

    seconds: float = 3.0
    warmup: float = 0.3
    min_rounds: int = 5
    max_rounds: int = 300


QUICK = Budget(seconds=0.25, warmup=0.05, min_rounds=3)
GPU = Budget(seconds=1.5, warmup=0.1)  # quieter than a CPU


def cases(ops: Iterable[str], device: str, quick: bool) -> list[Case]:
    """The cases of `bench_<op>.py` for each op."""
    modules = [importlib.import_module(f"fastrl.benches.bench_{op}") for op in ops]
    return [case for module in modules for case in module.cases(device, quick)]


def compiled(function: Provider) -> dict[str, Provider]:
    """The provider torch.compile, where a C++ compiler is at hand for it."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        return {}
    return {"torch.compile": torch.compile(function, dynamic=False)}


def forget_compiled(case: Case) -> None:
    """Lets torch.compile start anew for `case`; it gives up after a few shapes of one function."""
    if "torch.compile" in case.providers:
        torch.compiler.reset()


def optional(module: str, name: str, provider: Callable[[Any, Inputs], Any], label: str = "") -> dict[str, Provider]:
    """The provider `provider(module.name, inputs)` where that can be imported, called `label` or else after it."""
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception:  # noqa: BLE001  absent, of another version, or broken: no peer
        return {}
    return {label or f"{module.split('.')[0]} {name}": functools.partial(provider, function)}


def ours(op: str, device: str, dtype: torch.dtype, run: Callable[[Inputs, str], Any]) -> dict[str, Provider]:
    """`run(inputs, backend)` on every native backend that this machine has for `op`."""
    return {
        f"fastrl {name}": functools.partial(_on_backend, run, name)
        for name in backend.NATIVE_BACKENDS[op]
        if not backend.why_not(name, op, torch.device(device), dtype)
    }


def _on_backend(run: Callable[[Inputs, str], Any], name: str, inputs: Inputs) -> Any:
    return run(inputs, name)


def measure(case: Case, device: str, rates: dict[str, float], budget: Budget) -> list[dict[str, str]]:
    """One row per provider of `case`: errors, times, rate, share of the ceiling."""
    forget_compiled(case)
    errors = {name: check(case, provider, device) for name, provider in case.providers.items()}
    passed = {name: case.providers[name] for name, (problem, *_) in errors.items() if not problem}
    runs = runs_of(case, {**passed, **case.floors}, device)
    times, failures = time_in_turn(runs, device, budget)
    rows = []
    for name in [*case.providers, *case.floors]:
        problem, error, grad_error = errors.get(name, ("", math.nan, math.nan))
        problem = problem or failures.get(name, "")
        row = identity(case, name) | {
            "status": problem or ("floor" if name in case.floors else "ok"),
            "error": number(error),
            "grad_error": number(grad_error),
        }
        if name in times:
            p20, p50, p80 = percentiles(times[name])
            row |= {f"ms_p{p}": number(1e3 * value) for p, value in ((20, p20), (50, p50), (80, p80))}
            if device != "cpu" and not case.captured:  # memory on CPUs: memory.of_cases
                row["peak_extra_mib"] = number(memory.peak_extra_mib(runs[name], device))
                row["host_us"] = number(1e6 * host_seconds(runs[name], device))
            work, unit = (case.flops, "GFLOP/s") if case.bound == "gemm" else (case.bytes, "GB/s")
            if name not in case.floors and work:
                rate = work / p50 / 1e9
                ceiling = rates[case.ceiling]
                row |= {"rate": number(rate), "unit": unit, "ceiling": number(ceiling)}
                row |= {"percent": number(100 * rate / ceiling)}
                if case.bound != "gemm" and "datasheet" in rates:
                    row |= {"percent_of_datasheet": number(100 * rate / rates["datasheet"])}
        rows.append(row)
    return [compared(row, rows[0]) for row in rows]


def identity(case: Case, provider: str) -> dict[str, str]:
    """The columns that tell a row of `case` from any other on the same machine."""
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": short(case.dtype),
        "direction": case.direction,
        "provider": provider,
    }


def compared(row: dict[str, str], baseline: dict[str, str]) -> dict[str, str]:
    """`row` with its speed-up over the row of the baseline, where both have a time."""
    if not (row.get("ms_p50") and baseline.get("ms_p50")):
        return row
    speedup = float(baseline["ms_p50"]) / float(row["ms_p50"])
    return row | {"baseline": baseline["provider"], "speedup": number(speedup)}


def runs_of(
    case: Case, providers: dict[str, Provider], device: str, copies: int | None = None
) -> dict[str, Run | Replay]:
    """Every provider bound to one rotation of inputs, those that overwrite them to one of their own."""
    shared = rotation(case, device, copies)

    def bound(provider: Provider) -> Run | Replay:
        inputs = rotation(case, device, copies) if isinstance(provider, Overwriting) else shared
        run = Run(provider, case.wrt, inputs)
        return Replay(run, device) if case.captured else run

    return {name: bound(provider) for name, provider in providers.items()}


class Run:
    """A provider bound to its inputs: calling it does the whole forward (and backward) once."""

    calls = 1

    def __init__(self, provider: Provider, wrt: tuple[str, ...], inputs: Iterator[Inputs]) -> None:
        self.provider, self.wrt, self.inputs = provider, wrt, inputs
        self.upstream: tuple[torch.Tensor, ...] | None = None

    def __call__(self) -> None:
        inputs = next(self.inputs)
        if not self.wrt:
            with torch.no_grad():
                self.provider(inputs)
            return
        outputs = as_tuple(self.provider(inputs))
        if self.upstream is None:
            self.upstream = upstream_of(outputs)
        leaves = [inputs[name] for name in self.wrt]
        torch.autograd.grad(outputs, leaves, self.upstream, allow_unused=True)  # a floor may not use all


class Replay:
    """So many calls of a run, each with the next inputs, as one CUDA graph; on a CPU one after the other."""

    calls = 16

    def __init__(self, run: Run, device: str) -> None:
        self.run, self.on_cpu = run, device == "cpu"
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.on_cpu:
            self.issue()
            return
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()

    def issue(self) -> None:
        for _ in range(self.calls):
            self.run()

    def capture(self) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()  # compiles, makes the upstream, has the library set up its workspace
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            self.issue()
        return graph


def rotation(case: Case, device: str, copies: int | None = None) -> Iterator[Inputs]:
    """Endless inputs, the same values each time. All providers of a case that only read them draw from one rotation.

    Memory-bound cases, on a GPU all, get so many copies that a set has left the last-level cache when it comes round
    again.
    """
    first = inputs_of(case, case.rows, device)
    if copies is None and (case.bound != "gemm" or device != "cpu"):
        size = sum(t.numel() * t.element_size() for t in first.values() if isinstance(t, torch.Tensor))
        copies = min(math.ceil(2 * cache_bytes(device) / max(size, 1)), 64)
    return itertools.cycle([first] + [copy_of(first) for _ in range((copies or 1) - 1)])


def inputs_of(case: Case, rows: int, device: str) -> Inputs:
    torch.manual_seed(0)
    with torch.device(device):
        return with_leaves(case.make(rows), case.wrt)


def copy_of(inputs: Inputs) -> Inputs:
    leaves = tuple(k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad)
    return with_leaves({k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, leaves)


def with_leaves(inputs: Inputs, wrt: Iterable[str]) -> Inputs:
    for name in wrt:
        inputs[name].requires_grad_()
    return inputs


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def upstream_of(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Fixed random gradients of the outputs; 1 for a scalar loss."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.ones_like(o) if o.ndim == 0 else torch.randn(o.shape, generator=generator).to(o.device, o.dtype)
        for o in outputs
    )


def check(case: Case, provider: Provider, device: str) -> tuple[str, float, float]:
    """(problem or "", error of the results, error of the gradients) against the truth, on `gate_rows` rows."""
    try:
        got, got_grads = results_and_grads(case, provider, device, double=False)
    except Exception as failure:  # noqa: BLE001  a provider that breaks is a row that says so
        return describe(failure), math.nan, math.nan
    want, want_grads = results_and_grads(case, case.truth, device, double=True)
    error = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
    grad_error = max((relative_error(g, w) for g, w in zip(got_grads, want_grads, strict=True)), default=math.nan)
    worst = error if math.isnan(grad_error) and not got_grads else max(error, grad_error)
    tolerance = case.tolerance or TOLERANCE[case.dtype]
    problem = "" if worst <= tolerance else f"wrong: error {worst:.1e} > {tolerance:.0e}"
    return problem, error, grad_error


def describe(failure: Exception) -> str:
    first_line = (str(failure).splitlines() or [""])[0]
    return f"failed: {type(failure).__name__}: {first_line[:120]}"


def results_and_grads(case: Case, provider: Provider, device: str, double: bool):
    inputs = inputs_of(case, min(case.gate_rows, case.rows), device)
    if double:
        floats = {k: v.detach().double() for k, v in inputs.items() if is_float(v)}
        inputs = with_leaves({**inputs, **floats}, case.wrt)
    if not case.wrt:
        with torch.no_grad():
            return as_tuple(provider(inputs)), ()
    outputs = as_tuple(provider(inputs))
    grads = torch.autograd.grad(outputs, [inputs[name] for name in case.wrt], upstream_of(outputs))
    return tuple(o.detach() for o in outputs), grads


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest true value; inf where one is NaN and the other is not."""
    if got.shape != want.shape:
        return math.inf
    difference = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
    return math.inf if difference.isnan() else float(difference)


def time_in_turn(
    runs: dict[str, Run | Replay], device: str, budget: Budget
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call of each run, and what is wrong with those that fail at full size (out of memory, say).

    Providers take turns, so that a slow spell of the machine hits all of them.
    """
    repeats, failures = {}, {}
    for name, run in runs.items():
        try:
            repeats[name] = warm_up(run, device, budget.warmup)
        except Exception as failure:  # noqa: BLE001
            failures[name] = describe(failure)
    runs = {name: runs[name] for name in repeats}
    times: dict[str, list[float]] = {name: [] for name in runs}
    share = budget.seconds / max(len(runs), 1)
    for done in range(budget.max_rounds):
        spent = {name: sum(times[name]) * repeats[name] * run.calls for name, run in runs.items()}
        due = [name for name in runs if done < budget.min_rounds or spent[name] < share]
        if not due:
            break
        for name in due:
            times[name].append(seconds_of(runs[name], repeats[name], device) / runs[name].calls)
    return times, failures


def warm_up(run: Run | Replay, device: str, seconds: float) -> int:
    """Calls `run` for a while; returns how many calls make one timing of about half a millisecond."""
    run()
    once, end = math.inf, time.perf_counter() + seconds
    while True:
        once = min(once, seconds_of(run, 1, device))
        if time.perf_counter() > end:
            return max(1, min(1000, round(5e-4 / once)))


def percentiles(times: list[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def number(value: float) -> str:
    """Four significant digits; empty for no value."""
    return "" if math.isnan(value) else f"{value:.4g}"
