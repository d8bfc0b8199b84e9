"""Compute what each source of train_data contributed to a run: its share of the windows, its loss, its epochs.

Must not know how the sums were made, or where the numbers are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.model.loss import LOSS_UNIT


def source_groups(names: Sequence[str], sums_by_rank: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return each source's share of the windows, and its loss per counted target, since the last logged step.

    names: of the sources. sums_by_rank: for each rank the sums of SourceSums. A source without a counted target has no
    loss. Sums of whole numbers below 2^53 are exact, so the result does not depend on the number of ranks.
    """
    sums = [sum(column) for column in zip(*sums_by_rank, strict=True)]
    count = len(names)
    losses, targets, windows = sums[:count], sums[count : 2 * count], sums[2 * count :]
    total = sum(windows)
    groups = {"source_share": {name: number / total for name, number in zip(names, windows, strict=True)}}
    if any(targets):
        groups["source_loss"] = {
            name: loss * LOSS_UNIT / number for name, loss, number in zip(names, losses, targets, strict=True) if number
        }
    return groups


def ended_epochs(data: TokenDataset, step: int) -> str:
    """Return a sentence about the epochs that end in step `step`; "" if none does."""
    before, now = data.epochs(step - 1), data.epochs(step)
    if before is None or now is None or int(now) == int(before):
        return ""
    first, last = int(before) + 1, int(now)
    return f"epoch {last} ended" if first == last else f"epochs {first} to {last} ended"
