"""Sizes of micro-batches that divide the batch."""

from __future__ import annotations

import pytest

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import possible_micro_batch_sizes
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.errors import ConfigError


def test_sizes_that_divide() -> None:
    config = TrainingConfig(batch_size=24, micro_batch_size="auto")
    assert possible_micro_batch_sizes(config, ParallelDims("ddp", 2, 1, "")) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(ConfigError, match="micro_batch_size: must be set with reproducible = true to a number"):
        TrainingConfig(micro_batch_size="auto", reproducible=True)
    with pytest.raises(ConfigError, match="micro_batch_size: 'all' is not a whole number or one of auto or None"):
        TrainingConfig.from_dict({"micro_batch_size": "all"})
