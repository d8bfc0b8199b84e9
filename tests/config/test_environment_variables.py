"""Compare the table of environment variables with their use in the repository."""

import re
from pathlib import Path

import pytest

from tinytrain_dist.config.environment_variables import VARIABLES, EnvironmentVariable

ROOT = Path(__file__).resolve().parents[2]
TABLE = "tinytrain_dist/config/environment_variables.py"
FOLDERS = (".ci", "benchmarks", "configs", "launch", "slurm", "tests", "tinytrain_dist")
THIS_TEST = "tests/config/" + Path(__file__).name


def repository_files() -> dict[str, str]:
    """The text of every file of the project's code by path, this test and the table left out."""
    texts = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT))
            if path.is_file() and "__pycache__" not in name and name not in (TABLE, THIS_TEST):
                try:
                    texts[name] = path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
    return texts


FILES = repository_files()
USED = {name for text in FILES.values() for name in re.findall(r"\bTINYTRAIN_[A-Z_]+[A-Z]\b", text)}
LISTED = {variable.name for variable in VARIABLES}


def test_every_variable_that_is_used_is_listed():
    assert len(USED) >= 8  # otherwise the search found no files
    assert not USED - LISTED, f"add {USED - LISTED} to {TABLE}: what it means, who sets it, who reads it"


def test_every_variable_that_is_listed_is_used():
    unused = {name for name in LISTED if not any(re.search(rf"\b{name}\b", text) for text in FILES.values())}
    assert not unused, f"no file uses {unused}; remove it from {TABLE}"


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_the_files_that_set_or_read_a_variable_name_it(variable: EnvironmentVariable):
    for place in {*variable.set_by, *variable.read_by} - {"user"}:
        assert re.search(rf"\b{variable.name}\b", FILES[place]), (
            f"{place} does not name {variable.name}; update {TABLE}"
        )


def test_every_variable_is_described_and_listed_once():
    assert len(LISTED) == len(VARIABLES)
    assert all(variable.meaning.endswith(".") and variable.set_by and variable.read_by for variable in VARIABLES)


def test_programs_read_no_variable_of_ours_that_the_table_assigns_to_others():
    readers = {variable.name: {*variable.read_by, *variable.set_by} for variable in VARIABLES}
    for path, text in FILES.items():
        if path.startswith(("tinytrain_dist/", "launch/", "slurm/")):
            for name in re.findall(r"environ(?:\.get)?[\[(]\s*\"(TINYTRAIN_\w+)\"", text):
                assert path in readers[name], f"{path} uses {name}, which {TABLE} does not say"
