"""Check how ranges of steps are read, joined, cut and written."""

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.step_ranges import format_step_ranges, parse_step_ranges, up_to


def test_ranges_are_sorted_and_joined():
    assert parse_step_ranges(None) == ()
    assert parse_step_ranges("20:21, 3:5,6:6,4:5") == (range(3, 7), range(20, 22))
    assert format_step_ranges(parse_step_ranges("20:21,3:5,6:6")) == "3:6,20:21"
    assert format_step_ranges(()) == ""


def test_ranges_are_cut_after_a_step():
    ranges = parse_step_ranges("3:6,20:21")
    assert [format_step_ranges(up_to(ranges, step)) for step in (2, 3, 6, 19, 20, 99)] == [
        "", "3:3", "3:6", "3:6", "3:6,20:20", "3:6,20:21",
    ]  # fmt: skip


def test_a_configuration_has_its_ranges():
    assert TrainingConfig(skip_steps="7:8,2:3").left_out_steps == (range(2, 4), range(7, 9))
    assert TrainingConfig().left_out_steps == ()
