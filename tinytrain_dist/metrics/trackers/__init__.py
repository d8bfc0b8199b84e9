"""Create the trackers of a run from the names in the setting `trackers`.

Read `base.py` first: a tracker is a class with a few methods. Then `background.py`, which runs it in a thread. A
class is imported and created in a thread, too, because code of a library or of a user may block.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import threading
import time
from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.trackers.background import (
    START_SECONDS,
    BackgroundSink,
    DirectSink,
    Sink,
    have_own_current_folder,
)
from tinytrain_dist.metrics.trackers.base import TrackedRun, Tracker

# The class of each tracker of this package, and the optional library that it needs.
CLASSES = {
    "tensorboard": ("tinytrain_dist.metrics.trackers.tensorboard", "TensorBoardTracker", ""),
    "wandb": ("tinytrain_dist.metrics.trackers.wandb", "WandbTracker", "wandb"),
    "mlflow": ("tinytrain_dist.metrics.trackers.mlflow", "MlflowTracker", "mlflow"),
}
DIRECT = {"tensorboard"}  # called in the thread that trains, see DirectSink


def check_trackers(config: TrainingConfig) -> None:
    """Load the class of each name in `trackers`, for a limited time: an import may block. It then goes on in a thread.

    Call this before the run starts. Errors: ConfigError with a sentence for each tracker whose library is missing or
    whose class cannot be used, as far as that is known after this time.
    """
    _find_modules_of_the_user(config)
    checks = [_Check(name) for name in config.trackers]
    deadline = time.monotonic() + START_SECONDS
    problems = [problem for check in checks if (problem := check.problem(deadline))]
    if problems:
        raise ConfigError(problems)


def create_tracker(name: str) -> Tracker:
    """Return a tracker by name. Errors: whatever its module or class raises."""
    return load_class(name)()


def start_trackers(config: TrainingConfig, resumed_step: int) -> list[Sink]:
    """Start the trackers of a run that starts at `resumed_step`, each in its own thread, without waiting for them."""
    _find_modules_of_the_user(config)
    sinks: list[Sink] = []
    logs = config.logs_dir.absolute()
    for name in config.trackers:
        run = TrackedRun(
            name=Path(config.target_dir).resolve().name,
            logs=logs,
            folder=logs / name.replace(":", "."),
            settings=config.resolved(),
            config_toml=config.to_toml(),
            resumed_step=resumed_step,
            is_new=config.resume_from == "never",
        )
        if name in DIRECT:
            sinks.append(DirectSink(name, create_tracker(name), run))
        else:
            sinks.append(BackgroundSink(name, functools.partial(create_tracker, name), run))
    return sinks


def _find_modules_of_the_user(config: TrainingConfig) -> None:
    """Let imports find modules in the current folder, if a tracker may be there."""
    if any(name not in CLASSES for name in config.trackers) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end, so that no file of the user hides a library


def load_class(name: str) -> type[Tracker]:
    """Import the class of a tracker. Errors: whatever its module raises; AttributeError if it has no such class."""
    module, class_name, _ = CLASSES.get(name) or (*name.split(":"), "")
    loaded: type[Tracker] = getattr(importlib.import_module(module), class_name)
    return loaded


class _Check:
    """Find out in a thread whether a tracker can be used."""

    def __init__(self, name: str) -> None:
        """Begin. name: as in the setting `trackers`."""
        self._name = name
        self._folder = os.getcwd()
        self._found = ""
        self._thread = threading.Thread(target=self._work, name=f"load tracker {name}", daemon=True)
        self._thread.start()

    def problem(self, deadline: float) -> str:
        """Return a sentence, or "" if there is no problem, or none is known by `deadline` (time.monotonic())."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return self._found

    def _work(self) -> None:
        name = self._name
        have_own_current_folder()
        try:
            tracker_class = load_class(name)
        except BaseException as error:  # code of the user or of a library may raise anything
            library = CLASSES.get(name, ("", "", ""))[2]
            if library and isinstance(error, ModuleNotFoundError) and error.name == library:
                problem = f"needs a library that is not installed; pip install 'tinytrain_dist[{library}]'"
            else:
                problem = f"cannot be imported from {self._folder} ({type(error).__name__}: {error}); fix the module"
            self._found = f"trackers: {name} {problem}, or take {name} off the list"
            return
        if not (isinstance(tracker_class, type) and issubclass(tracker_class, Tracker)):
            self._found = f"trackers: {name} is not derived from tinytrain_dist.Tracker; see docs/trackers.md"
            return
        try:
            inspect.signature(tracker_class).bind()
        except TypeError as error:
            self._found = (
                f"trackers: {name} cannot be created without arguments ({type(error).__name__}: {error}); move work "
                "that needs the run to its method `start`"
            )
