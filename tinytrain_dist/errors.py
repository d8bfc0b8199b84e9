"""Define the exceptions for mistakes of the user and for problems of data, checkpoints and runs.

Must not import anything from the package. Every message has four parts: what is wrong, the expected and the actual
value, the setting, and what to do. Violated invariants of our own code use `assert` instead.
"""

from __future__ import annotations

from typing import Any


class TinytrainError(ValueError):
    """Base of all errors whose message is meant for the person who started the run."""


class ConfigError(TinytrainError):
    """One or more settings are wrong; the message lists every problem, one per line."""

    def __init__(self, problems: str | list[str], source: str = "the configuration") -> None:
        """Collect `problems` (one sentence each) found in `source` (a file name or a description)."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        plural = "s" if len(self.problems) > 1 else ""
        heading = f"{len(self.problems)} problem{plural} in {source}"
        super().__init__("\n".join([heading, *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other ranks receive the problems, and not the message as one problem with a heading of its own."""
        return _restored, (type(self), self.problems, self.source)


def _restored(kind: type[ConfigError], problems: list[str], source: str) -> ConfigError:
    """Return a ConfigError as it was before it was pickled; a subclass may take other arguments."""
    error = kind.__new__(kind)
    ConfigError.__init__(error, problems, source)
    return error


class RendezvousError(ConfigError):
    """This rank cannot reach the others. Only this rank can detect it, so this rank reports it."""


class DataError(TinytrainError):
    """A token file, tokenizer or text source cannot be used."""


class CheckpointError(TinytrainError):
    """A checkpoint is missing, incomplete, damaged, or does not belong to this run."""


class TrainingError(TinytrainError):
    """The run cannot continue, for example after several non-finite steps in a row or with too little memory."""


class DivergenceError(TrainingError):
    """Too many updates in a row were skipped; the trainer adds which checkpoint to return to."""


class ReplicaMismatchError(TrainingError):
    """Replicas that must have identical bits differ. The state of some ranks is wrong, so it is not saved."""
