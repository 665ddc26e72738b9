"""`pytest benches --benchmark-only`: every provider of every quick case, one pytest-benchmark test each."""

from fastrl.benches.harness import Run, rotation


def pytest_generate_tests(metafunc):
    if "run" in metafunc.fixturenames:
        pairs = [(case, name) for case in metafunc.module.cases("cpu", quick=True) for name in case.providers]
        ids = [f"{case.label} {name}".replace(" ", "-") for case, name in pairs]
        runs = [Run(case.providers[name], case.wrt, rotation(case, "cpu")) for case, name in pairs]
        metafunc.parametrize("run", runs, ids=ids)
