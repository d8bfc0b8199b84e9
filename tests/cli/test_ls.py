"""`tinytrain ls`: checkpoints with their state, and runs with theirs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from tests.helpers.tools import Cli, flip_bit, lines_with, newest, weights_file
from tinytrain_dist.config import run_folder


def test_ls_shows_each_checkpoint(tinytrain: Cli, folder: Path) -> None:
    code, out, _ = tinytrain("ls", folder / "one")
    assert code == 0
    evals = {
        r["step"]: r["loss"] for r in run_folder.read_records(folder / "one/logs/metrics.jsonl") if r["kind"] == "eval"
    }
    for step in (3, 6):
        (line,) = lines_with(out, f"checkpoint-{step:08d}")
        assert f"{evals[step]:.4f}" in line
        assert "yes, by size" in line
        assert "keep_last 2" in line
    assert tinytrain("ls", folder / "one" / "checkpoints")[1].count("checkpoint-0") == 2
    assert tinytrain("ls", newest(folder / "one"))[1].count("checkpoint-0") == 1


def test_ls_never_shows_an_older_evaluation_as_this_one(tinytrain: Cli, run: Path) -> None:
    path = run / "logs" / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if not ('"eval"' in line and '"step": 6' in line)]
    path.write_text("\n".join(kept))
    (line,) = lines_with(tinytrain("ls", run)[1], "checkpoint-00000006")
    assert " at 3 " in line


def test_ls_names_what_is_damaged_or_unfinished(tinytrain: Cli, run: Path) -> None:
    weights = weights_file(newest(run))
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(newest(run), run / "checkpoints/checkpoint-00000009.tmp")
    shutil.copytree(newest(run), run / "checkpoints/checkpoint-00000002.damaged")
    _, out, _ = tinytrain("ls", run)
    assert "DAMAGED: model-" in lines_with(out, "checkpoint-00000006")[0]
    assert "unfinished" in lines_with(out, "checkpoint-00000009.tmp")[0]
    assert "set aside" in lines_with(out, "checkpoint-00000002.damaged")[0]
    assert "yes" in lines_with(out, "checkpoint-00000003")[0]


def test_only_full_ls_sees_a_flipped_bit(tinytrain: Cli, run: Path) -> None:
    flip_bit(weights_file(newest(run)))
    assert "DAMAGED" not in tinytrain("ls", run)[1]
    out = tinytrain("ls", run, "--full")[1]
    assert "DAMAGED" in lines_with(out, "checkpoint-00000006")[0]
    assert "yes, every byte" in lines_with(out, "checkpoint-00000003")[0]


def test_ls_of_a_folder_lists_its_runs(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    for name in ("finished", "killed", "failed", "stopped"):
        shutil.copytree(folder / "one", tmp_path / name)
    (tmp_path / "killed" / "state.json").unlink()
    (tmp_path / "stopped" / "state.json").write_text('{"state": "preempted", "step": 6}')
    (tmp_path / "failed" / "state.json").unlink()
    (tmp_path / "failed" / "error.json").write_text("{}")
    _, out, _ = tinytrain("ls", tmp_path)
    loss = [r["loss"] for r in run_folder.read_records(folder / "one/logs/metrics.jsonl") if r["kind"] == "train"][-1]
    states = {"finished": "done", "killed": "running or killed", "failed": "failed", "stopped": "preempted"}
    for name, state in states.items():
        (line,) = re.findall(rf"^ *{name} +{state} .*", out, re.M)
        assert f"{loss:.4f}" in line


def test_a_run_may_be_named_like_a_checkpoint(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "one", tmp_path / "try-20260101")
    assert tinytrain("ls", run)[1].count("checkpoint-0") == 2
    assert "try-20260101" in tinytrain("ls", tmp_path)[1]


def test_checkpoints_and_records_are_found_where_the_settings_put_them(tinytrain: Cli, folder: Path) -> None:
    run = folder / "elsewhere"
    shutil.copytree(folder / "one", run)
    (run / "checkpoints").rename(run / "kept")
    (run / "logs" / "metrics.jsonl").rename(run / "numbers.jsonl")
    config = (run / "config.toml").read_text()
    config = config.replace("[checkpoint]", f"[checkpoint]\nckpt_dir = {json.dumps(str(run / 'kept'))}")
    config = config.replace('"metrics"', f'"numbers"\nlog_dir = {json.dumps(str(run))}')
    (run / "config.toml").write_text(config)
    assert tinytrain("ls", run)[1].count("checkpoint-0") == 2
    assert len(run_folder.read_records(run_folder.open_run(run).records)) > 6
    shutil.rmtree(run)
