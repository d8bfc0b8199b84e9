"""Check the clocks of a run with a clock that a test moves."""

import time

import pytest
import torch

from tests.helpers.clock import Clock
from tinytrain_dist.metrics.step_timer import ForwardTimer, HostCopy, StepTimer


def test_a_lap_is_a_duration_and_not_a_clock_reading():
    clock = Clock()
    watch = StepTimer(clock)
    assert watch.lap(103.0) == 3.0
    assert watch.lap(103.5) == 0.5
    assert watch.lap(103.5) == 0.0


def test_a_lap_ends_when_the_step_ended_and_not_when_it_is_asked_for():
    clock = Clock()
    watch = StepTimer(clock)
    clock.now += 50.0  # the numbers of a step are read while the next one runs
    assert watch.lap(103.0) == 3.0
    assert watch.lap(150.0) == 47.0


def test_pauses_are_left_out_of_their_lap_only():
    clock = Clock()
    watch = StepTimer(clock)
    clock.now += 1.0
    with watch.paused():
        clock.now += 10.0
    with watch.paused():
        clock.now += 5.0
    clock.now += 1.0
    assert watch.lap(clock.now) == 2.0
    clock.now += 4.0
    assert watch.lap(clock.now) == 4.0


def test_a_pause_that_ends_with_an_error_is_left_out_too():
    clock = Clock()
    watch = StepTimer(clock)

    def fail() -> None:
        with watch.paused():
            clock.now += 10.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 1.0
    assert watch.lap(clock.now) == 1.0


def test_a_host_copy_of_cpu_values():
    clock = Clock()
    copy = HostCopy(torch.tensor([1.5, 2.5], requires_grad=True), clock)
    clock.now += 5.0
    assert copy.read() == [1.5, 2.5]
    assert copy.ready_at == 100.0  # the values are those at the time of the copy, even if they are read later


def test_work_is_timed_inside_the_modules_only(monkeypatch):
    inner, outer_only = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    work = ForwardTimer([inner], cuda=False)
    inner.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 2.0))
    outer_only.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 50.0))
    for _ in range(3):
        outer_only(inner(torch.ones(1, 2)))
    assert work.seconds(work.take()) == 6.0
    assert work.take() == []
