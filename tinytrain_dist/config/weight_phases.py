"""Read train_weights: one weight per source, or phases of weights that begin at given steps.

A phase is written as "STEP: WEIGHT WEIGHT ...", in a TOML file and on the command line. Must not know other settings.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # not at run time, because schema.py imports this module's user
    from tinytrain_dist.config.schema import TrainingConfig

TrainWeights = tuple[float, ...] | tuple[str, ...]


class WeightPhase(NamedTuple):
    """The weights of the sources from a step on, until the next phase begins. from_step: completed steps."""

    from_step: int
    weights: tuple[float, ...]


def weight_phases(train_weights: TrainWeights | None) -> tuple[WeightPhase, ...]:
    """Return the phases of a checked value of train_weights; () if it is None."""
    if train_weights is None:
        return ()
    texts = [text for text in train_weights if isinstance(text, str)]
    if not texts:
        return (WeightPhase(0, tuple(map(float, train_weights))),)
    return tuple(phase for text in texts if (phase := _parse(text)))


def phases_before(train_weights: TrainWeights | None, last_step: int) -> TrainWeights | None:
    """Return train_weights without the phases that begin at `last_step` or later, which a shorter run does not have."""
    if train_weights is None or not all(isinstance(text, str) for text in train_weights):
        return train_weights
    texts = [text for text in train_weights if isinstance(text, str)]
    return tuple(text for text in texts if (phase := _parse(text)) is None or phase.from_step < last_step)


def keeps_source_losses(config: TrainingConfig) -> bool:
    """Return whether the run sums the loss of each source; it then compiles another function for the loss.

    A compiled run with random windows and without phases keeps the function, and with it the bits, that it had before
    losses were summed by source.
    """
    phases = weight_phases(config.train_weights)
    return len(config.train_files) > 1 and (not config.compile or config.sampling == "shuffle" or len(phases) > 1)


def _parse(text: str) -> WeightPhase | None:
    """Return the phase that a text describes; None if it is malformed."""
    step, _, weights = text.partition(":")
    with contextlib.suppress(ValueError):
        phase = WeightPhase(int(step), tuple(map(float, weights.split())))
        return phase if phase.from_step >= 0 and phase.weights else None
    return None


def weight_problems(train_weights: TrainWeights, num_sources: int, total_steps: int | None) -> list[str]:
    """Return what is wrong with train_weights, as sentences. total_steps: None if it is not known yet."""
    if num_sources < 2:
        return ["train_weights: has no effect without several files in train_data; leave it out"]
    malformed = [text for text in train_weights if isinstance(text, str) and _parse(text) is None]
    if malformed:
        example = " ".join(["1"] * num_sources)
        return [
            f"train_weights: {text!r} must be STEP: WEIGHT WEIGHT ..., for example '0: {example}'" for text in malformed
        ]
    phases = weight_phases(train_weights)
    in_phases = isinstance(train_weights[0], str)
    problems = []
    for phase in phases:
        where = f"{len(phase.weights)} numbers" + (f" from step {phase.from_step} on" if in_phases else "")
        if len(phase.weights) != num_sources:
            problems.append(f"train_weights: {where} for {num_sources} files in train_data; give one per file")
        if not (all(0 <= weight < math.inf for weight in phase.weights) and any(phase.weights)):
            problems.append(
                f"train_weights: {list(phase.weights)} must be finite and not negative, and one greater than 0"
            )
    return problems + _order_problems([phase.from_step for phase in phases], total_steps)


def _order_problems(first_steps: Sequence[int], total_steps: int | None) -> list[str]:
    """Return what is wrong with the steps at which phases begin, as sentences."""
    problems = []
    if first_steps[0] != 0:
        problems.append(f"train_weights: the first phase begins at step {first_steps[0]}; let it begin at step 0")
    for step, next_step in itertools.pairwise(first_steps):
        if next_step <= step:
            problems.append(
                f"train_weights: the phase from step {next_step} comes after the one from step {step}; list the phases "
                "in the order of their steps, each step once"
            )
    if total_steps is not None:
        problems += [
            f"train_weights: the phase from step {step} has no effect, because total_steps is {total_steps}; leave it "
            "out"
            for step in first_steps[1:]
            if step >= total_steps
        ]
    return problems
