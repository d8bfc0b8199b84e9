"""Define the exceptions that a user can cause.

Must not know anything else of the package. Every message is a sentence with four parts: what is wrong, both values,
which setting, what to do. Violations of our own invariants use `assert`; these classes are for configuration, data,
checkpoints and training runs.
"""

from __future__ import annotations


class TinytrainError(ValueError):
    """Base of all errors whose message is meant for the person who started the run."""


class ConfigError(TinytrainError):
    """One or more settings are wrong; the message lists every problem, one per line."""

    def __init__(self, problems: str | list[str], source: str = "the configuration") -> None:
        """Collect `problems` (one sentence each) found in `source` (a file name or a description)."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} in {source}"
        super().__init__("\n".join([count, *(f"  {problem}" for problem in self.problems)]))


class RendezvousError(ConfigError):
    """This rank cannot reach the others. Only this rank can detect it, so this rank reports it."""


class DataError(TinytrainError):
    """A token file, tokenizer or text source cannot be used."""


class CheckpointError(TinytrainError):
    """A checkpoint is missing, incomplete, damaged, or does not belong to this run."""


class TrainingError(TinytrainError):
    """The run cannot continue: non-finite steps in a row, replicas that differ, too little memory."""


class DivergenceError(TrainingError):
    """Too many updates in a row were skipped; the trainer adds which checkpoint to return to."""


class ReplicaMismatchError(TrainingError):
    """Ranks that must hold the same bits do not: the state is wrong on some of them, and is not saved."""
