"""A real run with all trackers: stopped by a signal, resumed, and one run everywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import AGENT, REPOSITORY, launch_training, training_process
from tests.helpers.trackers import OfflineRun
from tests.helpers.training import Run, config_file
from tinytrain_dist.utils.json_files import read_json_dict

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

OWN_TRACKER = """
from tinytrain_dist import Tracker


class Lines(Tracker):
    def start(self, run):
        self.file = open(run.folder / "lines", "a", buffering=1)

    def log_event(self, step, kind, text, time):
        self.file.write(f"{step} {kind}\\n")

    def finish(self, status):
        self.file.write(f"{status}\\n")
"""


def test_a_run_is_one_run_in_all_trackers_over_a_stop_and_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb", exc_type=ImportError)
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    (tmp_path / "own.py").write_text(OWN_TRACKER)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.MlflowClient(tracking_uri=uri).search_experiments()  # makes the database, which takes seconds
    env = {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
    env |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    trackers = ["tensorboard", "wandb", "mlflow", "own:Lines"]
    config = config_file(tmp_path, trackers=trackers, total_steps=100_000, ckpt_every=100_000, eval_every=100_000)
    with training_process([config], 2, tmp_path, env, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.killpg(running.process.pid, signal.SIGTERM)
        assert running.wait(120) == 0, running.output()
        first = running.output()
    run = tmp_path / "run"
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["reason"]) == ("preempted", "SIGTERM")
    assert "Traceback" not in first
    stopped_at = state["step"]
    mlflow_id = read_json_dict(run / "logs" / "mlflow" / "run.json")["id"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert client.get_run(mlflow_id).info.status == "KILLED"
    assert OfflineRun(run / "logs" / "wandb").summary["status"] == "stopped"
    assert (run / "logs" / "own.Lines" / "lines").read_text().splitlines()[-1] == "stopped"

    done = launch_training([config, f"--stop-at-step={stopped_at + 5}"], 2, tmp_path, env, launcher=AGENT)
    assert done.returncode == 0, done.stdout
    records = Run(run).records
    assert [record for record in records if record["kind"] == "tracker_failed"] == []
    losses = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    assert [step for step, _ in losses] == list(range(1, stopped_at + 6))
    found = OfflineRun(run / "logs" / "wandb")
    assert len(found.ids) == 1
    assert found.points("train/loss") == losses
    assert found.exit_codes == [0, 0]
    assert client.get_run(mlflow_id).info.status == "FINISHED"
    assert sorted((point.step, point.value) for point in client.get_metric_history(mlflow_id, "train/loss")) == losses
    lines = (run / "logs" / "own.Lines" / "lines").read_text().splitlines()
    assert f"{stopped_at} resumed" in lines
    assert lines[-1] == "finished"


def test_a_tracker_that_cannot_be_used_is_an_error_before_the_run(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), config_file(tmp_path, trackers=["own:Lines"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "trackers: own:Lines cannot be imported from" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "logs" / "metrics.jsonl").exists()
