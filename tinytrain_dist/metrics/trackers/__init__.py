"""Create the trackers of a run from the names in the setting `trackers`.

Read `base.py` first: a tracker is a class with a few methods. Then `background.py`, which runs it in a thread.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.trackers.background import BackgroundSink, DirectSink, Sink
from tinytrain_dist.metrics.trackers.base import TrackedRun, Tracker

# The class of each tracker of this package, and the optional library that it needs.
CLASSES = {
    "tensorboard": ("tinytrain_dist.metrics.trackers.tensorboard", "TensorBoardTracker", ""),
    "wandb": ("tinytrain_dist.metrics.trackers.wandb", "WandbTracker", "wandb"),
    "mlflow": ("tinytrain_dist.metrics.trackers.mlflow", "MlflowTracker", "mlflow"),
}
DIRECT = {"tensorboard"}  # called in the thread that trains, see DirectSink


def create_trackers(config: TrainingConfig) -> dict[str, Tracker]:
    """Return a tracker for each name in `trackers`. Call this before the run starts: it imports the libraries.

    Errors: ConfigError with a sentence for each tracker whose library is missing or whose class cannot be used.
    """
    trackers: dict[str, Tracker] = {}
    problems = []
    for name in config.trackers:
        try:
            trackers[name] = _create(name)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return trackers


def start_trackers(trackers: dict[str, Tracker], config: TrainingConfig, resumed_step: int) -> list[Sink]:
    """Start the trackers of a run that starts at `resumed_step`, each in its own thread, without waiting for them."""
    sinks: list[Sink] = []
    for name, tracker in trackers.items():
        run = TrackedRun(
            name=Path(config.target_dir).resolve().name,
            logs=config.logs_dir,
            folder=config.logs_dir / name.replace(":", "."),
            settings=config.resolved(),
            config_toml=config.to_toml(),
            resumed_step=resumed_step,
            is_new=config.resume_from == "never",
        )
        sinks.append(DirectSink(tracker, run) if name in DIRECT else BackgroundSink(name, tracker, run))
    return sinks


def _create(name: str) -> Tracker:
    """Return a tracker by name. Errors: ConfigError."""
    module, class_name, library = CLASSES.get(name) or (*name.split(":"), "")
    if name not in CLASSES and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end, so that no file of the user hides a library
    try:
        tracker_class = getattr(importlib.import_module(module), class_name)
    except (Exception, SystemExit) as error:  # code of the user or of a library may raise anything
        if library and isinstance(error, ModuleNotFoundError) and error.name == library:
            problem = f"needs a library that is not installed; pip install 'tinytrain_dist[{library}]'"
        else:
            problem = f"cannot be imported from {os.getcwd()} ({type(error).__name__}: {error}); fix the module"
        raise ConfigError(f"trackers: {name} {problem}, or take {name} off the list") from None
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, Tracker)):
        raise ConfigError(f"trackers: {name} is not derived from tinytrain_dist.Tracker; see docs/trackers.md")
    try:
        return tracker_class()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"trackers: {name} cannot be created without arguments ({type(error).__name__}: {error}); move work that "
            "needs the run to its method `start`"
        ) from None
