"""Plans for contexts: the fewest GPUs on which something fits, and the fastest settings on them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.forecasts import SMALL
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, DeviceSpec
from tinytrain_dist.training import context_plans
from tinytrain_dist.training.context_plans import RECOMPUTATION, ContextPlan
from tinytrain_dist.training.forecast import Forecast, cluster_of, simulated_ranks
from tinytrain_dist.training.scaling import PredictedStep, exchange_cost, predicted_step

CONFIG = TrainingConfig(**{**SMALL, "num_layers": 2, "precision": "bf16", "parallel": "ddp"})
PER_NODE = 2
LENGTH = 16_384
FLOPS = 1e6  # for a token
Choice = tuple[int, int]  # cp, and the place in RECOMPUTATION


def device_with(nbytes: float) -> DeviceSpec:
    """Return an H100 on which tensors may take so many bytes."""
    return replace(DEVICE_SPECS["h100"], memory=nbytes / 0.92, context=0)


def plans(device: DeviceSpec, *num_gpus: int) -> list[ContextPlan]:
    return list(context_plans.context_plans(CONFIG, [LENGTH], device, PER_NODE, num_gpus))


@pytest.fixture
def simulated_once(steps: dict[int, dict[Choice, PredictedStep]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches take the forecasts of `steps`, which each need a simulation."""

    def known(*args: Any) -> Forecast:
        _, _, cp, recomputation, _, cluster = args
        found = steps[cluster.num_devices][cp, RECOMPUTATION.index(recomputation)].forecast
        return replace(found, fits=cluster.fits(found.estimate))

    monkeypatch.setattr(context_plans, "_forecast", known)


@pytest.fixture(scope="module")
def steps() -> dict[int, dict[Choice, PredictedStep]]:
    """Return the step of each choice of cp and recomputation, by number of GPUs."""
    found: dict[int, dict[Choice, PredictedStep]] = {}
    for count in (1, 2):
        cluster = cluster_of(count, PER_NODE, DEVICE_SPECS["h100"])
        with simulated_ranks(cluster) as context:
            for cp, level in itertools.product((1, 2), range(len(RECOMPUTATION))):
                if cp <= count:
                    planned = context_plans._forecast(CONFIG, LENGTH, cp, RECOMPUTATION[level], context, cluster)
                    step = predicted_step(planned, context, cluster, FLOPS)
                    assert step is not None
                    found.setdefault(count, {})[cp, level] = step
    return found


def needed(step: PredictedStep) -> int:
    return step.forecast.estimate.nbytes


def choice_of(plan: ContextPlan) -> Choice:
    assert plan.step is not None
    settings = plan.step.forecast.config
    levels = [all(getattr(settings, name) == value for name, value in each.items()) for each in RECOMPUTATION]
    return settings.cp, levels.index(True)


def test_more_ranks_and_more_recomputation_need_less(steps: dict[int, dict[Choice, PredictedStep]]) -> None:
    """The search relies on this order."""
    for choices in steps.values():
        for (cp, level), step in choices.items():
            for smaller in ((2 * cp, level), (cp, level + 1)):
                assert smaller not in choices or needed(choices[smaller]) < needed(step), (cp, level)


@pytest.mark.usefixtures("simulated_once")
def test_the_smallest_number_of_gpus_is_found(steps: dict[int, dict[Choice, PredictedStep]]) -> None:
    least = {count: min(map(needed, choices.values())) for count, choices in steps.items()}
    assert least[1] > least[2]
    for count, expected in ((1, [1, 2]), (2, [2])):
        found = plans(device_with(least[count]))
        assert [plan.cluster.num_devices for plan in found] == expected, "a whole node is shown too"
        assert all(plan.step is not None for plan in found)


@pytest.mark.usefixtures("simulated_once")
def test_a_gpu_is_enough_if_only_the_host_has_too_little_memory() -> None:
    found = plans(replace(DEVICE_SPECS["h100"], host_memory=1))
    assert [plan.cluster.num_devices for plan in found] == [1, 2]


@pytest.mark.usefixtures("simulated_once")
def test_the_fastest_settings_that_fit_are_taken(steps: dict[int, dict[Choice, PredictedStep]]) -> None:
    rooms = sorted(map(needed, steps[2].values()))
    for room in rooms:
        (plan,) = plans(device_with(room), 2)
        speeds = {choice: step.mfu for choice, step in steps[2].items() if needed(step) <= room}
        assert speeds[choice_of(plan)] >= context_plans.NOTICEABLE * max(speeds.values()), room


@pytest.mark.usefixtures("simulated_once")
def test_what_fits_nowhere_is_shown_with_what_it_needs(steps: dict[int, dict[Choice, PredictedStep]]) -> None:
    least = min(map(needed, steps[2].values()))
    (plan,) = plans(device_with(least - 1), 2)
    assert plan.step is None
    assert plan.smallest.estimate.nbytes == least
    assert (plan.smallest.config.cp, plan.smallest.config.activation_offload) == (2, True)
    # nor if only the memory of the host is too small
    (plan,) = plans(replace(device_with(least), host_memory=1e3), 2)
    assert plan.step is None


def test_steps_have_a_sequence_for_each_data_parallel_rank(steps: dict[int, dict[Choice, PredictedStep]]) -> None:
    assert CONFIG.batch_size * CONFIG.context_len < LENGTH, "the batch of the configuration is smaller"
    for count, choices in steps.items():
        for (cp, _), step in choices.items():
            assert step.forecast.plan.micro_batch_size == 1
            assert step.forecast.plan.batch_size == count // cp


def test_the_exchange_costs_its_bytes(steps: dict[int, dict[Choice, PredictedStep]]) -> None:
    assert exchange_cost(steps[2][1, 0], DEVICE_SPECS["h100"], 8) is None
    step = steps[2][2, 3]
    cost = exchange_cost(step, DEVICE_SPECS["h100"], 8)
    assert cost is not None
    # three times, because it is recomputed: queries, keys and values, and what attention returns
    sent = LENGTH // 2 * (4 + 2 * 4 + 4) * CONFIG.head_width * 2
    assert cost.sent_bytes == pytest.approx(3 * CONFIG.num_layers * sent / 2)
    # computation waits for all of it, and a little longer where weights are gathered over the same link
    assert cost.seconds == pytest.approx(step.timeline.waits["parts of sequences"], rel=0.1)
    assert cost.seconds_across > cost.seconds
