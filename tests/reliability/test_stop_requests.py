"""Owns the checks of the wish to stop: signals, the stop file and the deadline only ever raise a flag.

Must not know the loop that obeys. Clocks are put in, signals are sent to this process, handlers are restored.
"""

import json
import os
import signal

import pytest

from tinytrain_dist.reliability import run_state, stop_requests

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop_requests.install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop_requests._received.clear()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stop_requests, "time", clock)
    return clock


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_raises_the_flag(handlers, tmp_path, number):
    requests = stop_requests.StopRequests(tmp_path, None, look_at_file=True)
    assert requests.reason() == ""
    os.kill(os.getpid(), number)
    assert requests.reason() == signal.Signals(number).name
    assert requests.reason() == signal.Signals(number).name


def test_the_first_signal_is_the_one_that_is_obeyed(handlers, tmp_path):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requests.StopRequests(tmp_path, None, look_at_file=False).reason() == "SIGUSR1"


def test_a_signal_before_the_run_is_not_forgotten(handlers, tmp_path):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requests.StopRequests(tmp_path, 100.0, look_at_file=True).reason() == "SIGTERM"


def test_the_stop_file_is_seen_and_named(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, None, look_at_file=True)
    assert requests.reason() == ""
    (tmp_path / "stop").touch()
    clock.now += 1.5
    assert requests.reason() == f"stop file {tmp_path / 'stop'}"


def test_the_stop_file_is_looked_at_once_a_second(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, None, look_at_file=True)
    requests.reason()
    (tmp_path / "stop").touch()
    clock.now += 0.5
    assert requests.reason() == ""
    clock.now += 0.6
    assert requests.reason() != ""


def test_only_one_rank_looks_at_the_file(clock, tmp_path):
    (tmp_path / "stop").touch()
    assert stop_requests.StopRequests(tmp_path, None, look_at_file=False).reason() == ""
    assert stop_requests.StopRequests(tmp_path, None, look_at_file=True).reason() != ""


def test_the_deadline(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, 60.0, look_at_file=False)
    clock.now += 60.0
    assert requests.reason() == ""
    clock.now += 0.1
    assert requests.reason() == "time_limit"


def test_what_a_save_takes_is_kept_before_the_deadline(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, 60.0, look_at_file=False)
    clock.now += 50.0
    assert requests.reason(reserve_seconds=9.0) == ""
    assert requests.reason(reserve_seconds=11.0) == "time_limit"


def test_without_a_limit_there_is_no_deadline(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, None, look_at_file=False)
    clock.now += 1e9
    assert requests.reason(reserve_seconds=1e9) == ""


# --- how the run ended ---------------------------------------------------------------------------------------------


def test_the_state_is_written_whole_and_over_the_last_one(tmp_path, monkeypatch):
    monkeypatch.delenv("TINYTRAIN_ATTEMPT", raising=False)
    run_state.write_state(tmp_path, "running", None)
    run_state.write_state(tmp_path, "preempted", 7)
    assert json.loads((tmp_path / "state.json").read_text()) == {"state": "preempted", "step": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_state_names_the_attempt_and_where_it_began(tmp_path, monkeypatch):
    def written(state, step, reason=""):
        run_state.write_state(tmp_path, state, step, reason)
        return json.loads((tmp_path / "state.json").read_text())

    monkeypatch.setenv("TINYTRAIN_ATTEMPT", "3.0")
    assert written("running", 4) == {"state": "running", "step": 4, "attempt": "3.0", "first_step": 4}
    assert written("running", 6)["first_step"] == 4, "a restart in place goes on with the attempt"
    assert written("preempted", 9, "SIGTERM") == {
        "state": "preempted", "step": 9, "reason": "SIGTERM", "attempt": "3.0", "first_step": 4
    }  # fmt: skip
    monkeypatch.setenv("TINYTRAIN_ATTEMPT", "3.1")
    assert written("running", 9)["first_step"] == 9
    (tmp_path / "state.json").write_text("[]")
    assert written("failed", None) == {"state": "failed", "step": None, "attempt": "3.1", "first_step": None}


def test_a_run_that_another_process_has_taken_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "_owned", {})
    taken = []
    assert not run_state.owns_run(tmp_path)
    assert not run_state.lost_run(tmp_path)
    run_state.claim_run(tmp_path, lambda: bool(taken))
    assert run_state.owns_run(tmp_path)
    assert not run_state.lost_run(tmp_path)
    taken.append(1)
    assert not run_state.owns_run(tmp_path)
    assert run_state.lost_run(tmp_path)


def test_the_end_of_the_allocation_is_a_deadline(clock, tmp_path, monkeypatch):
    clock.time = lambda: clock.now + 5000.0
    monkeypatch.setenv("TINYTRAIN_DEADLINE", str(clock.time() + 60))
    for limit, seconds in ((None, 60.0), (100.0, 60.0), (20.0, 20.0)):
        clock.now = 1000.0
        requests = stop_requests.StopRequests(tmp_path, limit, look_at_file=False)
        clock.now += seconds
        assert requests.reason() == ""
        clock.now += 0.1
        assert requests.reason() == "time_limit"
