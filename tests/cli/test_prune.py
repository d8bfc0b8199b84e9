"""`tinytrain prune`: what it removes, what it leaves, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.tools import Cli, lines_with, newest


def test_prune_removes_what_was_set_aside_only_when_asked(tinytrain: Cli, run: Path) -> None:
    aside = [run / "checkpoints" / f"checkpoint-00000005{suffix}" for suffix in (".damaged", ".damaged-2", ".diverged")]
    others = [run / "checkpoints" / name for name in ("checkpoint-a-00000005.damaged", "checkpoint-00000005.mine")]
    for path in (*aside, *others):
        shutil.copytree(newest(run), path)
    code, out, _ = tinytrain("prune", run)
    assert code == 0
    assert "removed 0 of 2 checkpoints" in out
    assert tinytrain("prune", run, "--set-aside", "--dry-run")[0] == 0
    assert all(path.is_dir() for path in aside)
    code, out, _ = tinytrain("prune", run, "--set-aside")
    assert "removed 3 of 5 checkpoints" in out
    assert not any(path.exists() for path in aside)
    assert all(path.is_dir() for path in others)


def test_the_best_and_the_newest_stay(tinytrain: Cli, run: Path) -> None:
    _, out, _ = tinytrain("prune", run, "--keep-last", "1")
    assert "stays: keep_last 1" in lines_with(out, "checkpoint-00000006")[0]
    assert newest(run).is_dir()


def test_prune_refuses_what_is_no_run(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    code, _, err = tinytrain("prune", tmp_path / "nothing")
    assert (code, "is not a folder" in err) == (2, True)
    code, _, err = tinytrain("prune", run, "--keep-last", "0")
    assert (code, "keep_last: 0 must be at least 1" in err) == (2, True)
    (run / "config.toml").unlink()
    code, _, err = tinytrain("prune", run)
    assert (code, "has no config.toml" in err) == (2, True)
