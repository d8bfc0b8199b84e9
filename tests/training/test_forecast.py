"""Check the forecast: bytes that are sent, and the mode that `auto` chooses."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers.forecasts import SMALL, estimated, meta_model, two_nodes
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS
from tinytrain_dist.training import forecast


def test_bytes_on_the_wire(world: DistributedContext) -> None:
    weights = 4 * sum(p.numel() for p in meta_model().parameters())
    # one ring over four ranks on two nodes: 2 x 3/4 past every rank, and as much out of each node
    sent = forecast.sent_bytes(estimated(world, parallel="ddp"), two_nodes())
    assert sent == pytest.approx((1.5 * weights, 1.5 * weights), rel=0.01)
    # gathered in forward, and all blocks but the last in backward as well; scattered once; each in each of two passes
    once = forecast.sent_bytes(estimated(world, parallel="fsdp", micro_batch_size=4), two_nodes())
    twice = forecast.sent_bytes(estimated(world, parallel="fsdp", micro_batch_size=2), two_nodes())
    assert twice == pytest.approx([2 * each for each in once], rel=0.01)
    again = 4 * sum(p.numel() for block in meta_model().model.layers[:-1] for p in block.parameters())
    assert once[0] == pytest.approx(0.75 * (2 * weights + again), rel=0.01)
    # shards inside a node, replicas across: only halves of the gradients leave it, from both ranks
    _, across = forecast.sent_bytes(estimated(world, parallel="hsdp"), two_nodes())
    assert across == pytest.approx(2 * weights / 2, rel=0.01)
    # all-to-all and all-gather instead of a ring: each rank sends half of its gradients to the other node, then parts
    _, across = forecast.sent_bytes(
        estimated(world, parallel="ddp", reproducible=True, micro_batch_size=4), two_nodes()
    )
    assert across == pytest.approx(2 * weights / 2 + 0.75 * weights, rel=0.02)


def test_auto_shards_when_one_device_is_too_small(world: DistributedContext) -> None:
    config = TrainingConfig(**{**SMALL, "parallel": "auto"})
    for memory, mode in ((1e12, "ddp"), (1e3, "hsdp")):
        device = dataclasses.replace(DEVICE_SPECS["h100"], memory=memory, context=0)
        assert forecast.forecast(config, world, forecast.Cluster(2, 2, device), 1.0).parallel_dims.mode == mode


def test_gathered_weights_stay_as_in_the_run_that_is_forecast(world: DistributedContext) -> None:
    config = TrainingConfig(**{**SMALL, "parallel": "fsdp"})
    kept = forecast.forecast(config, world, two_nodes(), 1e6)
    assert kept.config.reshard_after_forward is False
    small = dataclasses.replace(two_nodes(), device=dataclasses.replace(DEVICE_SPECS["h100"], memory=1e3, context=0))
    assert forecast.forecast(config, world, small, 1e6).config.reshard_after_forward is None
    cpus = dataclasses.replace(two_nodes(), device=dataclasses.replace(DEVICE_SPECS["h100"], name="cpu"))
    assert forecast.forecast(config, world, cpus, 1e6).config.reshard_after_forward is None
    freed = forecast.forecast(dataclasses.replace(config, reshard_after_forward=True), world, two_nodes(), 1e6)
    assert kept.inside_bytes < freed.inside_bytes, "backward gathers nothing again"
