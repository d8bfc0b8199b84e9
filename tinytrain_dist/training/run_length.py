"""Compute total_steps from `epochs`: the length of a run follows from the number of tokens to train on."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.validation import LARGEST_NUMBER
from tinytrain_dist.errors import ConfigError, DataError

if TYPE_CHECKING:  # imports torch, which takes a login node seconds
    from tinytrain_dist.distributed.context import DistributedContext


def resolve_epochs(config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with total_steps in place of `epochs`, if that is set; opens the token files.

    Errors: ConfigError if the token files are not here, or if other settings do not fit total_steps.
    """
    if config.epochs is None:
        return config
    from tinytrain_dist.training.run_data import open_training_data  # only now, because torch is imported

    if not config.train_files:
        raise ConfigError(f"epochs: {config.epochs} needs train_data to find total_steps; set train_data")
    try:
        windows = open_training_data(config).windows_per_epoch
    except (DataError, OSError) as error:
        raise ConfigError(
            f"epochs: total_steps follows from the token files of train_data, which cannot be read here ({error}); run "
            "this where they are, or set total_steps in place of epochs"
        ) from None
    return with_total_steps(config, windows)


def with_total_steps(config: TrainingConfig, windows: int) -> TrainingConfig:
    """Return the configuration with total_steps in place of `epochs`, if that is set. windows: in one epoch.

    Errors: ConfigError if other settings do not fit total_steps.
    """
    if config.epochs is None:
        return config
    steps = steps_of_epochs(config.epochs, windows, config.batch_sizes)
    if config.batch_sizes.before(steps) > LARGEST_NUMBER:
        raise ConfigError(
            f"epochs: {config.epochs} epochs of {windows:,} windows are more than 2**53 = {LARGEST_NUMBER} windows; "
            "set fewer epochs",
            "the settings with epochs",
        )
    try:
        return replace(config, epochs=None, total_steps=steps)
    except ConfigError as error:
        because = f" ({config.epochs} epochs of {windows:,} windows give total_steps = {steps})"
        raise ConfigError([problem + because for problem in error.problems], "the settings with epochs") from None


def steps_of_epochs(epochs: float, windows: int, sizes: BatchSizes) -> int:
    """Return the fewest steps that draw all windows of that many epochs, at least 1."""
    return max(1, sizes.steps_for(math.ceil(Fraction(repr(epochs)) * windows)))


def with_length(config: TrainingConfig, windows: int, context: DistributedContext) -> tuple[TrainingConfig, str]:
    """Return the configuration with total_steps in place of `epochs`, and a note about it. A collective.

    windows: in one epoch, as this rank sees the data. Rank 0's number counts, so that all ranks take as many steps.
    """
    windows = context.broadcast_object(windows)
    resolved = with_total_steps(config, windows)
    sizes = config.batch_sizes
    divided = f"in batches of {sizes}" if sizes.varies else f"/ batch_size {config.batch_size}"
    note = f"{config.epochs} epochs x {windows:,} windows {divided} = {resolved.total_steps} steps"
    return resolved, note if config.epochs is not None else ""
