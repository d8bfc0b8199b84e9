"""`tinytrain verify`: damage is found in every byte, and unfinished folders do not count."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.tools import Cli, flip_bit, lines_with, newest, weights_file


def test_verify_reads_every_byte(tinytrain: Cli, run: Path) -> None:
    code, out, _ = tinytrain("verify", run)
    assert (code, out.count("ok "), out.count("GB/s")) == (0, 2, 2)
    flip_bit(weights_file(newest(run)))
    code, out, _ = tinytrain("verify", run)
    assert (code, out.count("ok ")) == (1, 1)
    assert f"DAMAGED  {newest(run)}" in out
    assert tinytrain("verify", newest(run))[0] == 1
    assert tinytrain("verify", run / "checkpoints" / "checkpoint-00000003")[0] == 0


def test_verify_does_not_count_what_a_resume_ignores(tinytrain: Cli, run: Path) -> None:
    (run / "checkpoints" / "checkpoint-00000009.tmp").mkdir()
    code, out, _ = tinytrain("verify", run)
    assert code == 0
    assert "skipped" in lines_with(out, "checkpoint-00000009.tmp")[0]
    assert tinytrain("verify", run / "checkpoints" / "checkpoint-00000009.tmp")[0] == 1


def test_verify_without_checkpoints_is_an_error(tinytrain: Cli, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    code, _, err = tinytrain("verify", run)
    assert code == 2
    assert "no checkpoint to verify" in err
