"""Check the formats of lists, durations, sizes and ages."""

import pytest

from tinytrain_dist.utils.text import format_age, format_bytes, format_duration, format_list


def test_a_long_list_is_cut_and_marked():
    assert format_list([1, 2, 3]) == "1, 2, 3"
    assert format_list(list(range(1, 20)), limit=3) == "1, 2, 3, ..."


def test_durations():
    assert [format_duration(s) for s in (-5, 0, 59.9, 61, 36_000)] == [
        "0:00:00", "0:00:00", "0:00:59", "0:01:01", "10:00:00",
    ]  # fmt: skip


def test_sizes():
    assert [format_bytes(n) for n in (0, 999, 1000, 1.5e6, 2e9, 3.25e12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.5 MB", "2.0 GB", "3.2 TB",
    ]  # fmt: skip


def test_ages():
    assert [format_age(s) for s in (-3, 119, 120, 7199, 7200, 172_799, 172_800)] == [
        "0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 days",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (60, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00"), (-5, "0:00:00")],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text
