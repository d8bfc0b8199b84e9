"""Check the messages of the package's exceptions."""

import pickle

from tinytrain_dist.cli.arguments import UsageError
from tinytrain_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RendezvousError,
    ReplicaMismatchError,
    TinytrainError,
    TrainingError,
)


def test_one_problem_is_written_in_the_singular():
    assert str(ConfigError("a: b", "c")) == "1 problem in c\n  a: b"


def test_several_problems_are_counted_and_listed_one_per_line():
    error = ConfigError(["a: b", "c: d"], "my.toml")
    assert str(error) == "2 problems in my.toml\n  a: b\n  c: d"
    assert (error.problems, error.source) == (["a: b", "c: d"], "my.toml")


def test_an_error_that_another_rank_received_has_the_same_message():
    for error in (ConfigError(["a: b", "c: d"], "my.toml"), RendezvousError("a: b"), UsageError("a: b", "plan")):
        received = pickle.loads(pickle.dumps(error))
        assert (type(received), str(received)) == (type(error), str(error))
        assert received.problems == error.problems


def test_every_error_is_one_that_programs_report_as_a_user_mistake():
    classes = [ConfigError, RendezvousError, DataError, CheckpointError, TrainingError, ReplicaMismatchError]
    assert all(issubclass(kind, TinytrainError) for kind in classes)
    assert issubclass(TinytrainError, ValueError)
    assert issubclass(RendezvousError, ConfigError)
    assert issubclass(ReplicaMismatchError, TrainingError)
