"""Check the phase timer with a clock that a test moves, and the names of the phases."""

from tests.helpers.clock import Clock
from tinytrain_dist.metrics.phase_timer import PHASE_ORDER, START_PHASES, STEP_PHASES, PhaseTimer, start_seconds


def test_each_phase_has_its_seconds_and_taking_them_begins_again():
    clock = Clock()
    timer = PhaseTimer("join", clock=clock)
    clock.now += 2.0
    timer.enter("data", 0)
    clock.now += 1.0
    timer.enter("optimizer")
    clock.now += 4.0
    timer.enter("data", 1)
    clock.now += 8.0
    assert timer.take() == {"join": 2.0, "data": 9.0, "optimizer": 4.0}
    assert (timer.phase, timer.step, timer.since) == ("data", 1, clock.now)
    clock.now += 0.5
    assert timer.take() == {"data": 0.5}


def test_a_follower_is_called_with_each_phase_and_the_completed_steps():
    timer = PhaseTimer()
    told = []
    timer.follower = lambda phase, step: told.append((phase, step))
    timer.enter("data", 3)
    timer.enter("optimizer")
    assert told == [("data", 3), ("optimizer", 3)]


def test_the_records_and_the_watchdog_know_the_same_phases():
    assert sorted([*START_PHASES, *STEP_PHASES]) == sorted(PHASE_ORDER)
    assert len(set(PHASE_ORDER)) == len(PHASE_ORDER)
    # the step is counted after the optimizer, so a rank in `data` is further than one in `checkpoint` of the same step
    assert PHASE_ORDER.index("reading") < PHASE_ORDER.index("checkpoint") < PHASE_ORDER.index("data")


def test_the_parts_of_a_start_add_up_to_all_phases_before_the_end_of_the_first_step():
    clock = Clock()
    timer = PhaseTimer("join", clock=clock, earlier={"launch": 3.0, "imports": 2.0})
    for phase, seconds in (("build", 1.0), ("data", 4.0), ("forward_backward", 0.5), ("reading", 8.0)):
        clock.now += seconds
        timer.enter(phase)
    parts = start_seconds(timer.take())
    assert parts == {"launch": 3.0, "imports": 2.0, "join": 1.0, "build": 4.0, "first_step": 8.5}
    clock.now += 1.0
    assert start_seconds(timer.take()) == {"first_step": 1.0}, "the earlier phases are taken once"
