"""What MLflow's own client reads from a run: curves, params, tags, artifacts, and one run over a resume."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from tests.helpers.run_log import GROUPS, WORK, config_in, values
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.trackers import background
from tinytrain_dist.utils.json_files import read_json_dict

mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow lags behind SQLAlchemy


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One database for all tests, because making one takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.setitem(background.FINISH_SECONDS, "finished", 600.0)
    patch.setitem(background.FINISH_SECONDS, "stopped", 600.0)
    patch.setitem(background.FINISH_SECONDS, "failed", 600.0)
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path_factory.mktemp("mlflow")
    log = RunLog(with_mlflow(folder), True, 0)  # makes the database where it is by default
    log.close()
    assert run_id(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'logs' / 'mlflow' / 'mlflow.db'}")
    yield folder
    patch.undo()


@pytest.fixture
def client(database):
    return mlflow.MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])


def with_mlflow(folder: Path, **settings):
    return dataclasses.replace(config_in(folder), trackers=("mlflow",), **settings)


def run_id(folder: Path) -> str:
    return read_json_dict(folder / "logs" / "mlflow" / "run.json")["id"]


def points(client, run: str, tag: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run, tag))


def artifact(client, run: str, path: str) -> str:
    return Path(client.download_artifacts(run, path)).read_text()


def test_the_client_reads_what_was_logged(client, tmp_path, capfd):
    log = RunLog(with_mlflow(tmp_path, lr_max=0.0125), True, 0)
    log.about(0, "environment", "python 3")
    for step in (1, 2):
        log.train(step, values(step / 4), GROUPS, WORK)
    log.train(3, values(math.nan), GROUPS, WORK)
    log.evaluation(2, 0.5, 1.0)
    log.samples(2, [("def f(", "x):\n    pass")])
    log.event(2, "saved", "a folder")
    log.close()
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if not line.startswith("step ")] == [
        f"tracker mlflow: run {run_id(tmp_path)} in {os.environ['MLFLOW_TRACKING_URI']}"
    ]
    assert err == ""
    found = client.get_run(run_id(tmp_path))
    assert (found.info.status, found.info.run_name) == ("FINISHED", tmp_path.name)
    assert client.get_experiment(found.info.experiment_id).name == "tinytrain"
    assert found.data.params["lr_max"] == "0.0125"
    assert found.data.params["trackers"] == '["mlflow"]'
    assert found.data.params["val_data"] == "null"
    assert len(found.data.params) == len(with_mlflow(tmp_path).resolved())
    assert found.data.tags["events/saved"] == "step 2: a folder"
    *curve, (last, value) = points(client, run_id(tmp_path), "train/loss")
    assert curve == [(1, 0.25), (2, 0.5)]
    assert last == 3
    assert math.isnan(value)
    assert points(client, run_id(tmp_path), "eval/loss") == [(2, 0.5)]
    assert points(client, run_id(tmp_path), "events/saved") == [(2, 3.0)]
    assert points(client, run_id(tmp_path), "grad_norm_by_layer/layers.0")[0] == (1, 0.5)
    assert artifact(client, run_id(tmp_path), "about/environment.txt") == "python 3"
    assert "lr_max = 0.0125" in artifact(client, run_id(tmp_path), "about/configuration.toml")
    assert "--- continuation\nx):\n    pass" in artifact(client, run_id(tmp_path), "samples/step-00000002.txt")


def test_a_resume_continues_the_run_and_shows_no_step_twice(client, tmp_path, capsys):
    first = RunLog(with_mlflow(tmp_path), True, 0)
    for step in range(1, 8):
        first.train(step, values(float(step)), GROUPS, WORK)
    first.evaluation(4, 40.0, 1.0)
    first.close("stopped")
    run = run_id(tmp_path)
    assert client.get_run(run).info.status == "KILLED"

    second = RunLog(with_mlflow(tmp_path, lr_max=0.5), True, 4)
    for step in range(5, 10):
        second.train(step, values(step + 0.5), GROUPS, WORK)
    second.evaluation(6, 60.0, 1.0)
    second.event(4, "resumed", "x")
    second.close("failed")
    assert run_id(tmp_path) == run
    expected = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5, 9.5]
    assert points(client, run, "train/loss") == list(enumerate(expected, 1))
    assert points(client, run, "eval/loss") == [(4, 40.0), (6, 60.0)]
    found = client.get_run(run)
    assert found.info.status == "FAILED"
    assert found.data.tags["changed_settings"] == "lr_max = 0.5"
    assert found.data.params["lr_max"] == "0.001"

    RunLog(with_mlflow(tmp_path, resume="never"), True, 0).close()
    assert run_id(tmp_path) != run


def test_a_run_that_was_deleted_is_replaced(client, tmp_path):
    RunLog(with_mlflow(tmp_path), True, 0).close()
    state = tmp_path / "logs" / "mlflow" / "run.json"
    state.write_text(state.read_text().replace(run_id(tmp_path), "0" * 32))
    log = RunLog(with_mlflow(tmp_path), True, 3)
    log.train(4, values(1.0), GROUPS, WORK)
    log.close()
    assert points(client, run_id(tmp_path), "train/loss") == [(4, 1.0)]


def test_a_server_that_refuses_costs_the_points(database, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = RunLog(with_mlflow(tmp_path), True, 0)
    log.train(1, values(1.0), GROUPS, WORK)
    log.close()
    out = capsys.readouterr().out
    assert "WARNING: tracker mlflow: failed (MlflowException" in out
    assert "points lost: 2" in out


def test_a_password_is_not_kept():
    from tinytrain_dist.metrics.trackers.mlflow import _without_password

    assert _without_password("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert _without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"
