"""Check the simulated timeline against small cases that are computed by hand."""

from __future__ import annotations

import pytest

from tinytrain_dist.training.timeline import Span, Task, Timeline, waiting


def run(*tasks: Task) -> tuple[list[Span], dict[str, float]]:
    timeline = Timeline()
    for task in tasks:
        timeline.add(task)
    spans = timeline.run()
    return spans, waiting(timeline, spans, "compute")


def compute(seconds: float, *after: int) -> Task:
    return Task("compute", "compute", seconds, after)


def send(seconds: float, *after: int, queue: str = "sending", latency: float = 0.0) -> Task:
    return Task("sent", queue, seconds, after, latency, link="wire")


def test_without_tasks_nothing_takes_time() -> None:
    assert run() == ([], {})


def test_communication_beside_computation_is_hidden() -> None:
    spans, waits = run(compute(1), send(2, 0), compute(3), compute(1, 1))
    assert [(span.start, span.end) for span in spans] == [(0, 1), (1, 3), (1, 4), (4, 5)]
    assert waits == {}


def test_what_is_not_hidden_is_waited_for() -> None:
    spans, waits = run(compute(1), send(5, 0), compute(3), compute(1, 1))
    assert spans[-1] == Span(6, 7)
    assert waits == {"sent": 2}


def test_without_overlap_all_times_add_up() -> None:
    spans, waits = run(compute(1), send(2, 0, latency=0.5), compute(3, 1), send(4, 2), compute(5, 3))
    assert spans[-1].end == 15.5
    assert waits == {"sent": 6.5}


def test_the_end_of_a_step_waits_for_what_is_still_sent() -> None:
    _, waits = run(compute(1), send(5, 0))
    assert waits == {"sent": 5}


def test_a_queue_runs_one_task_at_a_time_in_order() -> None:
    # the second message could start at once, but it stands behind the first, which waits for the computation
    spans, _ = run(compute(3), send(1, 0), send(1))
    assert [(span.start, span.end) for span in spans[1:]] == [(3, 4), (4, 5)]


def test_messages_in_two_queues_share_the_link() -> None:
    # both at half the speed until the short one has sent its 2, at 4; then the other sends its remaining 2
    spans, _ = run(send(2), send(4, queue="other"))
    assert [(span.start, span.end) for span in spans] == [(0, 4), (0, 6)]
    # a message that waits for its latency does not use the link yet
    spans, _ = run(send(2, latency=3), send(3, queue="other"))
    assert [(span.start, span.end) for span in spans] == [(0, 5), (0, 3)]


def test_computations_do_not_share() -> None:
    spans, _ = run(compute(2), Task("other", "other", 3))
    assert [span.end for span in spans] == [2, 3]


def test_a_task_waits_only_for_earlier_ones() -> None:
    with pytest.raises(AssertionError, match="waits for a later task"):
        Timeline().add(compute(1, 0))
