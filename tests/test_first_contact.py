"""The kit for a GPU that is there for minutes, as far as a machine without one can see it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from threading import Thread

import pytest
from gpu import every_op

from fastrl.benches import first_contact, first_contact_module
from fastrl.benches.first_contact import Outcome, Step

MINUTE = 60
FILES = 8  # of the results, whenever it is killed


def python(code: str, name: str = "a step", seconds: float = 20, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, **options)


def run(todo: list[Step], results: Path, budget: float = 100) -> list[Outcome]:
    return first_contact.run(todo, results, budget, {})


def table(results: Path) -> list[dict[str, str]]:
    with (results / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logs(results: Path) -> str:
    with zipfile.ZipFile(results / "logs.zip") as archive:
        return "\n".join(archive.read(name).decode() for name in archive.namelist())


@pytest.mark.parametrize(
    "step, status, note",
    [
        (python("print('first'); print('last')"), "ok", "last"),
        (python("print('ERROR SUMMARY: 3 errors'); print('bye'); raise SystemExit(9)"), "failed (9)", "ERROR SUMMARY"),
        (python("import time; print('begun', flush=True); time.sleep(20)", seconds=1), "too slow", "begun"),
        (Step("absent", ["no-such-program"], 20), "failed (127)", "timeout: "),
        (python("import os; os.kill(os.getpid(), 9)"), "failed (", ""),
    ],
    ids=["ok", "fails", "slow", "absent", "killed"],
)
def test_a_step_is_reported_and_never_raises(tmp_path, step, status, note):
    (outcome,) = run([step], tmp_path)
    assert outcome.status.startswith(status) and outcome.note.startswith(note) and float(outcome.seconds) < 5


def test_a_step_that_fails_stops_nothing(tmp_path):
    outcomes = run([python("raise SystemExit(1)", "one"), python("print('2 passed')", "two")], tmp_path)
    assert [outcome.status for outcome in outcomes] == ["failed (1)", "ok"]
    assert first_contact.shown(outcomes).endswith("2 passed")


def test_each_line_is_on_disk_before_the_next_step_begins(tmp_path):
    shows = f"print(open({str(tmp_path / 'steps.csv')!r}).read())"
    run([python("print('said by one')", "one"), python(shows, "two"), python("", "three")], tmp_path)
    assert "one,ok," in logs(tmp_path) and "said by one" in logs(tmp_path)
    assert [line["step"] for line in table(tmp_path)] == ["one", "two", "three"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.zip", "steps.csv"]


def test_a_second_call_does_what_the_first_did_not_come_to(tmp_path):
    sleeps = "import time; time.sleep(60)"
    ended = [python("", "always", every_call=True), python("raise SystemExit(1)", "done")]
    ended += [python(sleeps, "slow", 1), python(sleeps, "goes on", 1, goes_on=True)]
    outcomes = run(ended, tmp_path) + run([python(sleeps, "cut", 2)], tmp_path, budget=1.5)
    assert [o.status for o in outcomes] == ["ok", "failed (1)", "too slow", "too slow", "cut off"]
    assert run([python("", "late", 60)], tmp_path, budget=1) == []
    quick = [step._replace(command=[sys.executable, "-c", ""], seconds=20) for step in ended]
    quick += [python("", "cut"), python("", "late")]
    again = [(outcome.step, outcome.status) for outcome in run(quick, tmp_path)]
    assert again == [("always", "ok"), ("goes on", "ok"), ("cut", "ok"), ("late", "ok")]
    assert [outcome.step for outcome in run(quick, tmp_path)] == ["always"]


KILLED = """
import sys
from fastrl.benches import first_contact as f
def steps(results, work, dry):
    command = lambda code: [sys.executable, "-c", code]
    wait = "import os, time; print('waits', os.getpid(), flush=True); time.sleep({})".format(60 if dry else 0)
    return [f.Step("one", command("print('said by one')"), 30), f.Step("two", command(wait), 60)]
f.steps = steps
sys.exit(f.main(sys.argv[1:]))
"""


def kit(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", KILLED, *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_killed_midway_it_goes_on_from_there(tmp_path, sign):
    first, second = tmp_path / "first", tmp_path / "second"
    process = subprocess.Popen(kit("--dry", "--results", first), stdout=subprocess.DEVNULL)
    while not (waiting := [log for log in first.glob("*-two.log") if "waits" in log.read_text()]):
        time.sleep(0.1)
    step = int(waiting[0].read_text().split()[1])
    process.send_signal(sign)
    process.wait(20)
    if sign == signal.SIGTERM:
        assert not Path(f"/proc/{step}").exists()
    else:
        os.kill(step, signal.SIGKILL)
    assert [line["step"] for line in table(first)] == ["one"] and len(list(first.iterdir())) <= FILES
    for path in first.iterdir():
        path.chmod(0o444)
    done = subprocess.run(kit("--earlier", first, "--results", second), capture_output=True, text=True, check=True)
    assert "== one: done in an earlier call" in done.stdout and "left for another call: nothing" in done.stdout
    assert [line["step"] for line in table(second)] == ["one", "two"]
    assert logs(second).count("waits") == 2 and "said by one" in logs(second)


def test_what_is_left_is_named(tmp_path, monkeypatch, capsys):
    todo = [python("print('this')", "one"), python("", "two", seconds=10_000)]
    monkeypatch.setattr(first_contact, "steps", lambda *_: todo)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of the process, not of this test
    assert first_contact.main(["--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "== two: not begun" in said and said.endswith("left for another call: two\n")
    assert first_contact.main(["--results", str(tmp_path), "--steps", "one"]) == 0
    assert [line["step"] for line in table(tmp_path)] == ["one", "one"]
    with pytest.raises(SystemExit):
        first_contact.main(["--results", str(tmp_path), "--steps", "neither"])
    assert "no such step: neither" in capsys.readouterr().err


def test_an_interrupt_ends_the_step(tmp_path):
    said = []

    def interrupt():
        while not any(log.read_text() for log in tmp_path.glob("*.log")):
            time.sleep(0.1)
        said.extend(log.read_text().strip() for log in tmp_path.glob("*.log"))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run([python("import os, time; print(os.getpid(), flush=True); time.sleep(60)", seconds=90)], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said and not Path(f"/proc/{said[0]}").exists()


def test_programs_of_the_environment_are_found(tmp_path, monkeypatch):
    """Where Python is called by its path, without activating its environment."""
    monkeypatch.setattr(first_contact, "PYTHON", str(tmp_path / "bin/python"))
    (outcome,) = run([python("import os; print(os.environ['PATH'])")], tmp_path)
    assert outcome.note.startswith(str(tmp_path / "bin") + ":")


PEER = "import json, sys; print(json.dumps(sys.argv[2:]))"
RUNS_A_PEER = "from fastrl.benches import bench_train as b; print(b.run('a_peer', b.HERE, 'ppo', 1, None))"


@pytest.mark.slow
def test_steps_and_their_peers_see_the_packages_of_the_caller(tmp_path, monkeypatch):
    (tmp_path / "a_peer.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (outcome,) = run([python(RUNS_A_PEER, seconds=300)], tmp_path, budget=300)
    assert (outcome.status, outcome.note) == ("ok", "['ppo']")
    monkeypatch.delenv("PYTHONPATH")
    assert first_contact.python_path() == str(first_contact.ROOT)


def test_all_steps_fit_two_calls(tmp_path):
    steps = first_contact.steps(tmp_path, tmp_path, dry=False)
    names = [step.name for step in steps]
    assert names == [step.name for step in first_contact.steps(tmp_path, tmp_path, dry=True)]
    assert names == ["module", "smoke", "rows", "tests", "memcheck", "racecheck", "peers", "compiled", "demo"]
    first, second = first_contact.BUDGETS
    assert first + second <= 14 * MINUTE and max(first, second) <= 9 * MINUTE
    at_most = {step.name: step.seconds for step in steps}
    assert sum(at_most[name] for name in names[:4]) <= first
    assert sum(at_most[name] for name in names[4:]) <= second - 15  # the module is looked at again
    for step in steps:  # what ends by itself does so before it is ended
        if "--seconds" in step.command:
            assert float(step.command[step.command.index("--seconds") + 1]) <= step.seconds - 10


def test_the_guide_names_the_steps_and_the_calls(tmp_path):
    guide = (first_contact.ROOT / "benches/first_contact.md").read_text()
    for step in first_contact.steps(tmp_path, tmp_path, dry=False):
        assert f"`{step.name}`" in guide and f"| {step.seconds} s" in guide, step.name
    assert all(f"--budget {budget} " in guide for budget in first_contact.BUDGETS)


def test_the_sanitizers_watch_every_triton_kernel(tmp_path):
    from gpu.test_triton_aot import entry_points

    assert entry_points() <= set(first_contact.triton_kernels())
    for step in first_contact.steps(tmp_path, tmp_path, dry=False):
        if step.name in ("memcheck", "racecheck"):
            assert step.command[1:3] == ["--tool", step.name]
            watched = [word.removeprefix("kns=") for word in step.command if word.startswith("kns=")]
            assert watched == ["fastrl", *first_contact.triton_kernels()]


def test_no_test_takes_more_than_a_minute_of_a_gpu(monkeypatch):
    monkeypatch.setattr(first_contact, "find_spec", lambda name: object())
    command = " ".join(first_contact.pytest())
    assert "--timeout 60 --timeout-method thread" in command and "-p fastrl.benches.fresh_context" in command
    monkeypatch.setattr(first_contact, "find_spec", lambda name: None)
    assert first_contact.pytest() == first_contact.PYTEST


@pytest.mark.parametrize(
    "variable, value", [("CUDA_HOME", "."), ("CUDA_PATH", "."), ("CUDACXX", "bin/nvcc"), ("PATH", "bin")]
)
def test_the_sanitizer_is_found_like_nvcc(tmp_path, monkeypatch, variable, value):
    program = tmp_path / "bin/compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh")
    program.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv(variable, str(tmp_path / value))
    assert first_contact.cuda_tool("compute-sanitizer") == str(program)
    assert first_contact.cuda_tool("no-such-tool") == "no-such-tool"


@pytest.mark.parametrize("right, built, code", [([True], 0, 0), ([False, True], 1, 0), ([False, False], 1, 1)])
def test_a_module_is_built_where_none_runs(monkeypatch, right, built, code):
    answers, commands = iter(right), []
    monkeypatch.setattr(sys, "argv", ["first_contact_module"])
    monkeypatch.setattr(first_contact_module, "is_right", lambda options: next(answers))
    monkeypatch.setattr(first_contact_module, "architecture", lambda: "90a-real")
    monkeypatch.setattr(subprocess, "run", lambda command, env=None, cwd=None: commands.append((command, env)))
    assert first_contact_module.main() == code
    builds = [environment for command, environment in commands if "build_ext" in command]
    assert len(builds) == built
    for environment in builds:
        assert (environment["FASTRL_CUDA"], environment["FASTRL_CUDA_ARCHITECTURES"]) == ("on", "90a-real")
        assert "FASTRL_WERROR" not in environment


def test_every_op_goes_on_after_one_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(every_op, "SHAPES", every_op.SHAPES[:1])
    number = len(list(every_op.calls("cpu")))
    assert every_op.main("cpu") == 0
    assert capsys.readouterr().out.endswith(f"{number} calls, 0 of them wrong\n")
    found = iter(["raised", *[""] * number])
    monkeypatch.setattr(every_op, "problem", lambda call: next(found))
    assert every_op.main("cpu") == 1
    assert every_op.main("cpu", seconds=-1) == 0
    said = capsys.readouterr().out
    assert "wrong: raised" in said
    assert said.endswith(f"0 calls, 0 of them wrong; {number} more not made: out of time\n")


def test_every_op_sees_what_is_not_finite():
    call = next(iter(every_op.calls("cpu")))[0]
    assert every_op.problem(call) == ""
    assert "output 0 is not finite" in every_op.problem(
        call._replace(run=lambda **_: call.tensors["logits"] * float("nan"), leaves=())
    )
    assert every_op.problem(call._replace(run=lambda **_: 1 / 0)).startswith("ZeroDivisionError")
