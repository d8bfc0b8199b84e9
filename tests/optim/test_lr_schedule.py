"""Check the learning rate, each schedule at five points: first, end of warm-up, middle, last, beyond."""

import inspect
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.optim.lr_schedule import cosine_lr_schedule, learning_rate, linear_lr_schedule, wsd_lr_schedule


def test_the_signature_stays_as_documented():
    assert list(inspect.signature(cosine_lr_schedule).parameters) == [
        "t", "lr_max", "lr_min", "warmup_iters", "cosine_iters",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("t", "rate"),
    [(0, 0.0), (5, 0.5), (9, 0.9), (10, 1.0), (30, 0.55), (50, 0.1), (51, 0.1), (10**9, 0.1)],
)
def test_cosine_at_its_points(t, rate):
    assert cosine_lr_schedule(t, 1.0, 0.1, 10, 50) == pytest.approx(rate, abs=1e-15)


def test_cosine_reaches_both_ends_exactly():
    assert cosine_lr_schedule(10, 1.0, 0.1, 10, 50) == 1.0
    assert cosine_lr_schedule(50, 1.0, 0.1, 10, 50) == 0.1


def test_cosine_is_the_formula_between_its_ends():
    expected = 0.1 + 0.5 * (1 + math.cos(math.pi * (20 - 10) / (50 - 10))) * (1.0 - 0.1)
    assert cosine_lr_schedule(20, 1.0, 0.1, 10, 50) == pytest.approx(expected, rel=1e-15)


def test_cosine_without_warm_up_starts_at_the_top():
    assert cosine_lr_schedule(0, 1.0, 0.1, 0, 50) == 1.0


def test_cosine_may_end_with_its_warm_up():
    assert [cosine_lr_schedule(t, 1.0, 0.1, 4, 4) for t in (0, 2, 4, 5)] == [0.0, 0.5, 1.0, 0.1]
    assert [cosine_lr_schedule(t, 1.0, 0.1, 0, 0) for t in (0, 1)] == [1.0, 0.1]


def test_cosine_that_ends_before_its_warm_up_is_an_error():
    with pytest.raises(ValueError, match="warmup_iters=10, cosine_iters=9"):
        cosine_lr_schedule(3, 1.0, 0.1, 10, 9)


@pytest.mark.parametrize(("t", "warmup"), [(-1, 10), (0, -1)])
def test_cosine_refuses_negative_steps(t, warmup):
    with pytest.raises(ValueError, match="cosine_lr_schedule: needs 0 <= t"):
        cosine_lr_schedule(t, 1.0, 0.1, warmup, 50)


@given(st.integers(1, 60), st.integers(1, 200), st.floats(0, 1))
def test_cosine_rises_then_falls_without_a_jump(warmup, length, lr_min):
    end = warmup + length
    rates = [cosine_lr_schedule(t, 1.0, lr_min, warmup, end) for t in range(end + 3)]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(lr_min <= rate <= 1.0 for rate in rates[warmup:])
    steepest = max(1 / warmup, 0.5 * math.pi / length)
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize(
    ("t", "rate"), [(0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0), (80, 1.0), (90, 0.6), (100, 0.2), (101, 0.2)]
)
def test_wsd_at_its_points(t, rate):
    assert wsd_lr_schedule(t, 1.0, 0.2, 10, 20, 100) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize("values", [(-1, 10, 20, 100), (0, -1, 20, 100), (0, 10, 0, 100), (0, 10, 20, 29)])
def test_wsd_refuses_what_would_overlap(values):
    t, warmup, decay, end = values
    with pytest.raises(ValueError, match=f"t={t}, warmup_iters={warmup}, decay_iters={decay}, end={end}"):
        wsd_lr_schedule(t, 1.0, 0.1, warmup, decay, end)


@pytest.mark.parametrize(("t", "rate"), [(80, 1.0), (85, 0.6), (90, 1 - 0.8 * 0.5**0.5), (100, 0.2), (101, 0.2)])
def test_the_other_shape_of_the_decay(t, rate):
    assert wsd_lr_schedule(t, 1.0, 0.2, 10, 20, 100, shape="sqrt") == pytest.approx(rate, abs=1e-15)
    config = TrainingConfig(
        schedule="wsd", lr_max=1.0, lr_min=0.2, warmup_iters=10, decay_iters=20, total_steps=100, decay_shape="sqrt"
    )
    assert learning_rate(config, t - 1) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize(
    ("t", "rate"), [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.6), (99, 0.2 + 0.8 / 90), (100, 0.2), (101, 0.2)]
)
def test_linear_at_its_points(t, rate):
    assert linear_lr_schedule(t, 1.0, 0.2, 10, 100) == pytest.approx(rate, abs=1e-15)


def test_linear_reaches_zero_exactly_and_refuses_what_does_not_fit():
    assert linear_lr_schedule(100, 3e-4, 0.0, 10, 100) == 0.0
    assert [linear_lr_schedule(t, 1.0, 0.0, 4, 4) for t in (0, 2, 4, 5)] == [0.0, 0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match="warmup_iters=10, end=9"):
        linear_lr_schedule(3, 1.0, 0.1, 10, 9)


def test_wsd_takes_warm_up_and_decay_that_meet():
    assert wsd_lr_schedule(10, 1.0, 0.1, 10, 20, 30) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_the_first_update_has_a_rate_and_the_last_update_the_last_rate(schedule):
    config = TrainingConfig(total_steps=100, warmup_iters=10, schedule=schedule, lr_max=1.0, lr_min=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == 1.0
    assert learning_rate(config, 99) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert learning_rate(config, 500) == pytest.approx(1.0 if schedule == "constant" else 0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_without_warm_up_every_update_has_a_rate(schedule):
    config = TrainingConfig(total_steps=20, warmup_iters=0, schedule=schedule)
    assert all(0 < learning_rate(config, step) <= config.lr_max for step in range(25))


def test_the_middle_of_each_schedule():
    rates = {
        schedule: learning_rate(
            TrainingConfig(total_steps=110, warmup_iters=10, schedule=schedule, lr_max=1.0, lr_min=0.0), 59
        )
        for schedule in ("cosine", "linear", "wsd", "constant")
    }
    assert rates == {"cosine": pytest.approx(0.5), "linear": pytest.approx(0.5), "wsd": 1.0, "constant": 1.0}


def test_stopping_early_leaves_the_curve_alone():
    full = TrainingConfig(total_steps=100)
    short = TrainingConfig(total_steps=100, stop_at_step=10)
    assert [learning_rate(full, s) for s in range(10)] == [learning_rate(short, s) for s in range(10)]
