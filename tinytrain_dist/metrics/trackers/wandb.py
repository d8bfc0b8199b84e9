"""Send what a run logs to Weights & Biases, or keep it in the run folder for `wandb sync`.

Must not know how the numbers are computed. wandb must not change how the process ends: the run handles its signals, and
the exit code is its own. It never asks for a key.
"""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

import wandb

from tinytrain_dist.metrics.trackers.base import Status, TrackedRun, Tracker
from tinytrain_dist.metrics.trackers.state import TrackerState
from tinytrain_dist.metrics.trackers.tags import EVENT_ROWS
from tinytrain_dist.utils.text import first_line

PROJECT = "tinytrain"  # unless WANDB_PROJECT is set
INIT_SECONDS = 60.0  # then the run is kept offline
UPLOAD_SECONDS = 30.0  # to wait for the last points at the end
FLUSH_SECONDS = 1.0  # a killed process loses at most the points of this many seconds


class WandbTracker(Tracker):
    """Send a run to Weights & Biases."""

    _run: Any = None

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or continue the one whose ID is in the run folder."""
        self._state = TrackerState(run)
        run_id = self._state.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        hooks = sys.exit, sys.excepthook
        try:
            where = self._begin(run, run_id)
        finally:
            sys.exit, sys.excepthook = hooks  # wandb replaces both, to learn the exit code
        self._state.begin(run_id)
        # The axis of every chart. wandb's own counts calls, so it would differ from the step of the run.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return where + self._state.describe_repeated(run, "W&B")

    def _begin(self, run: TrackedRun, run_id: str) -> str:
        """Open the run at the service if possible, else offline; return a line about where it is."""
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode  # from WANDB_MODE or a file of settings
        if mode == "disabled":
            self._init(run, run_id, "disabled")
            return "WANDB_MODE is disabled, so nothing is sent"
        why = f"WANDB_MODE is {mode}"
        if mode not in ("offline", "dryrun"):
            try:
                if wandb.login(prompt=False, verify=False):
                    self._init(run, run_id, None)
                    return f"the run is at {self._run.url}"
                why = "there is no API key, see `wandb login`"
            except Exception as error:  # there may be no network on this node
                why = f"the service cannot be used ({type(error).__name__}: {first_line(error)})"
                wandb.teardown()  # the ID of the run is in use otherwise
        self._init(run, run_id, "offline")
        return f"{why}, so the run is kept offline; upload it with: wandb sync {run.folder}/offline-run-*-{run_id}"

    def _init(self, run: TrackedRun, run_id: str, mode: Any) -> None:
        """Open the run. mode: None for the one of the environment."""
        settings = wandb.Settings(
            allow_val_change=True,  # a resume may change settings
            console="off",  # the run's output is not wandb's
            silent=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=UPLOAD_SECONDS,
        )
        if hasattr(settings, "x_transaction_log_flush_interval"):  # not public, and 15 seconds by default
            settings.x_transaction_log_flush_interval = FLUSH_SECONDS
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run_id,
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=run.logs,
            config=run.settings,
            resume=None if mode else "allow",  # offline, wandb cannot know whether the run exists
            mode=mode,
            reinit="create_new",  # leave alone the runs of a program that uses wandb itself
            settings=settings,
        )

    def log_numbers(self, step: int, numbers: dict[str, float], time: float) -> None:
        """Add a point to each number's chart."""
        new = self._state.unsent(step, numbers)
        if new:
            self._log(step, new)

    def log_histogram(self, step: int, tag: str, values: list[float]) -> None:
        """Add the distribution of `values`."""
        if self._state.unsent(step, {tag: 0.0}):
            self._log(step, {tag: wandb.Histogram(values)})

    def log_event(self, step: int, kind: str, text: str, time: float) -> None:
        """Add a dot in the row of its kind, and the text."""
        self._log(step, {f"events/{kind}": EVENT_ROWS.get(kind, 0), f"event_texts/{kind}": text})

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Add a text to the configuration of the run."""
        self._run.config.update({tag: text}, allow_val_change=True)

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Add a table of the texts generated at an evaluation."""
        if self._state.unsent(step, {"samples": 0.0}):
            rows = [[step, prompt, continuation] for prompt, continuation in texts]
            table = wandb.Table(columns=["step", "prompt", "continuation"], data=rows)
            self._log(step, {"samples": table})

    def finish(self, status: Status) -> None:
        """End the run, and the process that wandb has started, unless the program has runs of its own."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)
        if wandb.run is None:
            wandb.teardown()

    def _log(self, step: int, row: dict[str, Any]) -> None:
        """Add a row to the history. wandb counts rows from 0 in each process that is offline, so they are numbered."""
        self._run.log({"step": step, **row}, step=self._state.next_row(), commit=True)
