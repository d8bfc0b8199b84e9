"""benchmarks/gpu.py on a CPU: it runs each stage in its own process, and reports what it measured and skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
TRAINING = "end_to_end:tiny:ours-eager:fp32:4x1"


def run(*arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    env = {name: value for name, value in env.items() if name != "PYTHONPATH"}  # it finds the checkout itself
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300, cwd="/")
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_dry_run_measures_resumes_and_reports(tmp_path: Path) -> None:
    stages = f"environment,ceilings,reduction,scaling:tiny:ours-fsdp:2,{TRAINING}"
    first = run("--dry-run", "--out", tmp_path, "--stages", f"ceilings,{TRAINING}")
    text = (tmp_path / "report.md").read_text()
    assert text in first.stdout
    assert "| best TFLOP/s | " in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"]["ceilings"]["values"]["best TFLOP/s"].keys() == {"bf16", "fp8", "fp8 fast"}
    values = report["stages"][TRAINING]["values"]
    assert values["tokens per step"] == 4 * 64
    assert values["tokens/s"] == pytest.approx(1000 * 256 / values["ms per step"], rel=0.01)
    assert report["training"][TRAINING]["of matmul ceiling"].endswith("%")
    before = (tmp_path / "results" / "ceilings.json").read_bytes()

    again = run("--dry-run", "--out", tmp_path, "--resume", "--stages", stages, "--budget", "0.5")
    assert (tmp_path / "results" / "ceilings.json").read_bytes() == before
    assert "ceilings: done" not in again.stdout.partition("# GPU")[0], "it was done already"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"]["reduction"]["status"] == "skipped"
    assert "of the budget are left" in report["stages"]["reduction"]["notes"][0]
    assert report["stages"][TRAINING]["values"] == values
    assert "| reduction | skipped | 0 |" in (tmp_path / "report.md").read_text()


def test_a_stage_that_fails_costs_only_itself(tmp_path: Path) -> None:
    # the variable promises a GPU that does not exist; the first stage records the versions before it fails
    stages = "environment,end_to_end:1b:ours:bf16:8x1"
    arguments = ("--device", "cuda", "--out", tmp_path, "--stages", stages)
    done = run(*arguments, check=False, CUDA_VISIBLE_DEVICES="99")
    assert done.returncode == 1
    report = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert [report[name]["status"] for name in stages.split(",")] == ["failed", "failed"]
    assert "torch" in report["environment"]["values"]["versions"], "what was measured before is kept"
    text = (tmp_path / "report.md").read_text()
    assert "| environment | failed |" in text
    assert "ConfigError" in text


def test_without_a_gpu_one_sentence_says_what_to_do() -> None:
    done = run("--device", "cuda", check=False, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "--device: cuda needs a GPU, and this machine has none; --dry-run tries all stages on a CPU\n"
    )


def test_an_unknown_stage_is_refused_with_the_names() -> None:
    done = run("--dry-run", "--stages", "losses", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("--stages: 'losses' is no stage; expected names from environment, tests, ceilings")
