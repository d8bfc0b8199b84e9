"""What a process may do: the limit of open files."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tinytrain_dist.utils.processes import process_age, raise_open_file_limit


def test_the_limit_of_open_files_is_raised_and_inherited() -> None:
    program = """
        import resource, subprocess, sys
        from tinytrain_dist.utils.processes import process_age, raise_open_file_limit
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        hard = 900 if hard == resource.RLIM_INFINITY else min(hard, 900)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        raise_open_file_limit()
        child = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
        print(hard, subprocess.check_output([sys.executable, "-c", child], text=True))
    """
    hard, *limits = subprocess.check_output([sys.executable, "-c", textwrap.dedent(program)], text=True).split()
    assert limits == [hard, hard]


def test_a_system_that_refuses_the_limit_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_open_file_limit()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc shows when a process started, on Linux")
def test_the_age_of_a_process() -> None:
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        age, most = process_age(child.pid), time.monotonic() - before
        assert -0.02 <= age <= most + 0.02, "the kernel counts in hundredths of a second"
        assert process_age(os.getpid()) > age
    assert process_age(2**22 + 5) == math.inf
