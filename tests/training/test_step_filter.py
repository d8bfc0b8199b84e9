"""Check the rule that skips spikes against its formula in numpy, and that its window survives a checkpoint exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tinytrain_dist.metrics.loss_level import SPIKE_WINDOW_KEY, forget_level
from tinytrain_dist.training.step_filter import FiniteSteps, SpikeFilter, StepFilter

CPU = torch.device("cpu")


def decide(rule: StepFilter, loss: float, norm: float) -> list[float]:
    """Return the numbers of a decision."""
    scalars = torch.tensor([loss, norm], dtype=torch.float64)
    return rule.decide(scalars[0], scalars[1]).tolist()


def series(count: int) -> list[tuple[float, float]]:
    """Return losses and norms: noise around a falling mean, spikes of each kind, a NaN and an infinity."""
    rng = np.random.default_rng(3)
    losses, norms = 3 + 2 / np.arange(1, count + 1) + 0.1 * rng.random(count), 1 + 0.2 * rng.random(count)
    losses[[11, 12, 30]] = 9.0
    norms[20] = 7.0
    losses[14], norms[16] = math.nan, math.inf
    losses[2] = 50.0  # too early to be noticed
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def expected_skips(values: list[tuple[float, float]], deviations: float, window: int) -> list[bool]:
    """Return the decisions by the formula."""
    accepted: list[tuple[float, float]] = []
    skips = []
    for loss, norm in values:
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        usual = np.array(accepted[-window:])
        if not skip and len(usual) >= max(2, window // 2):
            limits = usual.mean(axis=0) + deviations * usual.std(axis=0, ddof=1)
            skip = loss > limits[0] or norm > limits[1]
        skips.append(bool(skip))
        if not skip:
            accepted.append((loss, norm))
    return skips


@pytest.mark.parametrize(("deviations", "window"), [(6.0, 8), (4.0, 7), (2.0, 16), (3.0, 2)])
def test_decisions_are_those_of_the_formula(deviations: float, window: int) -> None:
    rule = SpikeFilter(deviations, window, CPU)
    values = series(40)
    decisions = [decide(rule, *pair) for pair in values]
    skips = [bool(decision[0]) for decision in decisions]
    assert skips == expected_skips(values, deviations, window)
    assert skips[14]
    assert skips[16]
    if window == 8:
        assert [step for step, skip in enumerate(skips) if skip] == [11, 12, 14, 16, 20, 30]
        accepted = [pair for pair, skip in zip(values[:20], skips, strict=False) if not skip][-8:]
        expected = [*np.mean(accepted, axis=0), *np.std(accepted, axis=0, ddof=1)]
        assert decisions[20][1:] == pytest.approx(expected, rel=1e-12)


def test_without_spikes_only_what_is_not_finite_is_skipped() -> None:
    values = series(40)
    decisions = [decide(FiniteSteps(), *pair) for pair in values]
    assert decisions == [[float(step in (14, 16))] for step in range(40)]
    assert FiniteSteps().state() == {}


def test_a_window_survives_a_checkpoint_exactly() -> None:
    values = series(40)
    whole = SpikeFilter(6.0, 8, CPU)
    expected = [decide(whole, *pair) for pair in values]
    for stop in (3, 10, 13, 25):  # with a window that is not full, and after a spike
        first, second = SpikeFilter(6.0, 8, CPU), SpikeFilter(6.0, 8, CPU)
        before = [decide(first, *pair) for pair in values[:stop]]
        record: dict[str, Any] = json.loads(json.dumps({"other": 1, **first.state()}))
        second.load(record)
        assert record == {"other": 1}
        assert torch.equal(first.window, second.window)
        after = [decide(second, *pair) for pair in values[stop:]]
        assert before + after == expected


def test_a_window_of_another_size_keeps_the_newest_steps() -> None:
    rule, shorter, longer = (SpikeFilter(6.0, size, CPU) for size in (6, 4, 9))
    for pair in series(40)[:5]:
        decide(rule, *pair)
    for other in (shorter, longer):
        other.load(rule.state())
    newest = rule.state()[SPIKE_WINDOW_KEY]
    assert longer.state() == rule.state()
    assert shorter.state() == {SPIKE_WINDOW_KEY: {name: values[-4:] for name, values in newest.items()}}


def test_a_window_of_other_data_or_of_a_run_that_has_none_now_is_forgotten() -> None:
    rule = SpikeFilter(6.0, 4, CPU)
    decide(rule, 1.0, 1.0)
    record = rule.state()
    forget_level(record)
    assert record == {}
    record = rule.state()
    FiniteSteps().load(record)
    assert record == {}


def test_equal_values_are_no_spikes() -> None:
    rule = SpikeFilter(6.0, 4, CPU)
    assert [decide(rule, 0.1, 0.3)[0] for _ in range(9)] == [0.0] * 9
    assert decide(rule, 0.2, 0.3)[0] == 1.0
