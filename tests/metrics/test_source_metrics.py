"""Numbers by source: shares and losses from the sums of all ranks, and the ends of epochs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.metrics.source_metrics import ended_epochs, source_groups
from tinytrain_dist.model.loss import LOSS_UNIT
from tinytrain_dist.training.source_sums import SourceSums


def test_losses_of_windows_are_summed_by_source() -> None:
    sums = SourceSums(3, torch.device("cpu"))
    windows = Windows(torch.zeros(4, 6, dtype=torch.int32), sources=torch.tensor([2, 0, 2, 0]))
    rows = [torch.tensor([[1.5, 2.0], [5, 4]]).double(), torch.tensor([[2.5, float("nan")], [3, 5]]).double()]
    sums.add(windows, rows)
    taken = sums.take().read()
    assert taken == [2.0 / LOSS_UNIT, 0, 4.0 / LOSS_UNIT, 4, 0, 8, 2, 0, 2], "the window that is not finite has no loss"
    assert sums.take().read() == [0] * 9
    groups = source_groups(["a", "b", "c"], [taken, taken])
    assert groups == {"source_share": {"a": 0.5, "b": 0, "c": 0.5}, "source_loss": {"a": 0.5, "c": 0.5}}
    sums.add(windows, [])
    assert source_groups(["a", "b", "c"], [sums.take().read()]).keys() == {"source_share"}


@pytest.mark.parametrize(
    ("batch", "step", "text"), [(2, 3, ""), (2, 4, "epoch 1 ended"), (40, 2, "epochs 6 to 10 ended")]
)
def test_epochs_end_in_the_step_that_draws_their_last_window(tmp_path: Path, batch: int, step: int, text: str) -> None:
    np.save(tmp_path / "train.npy", np.arange(40, dtype=np.uint16))
    assert ended_epochs(TokenDataset([str(tmp_path / "train.npy")], 5, shuffle_batch=batch), step) == text
    assert ended_epochs(TokenDataset([str(tmp_path / "train.npy")], 5), step) == ""
