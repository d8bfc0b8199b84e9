"""Check that JSON is strict when written, and that reading it fails in one way only."""

from __future__ import annotations

import json
import math

import pytest

from tinytrain_dist.utils.json_files import (
    is_file_name,
    is_whole_number,
    nulls_to_nan,
    parse_json,
    parse_nonfinite,
    read_json_dict,
    spell_nonfinite,
    to_json,
)


def test_finite_values_have_the_bytes_of_python_and_others_become_null():
    value = {"b": [1, 0.1, 1e-320, None, True], "a": {"x": "ü\u2028"}}
    for options in ({}, {"indent": 1}, {"sort_keys": True}, {"separators": (",", ":")}):
        assert to_json(value, **options) == json.dumps(value, **options)
    assert to_json({"a": [math.nan, (math.inf, 1)], "b": -math.inf}) == '{"a": [null, [null, 1]], "b": null}'


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 500 + "]" * 500, "", "{", b"\xff\xfe", b'"\xed\xa0\x80"', "1" * 5000, b"\x80"]
)
def test_every_text_that_is_no_json_or_too_deep_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_tokens_of_older_versions_and_marks_are_read(tmp_path):
    assert parse_json("[NaN, Infinity]")[1] == math.inf
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"x": 1}')
    assert read_json_dict(tmp_path / "a") == {"x": 1}
    (tmp_path / "a").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list instead of an object"):
        read_json_dict(tmp_path / "a")


def test_numbers_that_are_not_finite_come_back():
    found = nulls_to_nan(json.loads(to_json({"a": [math.inf, 1], "b": {"c": math.nan}, "d": "null"})))
    assert math.isnan(found["a"][0])
    assert math.isnan(found["b"]["c"])
    assert (found["a"][1], found["d"]) == (1, "null")
    exact = {"a": [math.inf, -math.inf, 0.5], "b": "text"}
    assert parse_nonfinite(json.loads(to_json(spell_nonfinite(exact)))) == exact


def test_what_counts_as_a_whole_number_and_as_a_file_name():
    assert [is_whole_number(value) for value in (0, 2**63 - 1, 2**63, -1, True, 1.0, "1")] == [True, True, *[False] * 5]
    names = ["a b", "ü", "..", "", "a/b", "a\0", "\ud800", "x" * 256, 3]
    assert [is_file_name(name) for name in names] == [True, True, *[False] * 7]
