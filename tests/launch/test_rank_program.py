"""The program of one rank: what it reports after an error, and its exit code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.ranks import AGENT, launch_training
from tinytrain_dist.errors import ConfigError, DataError, DivergenceError, ReplicaMismatchError, TrainingError
from tinytrain_dist.launch import rank_program


@pytest.mark.multiprocess
def test_a_users_mistake_is_reported_once_and_last(tmp_path: Path) -> None:
    done = launch_training(["--train-data", "x.npy", "--vocab-size", "9"], 2, tmp_path, launcher=AGENT)
    assert done.returncode == 2
    assert done.stdout.count("x.npy: no such token file") == 1
    assert done.stdout.rstrip().splitlines()[-1].startswith("error: x.npy")
    assert "Traceback" not in done.stdout


def failure_of(error: Exception, phase: str) -> rank_program.Failure:
    watchdog: Any = SimpleNamespace(phase_timer=SimpleNamespace(phase=phase, step=7))
    try:
        raise error
    except Exception as raised:
        return rank_program._describe(watchdog, raised)


@pytest.mark.parametrize(
    ("error", "phase", "user_mistake", "caused_by_peer", "step"),
    [
        (ConfigError("seed: wrong"), "build", True, False, None),
        (DataError("x.npy: no such token file"), "open_data", True, False, None),
        (DataError("x.npy: has become shorter"), "data", False, False, 7),
        (RuntimeError("[gloo] Connection closed by peer"), "reduction", False, True, 7),
        (RuntimeError("a bug"), "build", False, False, None),
    ],
)
def test_what_an_error_means(error: Exception, phase: str, user_mistake: bool, caused_by_peer: bool, step: Any) -> None:
    failure = failure_of(error, phase)
    assert (failure.user_mistake, failure.caused_by_peer, failure.step) == (user_mistake, caused_by_peer, step)
    assert failure.message.startswith("rank 0 on ") != user_mistake
    assert (", after step 7: " in failure.message) == (step is not None)
    assert ("Traceback" in failure.trace) == isinstance(error, RuntimeError)


@pytest.mark.parametrize(
    ("error", "phase", "may_retry"),
    [
        (ConfigError("seed: wrong"), "build", False),
        (ReplicaMismatchError("replicas differ"), "build", True),
        (TrainingError("records cannot be written"), "data", True),
        (DivergenceError("3 updates in a row were skipped"), "data", False),
    ],
)
def test_which_errors_a_restart_may_help_against(error: Exception, phase: str, may_retry: bool) -> None:
    assert failure_of(error, phase).may_retry == may_retry
