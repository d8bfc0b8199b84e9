"""Count the targets of a global batch that count in its loss.

Must not know why a target does not count: a loss mask, the end of a document, or the end of an epoch.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import DistributedContext


class TokenCount:
    """The number of targets by which the summed loss of a global batch is divided."""

    def __init__(self, windows: Windows, config: TrainingConfig, plan: BatchPlan, context: DistributedContext) -> None:
        """Start to sum the counts of all ranks, if the settings allow that some targets do not count. A collective.

        windows: those of this rank. Their count is known on the host, and the sum is taken on the device, so no rank
        waits for its device.
        """
        assert windows.counted is None or config.counts_tokens, "all ranks must agree to sum"
        self._all = plan.tokens_per_step
        self._sum = context.start_sum(windows.num_counted) if config.counts_tokens else None

    @cached_property
    def value(self) -> int | Tensor:
        """The number, at least 1: a batch in which no target counts has the loss 0 / 1, and zero gradients.

        An int, or an int64 scalar on the device. The device is not waited for.
        """
        return self._all if self._sum is None else self._sum.result().clamp(min=1)
