"""Check how plain values become values of a declared type, how types are described, and how values become TOML."""

import tomllib
from pathlib import Path
from typing import Literal

import pytest

from tinytrain_dist.config.type_conversion import convert_value, describe_type, is_optional, to_toml_value


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (str, Path("a/b"), "a/b"),
        (bool | None, None, None),
        (int | Literal["auto"] | None, "auto", "auto"),
        (tuple[float, float], [1, 0.5], (1.0, 0.5)),
        (tuple[str, ...], ["a", "b", "c"], ("a", "b", "c")),
        (tuple[str, ...], [], ()),
    ],
)
def test_values_that_fit_are_converted(hint, value, expected):
    converted = convert_value(hint, value)
    assert (converted, type(converted)) == (expected, type(expected))
    if isinstance(expected, tuple):
        assert [type(item) for item in converted] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, 3.0),
        (float, False),
        (bool, 1),
        (int, None),
        (Literal["a", "b"], "c"),
        (tuple[float, float], [1.0]),
        (tuple[str, ...] | None, []),
        (str | None, 3),
    ],
)
def test_values_that_do_not_fit_are_refused_with_the_type_in_words(hint, value):
    with pytest.raises(TypeError) as caught:
        convert_value(hint, value)
    assert str(caught.value) == f"{value!r} is not {describe_type(hint)}"


def test_types_in_words():
    assert describe_type(int | Literal["auto"] | None) == "a whole number or auto or None"
    assert describe_type(tuple[float, float]) == "two numbers"
    assert describe_type(tuple[str, ...]) == "a list of strings"
    assert [is_optional(hint) for hint in (int, int | None)] == [False, True]


@pytest.mark.parametrize("value", ["a\x7fb", 'quote " and \\', "\U0001f600", 1, 0.1, True, [1, 2.5], ["a"]])
def test_toml_reads_what_was_written(value):
    assert tomllib.loads(f"key = {to_toml_value(value)}") == {"key": value}
