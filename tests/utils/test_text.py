"""Check the formats of lists, durations, sizes and ages."""

from tinytrain_dist.utils.text import format_list


def test_a_long_list_is_cut_and_marked():
    assert format_list([1, 2, 3]) == "1, 2, 3"
    assert format_list(list(range(1, 20)), limit=3) == "1, 2, 3, ..."
