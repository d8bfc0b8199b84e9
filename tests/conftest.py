"""Fixtures and settings of all tests: one thread per process, repeatable examples and names, text runs.

With TINYTRAIN_REQUIRE_MULTIPROCESS=1 (or TINYTRAIN_REQUIRE_SLURM=1) the session fails if no test with that marker ran,
or one was skipped. Without them, success would say nothing about training on many processes.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch is imported, which reads it once

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

REQUIRED = {"multiprocess": "TINYTRAIN_REQUIRE_MULTIPROCESS", "slurm": "TINYTRAIN_REQUIRE_SLURM"}
ran: dict[str, list[str]] = {marker: [] for marker in REQUIRED}
skipped: dict[str, list[str]] = {marker: [] for marker in REQUIRED}


@pytest.fixture(scope="session")
def text_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs over the same byte-level text: `one`, `split` (many small files) and `other` (another lr)."""
    from tests.helpers.tools import make_text_runs  # imported here, because most tests need no run

    return make_text_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def text_checkpoint(text_runs: Path) -> Path:
    """The newest checkpoint of the run `one`; not to be changed."""
    from tests.helpers.tools import newest

    return newest(text_runs / "one")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name parameters of type bytes after their argument: compressed bytes contain the time, and names must repeat.

    The processes of pytest-xdist compare the names of the tests that they collected, and stop if one differs.
    """
    return argname if isinstance(val, bytes) else None


LONGEST_FIRST = ("slurm", "multiprocess", "slow")  # a file of the first of these markers takes minutes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the processes of pytest-xdist begin with the longest files, or one of them would run such a file alone."""
    if hasattr(config, "workerinput"):
        length: dict[Path, tuple[int, int]] = {}  # of a file: its first marker, and the number of its tests
        for item in items:
            markers = [number for number, name in enumerate(LONGEST_FIRST) if item.get_closest_marker(name)]
            marker, tests = length.get(item.path, (len(LONGEST_FIRST), 0))
            length[item.path] = min([marker, *markers]), tests - 1
        items.sort(key=lambda item: length[item.path])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for marker in REQUIRED:
        if marker in report.keywords:
            if report.skipped and not hasattr(report, "wasxfail"):
                skipped[marker].append(report.nodeid)
            elif report.when == "call":
                ran[marker].append(report.nodeid)


def unmet_requirements() -> list[str]:
    """Return a sentence for each required marker whose tests did not all run."""
    problems = []
    for marker, variable in REQUIRED.items():
        if os.environ.get(variable, "0") in ("", "0"):
            continue
        if not ran[marker]:
            problems.append(f"{variable} is set, but no test marked '{marker}' ran: select them, or unset {variable}.")
        if skipped[marker]:
            names = ", ".join(skipped[marker])
            problems.append(
                f"{variable} is set, but {len(skipped[marker])} test(s) marked '{marker}' were skipped: {names}."
            )
    return problems


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a process of pytest-xdist, which ran only some of the tests
        return
    if unmet_requirements() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for problem in unmet_requirements():
        terminalreporter.write_line(f"FAILED {problem}", red=True)
