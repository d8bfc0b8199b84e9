"""`tinytrain compare`: the first bit in which two runs or checkpoints differ."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.tools import Cli, lines_with, newest


def test_compare_finds_nothing_between_equal_runs(tinytrain: Cli, folder: Path) -> None:
    code, out, _ = tinytrain("compare", folder / "one", folder / "split")
    assert code == 0
    assert out.count("identical in every bit") == 5  # loss, norm, eval loss, weights, optimizer
    assert "max_shard_bytes" in out  # other settings are reported, but do not count as a difference
    assert "target_dir" not in out


@pytest.mark.parametrize(("kind", "key", "title"), [("train", "loss", "loss"), ("train", "grad_norm", "gradient norm")])
def test_compare_finds_the_first_bit_that_differs(
    tinytrain: Cli, folder: Path, run: Path, kind: str, key: str, title: str
) -> None:
    path = run / "logs" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == kind and record["step"] in (4, 5):
            record[key] = math.nextafter(record[key], math.inf)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = tinytrain("compare", folder / "one", run)
    assert code == 1
    (line,) = lines_with(out, "first differs")
    assert line.startswith(title)
    assert "at step 4:" in line
    assert line.endswith("at the last common step, 6, by 0")
    assert out.splitlines()[-1] == "different"


def test_compare_reports_other_settings_and_machines_separately(tinytrain: Cli, folder: Path, run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment["torch"] = "0.1"
    environment["ranks"] *= 2
    (run / "environment.json").write_text(json.dumps(environment))
    code, out, _ = tinytrain("compare", folder / "other", run)
    assert code == 1
    assert "first differs at step 2" in lines_with(out, "loss")[0]  # the first loss comes before the first update
    assert "lr_max: 0.02 and 0.01" in out
    assert "and 0.1" in lines_with(out, "torch: ")[0]
    assert " and 2: " in lines_with(out, "ranks: ")[0]
    assert "pid" not in out


def test_runs_of_other_lengths_are_compared_where_both_are(tinytrain: Cli, folder: Path, run: Path) -> None:
    path = run / "logs" / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if json.loads(line)["step"] <= 4))
    shutil.rmtree(newest(run))
    code, out, _ = tinytrain("compare", folder / "one", run)
    assert code == 0
    assert "steps, 1 to 4" in out
    assert "ends at step 6, the second at step 4" in out
    assert "checkpoints at step 3" in out
    path.write_text("")
    code, _, err = tinytrain("compare", folder / "one", run)
    assert code == 2
    assert "no step was logged in both (steps 1 to 6 and nothing logged)" in err


def test_compare_of_checkpoints_names_tensors(tinytrain: Cli, folder: Path) -> None:
    code, out, _ = tinytrain("compare", newest(folder / "one"), newest(folder / "split"))
    assert code == 0
    code, out, _ = tinytrain("compare", newest(folder / "one"), folder / "one/checkpoints/checkpoint-00000003")
    assert code == 1
    (line,) = lines_with(out, "model.embed_tokens.weight: ")
    assert float(re.search(r"largest difference (\S+),", line)[1]) > 0  # type: ignore[index]
    assert "model.embed_tokens.weight.step: largest difference 3," in out
    assert "and " in out.splitlines()[-1]
