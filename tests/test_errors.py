"""Check the messages of the package's exceptions."""

from tinytrain_dist.errors import ConfigError


def test_one_problem_is_written_in_the_singular():
    assert str(ConfigError("a: b", "c")) == "1 problem in c\n  a: b"
