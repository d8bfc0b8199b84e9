"""The `tinytrain` command: verbs, mistakes, a reader that closes the pipe, and errors of the system."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.tools import Cli
from tinytrain_dist.cli import ls, main


def test_every_verb_has_an_entry() -> None:
    for verb in main.VERBS.values():
        module = import_module(verb.module_name())
        assert callable(module.main)
        assert callable(getattr(module, verb.arguments))


def test_an_unknown_verb_gets_the_nearest(tinytrain: Cli) -> None:
    code, _, err = tinytrain("verfy")
    assert code == 2
    assert "did you mean verify?" in err


@pytest.mark.parametrize("verb", ["ls", "verify", "hash", "sample", "plot", "report"])
def test_a_folder_without_a_run_is_an_error(tinytrain: Cli, tmp_path: Path, verb: str) -> None:
    missing = tmp_path / "nothing-here"
    code, out, err = tinytrain(verb, missing)
    assert (code, out) == (2, "")
    assert f"error: {missing}: is not a folder; give a run" in err
    code, _, err = tinytrain(verb, tmp_path)
    assert code == 2
    assert "contains neither a run nor a checkpoint" in err


def test_a_reader_that_closes_the_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(ls, "main", broken)
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main.main(["ls"]) == 141


def test_errors_of_the_system_are_reported_without_a_traceback(tinytrain: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "runs")

    monkeypatch.setattr(ls, "main", refused)
    assert tinytrain("ls") == (1, "", "error: [Errno 13] Permission denied: 'runs'\n")
