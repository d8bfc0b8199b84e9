"""Check when a wait is reported, and in which words."""

from __future__ import annotations

from tinytrain_dist.utils.waiting import WaitNotice


def test_a_wait_is_mentioned_after_five_seconds_and_then_once_a_minute() -> None:
    now = 100.0
    missing, said = ["a", "b"], list[str]()
    notice = WaitNotice(lambda: " and ".join(missing), 600.0, said.append, lambda: now)
    for second in range(130):
        now = 100.0 + second
        if second == 60:
            missing.pop()
        notice.check()
    assert said == [
        "waiting for a and b (for 5 s so far, 595 s more at most)",
        "waiting for a (for 65 s so far, 535 s more at most)",
        "waiting for a (for 125 s so far, 475 s more at most)",
    ]
    assert notice.seconds == 129.0
