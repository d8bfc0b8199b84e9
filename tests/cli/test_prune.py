"""`tinytrain prune`: what it removes, what it leaves, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.tools import Cli, lines_with, newest, weights_file


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


def test_damaged_checkpoints_count_neither_as_the_newest_nor_as_the_best(tinytrain: Cli, run: Path) -> None:
    older = run / "checkpoints" / "checkpoint-00000003"
    weights_file(newest(run)).write_bytes(b"")  # its state is intact, and says that it has the lowest eval loss
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace("keep_last = 2", "keep_last = 1"))
    _, out, _ = tinytrain("ls", run)
    assert "DAMAGED" in lines_with(out, "checkpoint-00000006")[0]
    assert lines_with(out, older.name)[0].rstrip().endswith("keep_last 1")
    code, out, _ = tinytrain("prune", run)
    assert code == 0
    assert "stays: damaged and not counted, else keep_last 1" in lines_with(out, "checkpoint-00000006")[0]
    assert "stays: keep_last 1" in lines_with(out, older.name)[0]
    assert older.is_dir()

    (older / "trainer_state.json").write_text("")
    code, _, err = tinytrain("prune", run, "--keep-last", "1", "--set-aside")
    assert (code, "none of its 2 checkpoints is valid; nothing is removed" in err) == (2, True)
    assert older.is_dir()


def test_prune_refuses_what_is_no_run(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    code, _, err = tinytrain("prune", tmp_path / "nothing")
    assert (code, "is not a folder" in err) == (2, True)
    code, _, err = tinytrain("prune", run, "--keep-last", "0")
    assert (code, "keep_last: 0 must be at least 1" in err) == (2, True)
    (run / "config.toml").unlink()
    code, _, err = tinytrain("prune", run)
    assert (code, "has no config.toml" in err) == (2, True)


@pytest.mark.parametrize("value", ['"x"', "[2]", "-1", "0", "true", "2.5", "inf"])
@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_a_setting_that_is_no_number_is_named_and_can_be_given(
    tinytrain: Cli, run: Path, name: str, value: str
) -> None:
    if (name, value) == ("keep_every", "0"):  # none
        return
    settings = run / "config.toml"
    lines = [line for line in settings.read_text().splitlines() if not line.startswith(name)]
    settings.write_text("\n".join([*lines, f"{name} = {value}\n"]))
    code, _, err = tinytrain("prune", run)
    assert (code, f"config.toml: {name} is " in err) == (2, True), err
    assert err.count("\n") == 1
    code, out, err = tinytrain("ls", run)
    assert (code, f"WARNING: {settings}: {name} is " in err) == (0, True)
    assert "checkpoint-00000006" in out
    code, out, _ = tinytrain("prune", run, f"--{name.replace('_', '-')}", "2")
    assert (code, "removed 0 of 2 checkpoints" in out) == (0, True)
