"""Make configurations in tests, and collect the sentences with which settings are refused."""

from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError


def problems_of(**values: object) -> list[str]:
    """Return the error sentences for these settings; [] if they are accepted."""
    try:
        TrainingConfig.from_dict(values)
    except ConfigError as error:
        return error.problems
    return []


def only_problem(**values: object) -> str:
    problems = problems_of(**values)
    assert len(problems) == 1, problems
    return problems[0]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
