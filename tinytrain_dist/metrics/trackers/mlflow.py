"""Send what a run logs to MLflow: a tracking server, or a database in the run folder.

Must not know how the numbers are computed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
from mlflow.exceptions import MlflowException

from tinytrain_dist.metrics.trackers.base import Status, TrackedRun, Tracker
from tinytrain_dist.metrics.trackers.state import TrackerState
from tinytrain_dist.metrics.trackers.tags import EVENT_ROWS
from tinytrain_dist.utils.json_files import to_json

EXPERIMENT = "tinytrain"  # unless MLFLOW_EXPERIMENT_NAME is set
DATABASE = "mlflow.db"
# The most that a server accepts in one request.
MAX_METRICS, MAX_PARAMS, MAX_TAG_LENGTH = 1000, 100, 8000
ENDS: dict[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker(Tracker):
    """Send a run to MLflow."""

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or continue the one whose ID is in the run folder."""
        for name in ("mlflow", "alembic"):  # they report on stderr how they make a database
            logging.getLogger(name).setLevel(logging.WARNING)
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
        local = f"sqlite:///{(run.folder / DATABASE).resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or local
        artifacts = (run.folder / "artifacts").resolve().as_uri() if uri == local else None
        self._client = MlflowClient(tracking_uri=uri)
        self._state = TrackerState(run)
        service = _without_password(uri)
        stored = self._continue_run() if self._state.service == service else None
        if stored is None:
            stored = self._client.create_run(self._experiment_id(artifacts), run_name=run.name)
        self._run_id: str = stored.info.run_id
        self._state.begin(self._run_id, service)
        self._log_settings(run, stored.data.params)
        look = f"; look at it with: mlflow server --backend-store-uri {local}" if uri == local else ""
        return f"run {self._run_id} in {service}{look}{self._state.describe_repeated(run, 'MLflow')}"

    def _continue_run(self) -> Any:
        """Return the run whose ID is in the run folder, or None if there is none. Errors: MlflowException."""
        if not self._state.id:
            return None
        try:
            stored = self._client.get_run(self._state.id)
            if stored.info.lifecycle_stage == "deleted":
                return None
            self._client.update_run(self._state.id, status="RUNNING")
            return stored
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # somebody has deleted it
                return None
            raise

    def _experiment_id(self, artifacts: str | None) -> str:
        if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return experiment_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:  # another run may have created it just now
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _log_settings(self, run: TrackedRun, stored: dict[str, str]) -> None:
        """Log the configuration. MLflow keeps the first value of a parameter, so changed ones are named in a tag."""
        values = {name: value if isinstance(value, str) else to_json(value) for name, value in run.settings.items()}
        params = [Param(name, value) for name, value in values.items() if name not in stored]
        for part in _parts(params, MAX_PARAMS):
            self._client.log_batch(self._run_id, params=part)
        changed = [f"{name} = {value}" for name, value in values.items() if stored.get(name, value) != value]
        if changed:
            self._tag("changed_settings", ", ".join(changed))
        self._client.log_text(self._run_id, run.config_toml, "about/configuration.toml")

    def log_numbers(self, step: int, numbers: dict[str, float], time: float) -> None:
        """Add a point to each number's chart."""
        self._log_metrics(step, self._state.unsent(step, numbers), time)

    def log_event(self, step: int, kind: str, text: str, time: float) -> None:
        """Add a dot in the row of its kind, and keep the text of the last event of each kind as a tag."""
        self._log_metrics(step, {f"events/{kind}": EVENT_ROWS.get(kind, 0)}, time)
        self._tag(f"events/{kind}", f"step {step}: {text}")

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Store a text as an artifact."""
        self._client.log_text(self._run_id, text, f"{tag}.txt")

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Store the texts generated at an evaluation as an artifact."""
        text = "\n".join(f"--- prompt\n{prompt}\n--- continuation\n{continuation}\n" for prompt, continuation in texts)
        self._client.log_text(self._run_id, text, f"samples/step-{step:08d}.txt")

    def finish(self, status: Status) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, ENDS[status])

    def _log_metrics(self, step: int, numbers: dict[str, float], time: float) -> None:
        metrics = [Metric(tag, value, int(time * 1000), step) for tag, value in numbers.items()]
        for part in _parts(metrics, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=part)

    def _tag(self, key: str, value: str) -> None:
        self._client.log_batch(self._run_id, tags=[RunTag(key, value[:MAX_TAG_LENGTH])])


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _without_password(uri: str) -> str:
    """Return the address of a server without the user's name and password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri
