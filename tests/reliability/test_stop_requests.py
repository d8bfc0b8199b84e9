"""Check that signals, the stop file and the deadline only set a flag.

Must not know the loop that stops. A test moves the clock, signals are sent to this process, handlers are restored.
"""

import os
import signal

import pytest

from tinytrain_dist.reliability import stop_requests

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def handlers():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}  # none is ignored, also under nohup
    stop_requests.install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop_requests._received_signals.clear()


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
    requests = stop_requests.StopRequests(tmp_path, None, check_file=True)
    assert requests.reason() == ""
    os.kill(os.getpid(), number)
    assert requests.reason() == signal.Signals(number).name
    assert requests.reason() == signal.Signals(number).name


def test_an_ignored_signal_stays_ignored_except_our_own(handlers):
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    stop_requests.install_signal_handlers()
    with stop_requests.exit_on_stop_signals():
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    assert stop_requests._received_signals == ["SIGUSR1"]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_verb_exits_through_an_exception_and_handlers_are_restored(handlers, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exited, stop_requests.exit_on_stop_signals():
        os.kill(os.getpid(), number)
    assert exited.value.code == 128 + number
    assert signal.getsignal(number) == before


def test_the_first_signal_is_the_one_that_is_obeyed(handlers, tmp_path):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requests.StopRequests(tmp_path, None, check_file=False).reason() == "SIGUSR1"


def test_a_signal_before_the_run_is_not_forgotten(handlers, tmp_path):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requests.StopRequests(tmp_path, 100.0, check_file=True).reason() == "SIGTERM"


def test_the_stop_file_is_seen_and_named(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, None, check_file=True)
    assert requests.reason() == ""
    (tmp_path / "stop").touch()
    clock.now += 1.5
    assert requests.reason() == f"stop file {tmp_path / 'stop'}"


def test_the_stop_file_is_checked_once_a_second(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, None, check_file=True)
    requests.reason()
    (tmp_path / "stop").touch()
    clock.now += 0.5
    assert requests.reason() == ""
    clock.now += 0.6
    assert requests.reason() != ""


def test_only_one_rank_looks_at_the_file(clock, tmp_path):
    (tmp_path / "stop").touch()
    assert stop_requests.StopRequests(tmp_path, None, check_file=False).reason() == ""
    assert stop_requests.StopRequests(tmp_path, None, check_file=True).reason() != ""


def test_the_deadline(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, 60.0, check_file=False)
    clock.now += 60.0
    assert requests.reason() == ""
    clock.now += 0.1
    assert requests.reason() == "time_limit"


def test_what_a_save_takes_is_kept_before_the_deadline(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, 60.0, check_file=False)
    clock.now += 50.0
    assert requests.reason(reserve_seconds=9.0) == ""
    assert requests.reason(reserve_seconds=11.0) == "time_limit"


def test_without_a_limit_there_is_no_deadline(clock, tmp_path):
    requests = stop_requests.StopRequests(tmp_path, None, check_file=False)
    clock.now += 1e9
    assert requests.reason(reserve_seconds=1e9) == ""


def test_the_end_of_the_allocation_is_a_deadline(clock, tmp_path, monkeypatch):
    clock.time = lambda: clock.now + 5000.0
    monkeypatch.setenv("TINYTRAIN_DEADLINE", str(clock.time() + 60))
    for limit, seconds in ((None, 60.0), (100.0, 60.0), (20.0, 20.0)):
        clock.now = 1000.0
        requests = stop_requests.StopRequests(tmp_path, limit, check_file=False)
        clock.now += seconds
        assert requests.reason() == ""
        clock.now += 0.1
        assert requests.reason() == "time_limit"


def test_clearing_removes_the_stop_file_on_the_rank_that_checks_it(tmp_path):
    (tmp_path / "stop").touch()
    stop_requests.StopRequests(tmp_path, None, check_file=False).clear()
    assert (tmp_path / "stop").exists()
    stop_requests.StopRequests(tmp_path, None, check_file=True).clear()
    stop_requests.StopRequests(tmp_path, None, check_file=True).clear()  # there is none any more
    assert not (tmp_path / "stop").exists()
