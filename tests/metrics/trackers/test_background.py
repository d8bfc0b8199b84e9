"""A tracker that raises, blocks or cannot start costs its points, and never the run."""

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.run_log import GROUPS, WORK, config_in, records, values
from tests.helpers.trackers import Blocking, Raising, Recorder, Unstartable
from tinytrain_dist.metrics import run_log, trackers
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.trackers import background
from tinytrain_dist.metrics.trackers.base import TrackedRun


@pytest.fixture
def open_log(tmp_path, monkeypatch):
    """Return a function that opens a run log with one tracker."""

    def open_with(tracker, step=0):
        monkeypatch.setattr(trackers, "create_tracker", lambda name: tracker() if callable(tracker) else tracker)
        return RunLog(dataclasses.replace(config_in(tmp_path), trackers=("tests:Own",)), True, step)

    return open_with


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]


def failures(folder):
    return [
        record["text"] for record in records(folder / "logs" / "metrics.jsonl") if record["kind"] == "tracker_failed"
    ]


def test_a_tracker_gets_all_points_in_order_in_its_own_thread(tmp_path, open_log, capsys):
    tracker = Recorder()
    log = open_log(tracker, 4)
    log.train(5, values(0.5), GROUPS, WORK)
    log.event(5, "saved", "x")
    log.flush()
    log.train(6, values(0.25), GROUPS, WORK)
    log.close("stopped")
    log.close("failed")
    assert tracker.calls == [
        ("start", tmp_path.name, 4), ("numbers", 5, 0.5), ("event", 5, "saved"), ("flush",), ("numbers", 6, 0.25),
        ("finish", "stopped"),
    ]  # fmt: skip
    assert tracker.threads == {"tracker tests:Own"}
    assert capsys.readouterr().out.splitlines().count("tracker tests:Own: a line") == 1
    assert failures(tmp_path) == []


def test_a_tracker_that_raises_is_reported_once_and_called_again(tmp_path, open_log, capsys):
    tracker = Raising()
    log = open_log(tracker)
    for step in (1, 2, 3, 4):
        log.train(step, values(1.0), GROUPS, WORK)
    log.event(4, "saved", "x")
    log.close()
    assert tracker.calls[1:] == [("event", 4, "saved"), ("finish", "finished")], "an error does not end the tracker"
    first, last = warnings(capsys)
    assert "tracker tests:Own: failed (SystemExit: 3); training continues" in first
    assert "points lost: 4" in last
    assert failures(tmp_path) == [first.removeprefix("WARNING: "), last.removeprefix("WARNING: ")]
    assert len([r for r in records(tmp_path / "logs" / "metrics.jsonl") if r["kind"] == "train"]) == 4


def test_a_tracker_that_cannot_start_is_left_out(tmp_path, open_log, capsys):
    tracker = Unstartable()
    log = open_log(tracker)
    log.wait_for_trackers()
    log.train(1, values(1.0), GROUPS, WORK)
    log.event(1, "saved", "x")
    log.close()
    assert tracker.calls == []
    first, last = warnings(capsys)
    assert "failed (ConnectionError: refused); training continues" in first
    assert "points lost: 3" in last, "a step is numbers and a histogram"
    assert len(failures(tmp_path)) == 2


def test_a_tracker_that_blocks_costs_what_does_not_fit_into_the_queue(tmp_path, open_log, capsys, monkeypatch):
    monkeypatch.setattr(background, "QUEUE_SIZE", 3)
    monkeypatch.setitem(background.FINISH_SECONDS, "finished", 0.05)
    tracker = Blocking()
    log = open_log(tracker)
    log.event(0, "resumed", "x")
    log.train(1, values(1.0), GROUPS, WORK)
    assert tracker.entered.wait(60)
    for step in range(2, 12):  # each would wait for ever if a step waited for the tracker
        log.event(step, "saved", "x")
    log.close()
    first, last = warnings(capsys)
    assert "is too slow: 3 points wait for it, so new ones are dropped; training continues" in first
    # 11 calls come after the one that blocks: a histogram and ten events. Three wait, and the others were dropped.
    assert "did not end in time; points that it may have lost: 12" in last
    assert len(failures(tmp_path)) == 2
    (sink,) = log._sinks
    tracker.released.set()
    assert sink.has_ended(time.monotonic() + 60)
    assert tracker.calls[-1] == ("finish", "finished")


def test_a_tracker_that_does_not_answer_is_reported_before_its_queue_is_full(tmp_path, open_log, capsys, monkeypatch):
    monkeypatch.setattr(background, "UNRESPONSIVE_SECONDS", 0.0)
    tracker = Blocking()
    log = open_log(tracker)
    log.wait_for_trackers()
    log.train(1, values(1.0), GROUPS, WORK)
    assert tracker.entered.wait(60)
    time.sleep(0.001)  # so that the clock moves on
    log.train(2, values(1.0), GROUPS, WORK)
    assert "has not answered for 0 s" in warnings(capsys)[0]
    tracker.released.set()
    log.close()
    assert [call for call in tracker.calls if call[0] == "numbers"] == [("numbers", 1, 1.0), ("numbers", 2, 1.0)]


def test_the_start_of_a_run_does_not_wait_for_a_tracker_without_limit(open_log, monkeypatch):
    monkeypatch.setattr(run_log, "START_SECONDS", 0.01)
    tracker = Blocking()
    tracker.start = lambda run: tracker.released.wait()
    log = open_log(tracker)
    log.wait_for_trackers()
    tracker.released.set()
    log.close()


def test_a_tracker_that_blocks_while_it_is_created_does_not_hold_the_run(open_log, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "START_SECONDS", 0.01)
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0.01)
    monkeypatch.setitem(background.FINISH_SECONDS, "finished", 0.05)
    released = threading.Event()
    log = open_log(lambda: released.wait() and Recorder())
    log.wait_for_trackers()
    log.train(1, values(1.0), GROUPS, WORK)
    log.close()
    released.set()
    *_, waits, lost = capsys.readouterr().out.splitlines()
    assert waits == "waiting up to 0.05 s for trackers to end: tests:Own"
    assert "did not end in time; points that it may have lost: 3" in lost


@pytest.mark.parametrize("has_own_folder", [True, False])
def test_a_tracker_that_changes_the_current_folder_does_not_change_that_of_the_run(
    has_own_folder, tmp_path, open_log, monkeypatch
):
    if has_own_folder and not own_folder_is_possible():
        pytest.skip("threads cannot have a current folder of their own here")
    if not has_own_folder:  # as in a container that forbids it
        monkeypatch.setattr(background, "have_own_current_folder", lambda: False)
    monkeypatch.chdir(tmp_path)
    tracker = Recorder()
    tracker.start = lambda run: os.chdir("/")
    log = open_log(tracker)
    log.wait_for_trackers()
    assert Path.cwd() == tmp_path
    log.close()


def own_folder_is_possible() -> bool:
    found = []
    thread = threading.Thread(target=lambda: found.append(background.have_own_current_folder()))
    thread.start()
    thread.join()
    return found[0]


def test_nothing_is_printed_after_an_error(open_log, capsys):
    log = open_log(Raising())
    log.wait_for_trackers()
    log.train(2, values(1.0), GROUPS, WORK)
    capsys.readouterr()
    log.close("failed")
    assert capsys.readouterr().out == ""


def test_a_full_disk_does_not_keep_points_from_a_tracker(open_log):
    def fail(*_):
        raise OSError(28, "No space left on device")

    tracker = Recorder()
    log = open_log(tracker)
    log._file.close()
    log._file = type("Full", (), {"write": fail, "close": fail})()
    log.train(1, values(1.0), GROUPS, WORK)
    log.close()
    assert ("numbers", 1, 1.0) in tracker.calls


def test_a_tracker_may_become_idle_while_it_is_examined(tmp_path):
    class Sink(background.BackgroundSink):
        reads = 0

        @property
        def _busy_since(self):
            self.reads += 1
            return 0.0 if self.reads == 1 else None  # None from the second time on

        @_busy_since.setter
        def _busy_since(self, value):
            pass

    tracker = Recorder()
    sink = Sink("own", lambda: tracker, TrackedRun("run", tmp_path, tmp_path, {}, "", 0, False))
    sink.send(lambda tracker: tracker.flush())
    sink.end("finished")
    assert sink.has_ended(time.monotonic() + 60)
    assert tracker.calls[1:] == [("flush",), ("finish", "finished")]
