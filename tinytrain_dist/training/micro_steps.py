"""Give each micro-step of a rank its micro-batch. Must not know what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinytrain_dist.data.batches import split_micro_batches
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.batch_plan import BatchShare


def micro_steps(
    share: BatchShare, windows: Windows, device: torch.device
) -> Iterator[tuple[int, bool, tuple[Tensor, ...]]]:
    """Yield for each micro-step its number, whether it counts, and what the model is called with.

    windows: those of the share. A micro-step does not count if the rank has no micro-batch left for it. The rank then
    repeats its last one, so a number that is not finite appears there only if it also appears in one that counts.
    """
    micro_batches = split_micro_batches(windows, share.plan.micro_batch_size, device)
    for micro_step in share.micro_steps:
        counts = not share.is_repeated(micro_step)
        if counts:
            micro_batch = next(micro_batches)
        yield micro_step, counts, micro_batch
    assert next(micro_batches, None) is None, "the windows are those of the share"
