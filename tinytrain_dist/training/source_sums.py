"""Sum the losses of a run by the source of each window, without waiting for the device.

The sums are whole numbers, so they are the same in every order of addition: on any number of ranks, in any mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.metrics.step_timer import HostCopy
from tinytrain_dist.model.loss import LOSS_UNIT


class SourceSums:
    """For each source: the summed loss in units of LOSS_UNIT, the targets that count, and the windows."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        """Begin with zeros."""
        self._sums = torch.zeros(3, num_sources, dtype=torch.int64, device=device)

    def add(self, windows: Windows, row_losses: list[Tensor]) -> None:
        """Add the windows of a step, in order. row_losses: see LMHead; empty: losses are not known.

        A window whose loss is not finite counts only as a window.
        """
        assert windows.sources is not None, "there are several sources"
        sources = windows.sources.to(self._sums.device, non_blocking=True)
        columns = torch.zeros(3, len(windows), dtype=torch.int64, device=self._sums.device)
        columns[2] = 1
        if row_losses:
            losses, targets = torch.cat(row_losses, dim=1)
            finite = losses.isfinite()
            columns[0] = torch.where(finite, losses / LOSS_UNIT, 0).round()
            columns[1] = torch.where(finite, targets, 0)
        self._sums.index_add_(1, sources, columns)

    def take(self) -> HostCopy:
        """Start to copy the sums to the host, one kind after the other, and begin again with zeros."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return HostCopy(taken.flatten())
