"""The length of a run by epochs: exact, where the data is; and a sentence where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinytrain_dist.cli.config import main as config_main
from tinytrain_dist.cli.schedule import main as schedule_main
from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.training.run_length import resolve_epochs, steps_of_epochs


def config(folder: Path, **settings: Any) -> TrainingConfig:
    np.save(folder / "a.npy", np.zeros(101, np.uint16))
    np.save(folder / "b.npy", np.zeros(50, np.uint16))
    data = (str(folder / "a.npy"), str(folder / "b.npy"))
    values = {"train_data": data, "sampling": "shuffle", "epochs": 3.0, "context_len": 10, "batch_size": 4, **settings}
    return TrainingConfig(**values)


def test_steps_draw_all_windows_of_the_epochs(tmp_path: Path) -> None:
    resolved = resolve_epochs(config(tmp_path))
    assert (resolved.epochs, resolved.total_steps) == (None, 12)  # 3 x (11 + 5) / 4
    assert resolve_epochs(resolved) is resolved
    sizes = BatchSizes.of(10)
    assert [steps_of_epochs(epochs, 1000, sizes) for epochs in (0.1, 0.3, 1.001, 1e-9, 7.0)] == [10, 30, 101, 1, 700]


def test_growing_batches_need_more_steps(tmp_path: Path) -> None:
    growing = config(tmp_path, batch_size_warmup=("0: 1", "3: 2", "5: 4"))
    assert resolve_epochs(growing).total_steps == 3 + 2 + 11  # 48 windows = 3 x 1 + 2 x 2 + 11 x 4, with 3 to spare


def test_settings_that_do_not_fit_the_length_name_the_epochs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop_at_step: 13 .* \(3\.0 epochs of 16 windows give total_steps = 12\)"):
        resolve_epochs(config(tmp_path, stop_at_step=13))


def test_more_windows_than_can_be_counted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs: 1e\+300 must be at most 2\*\*53 = 9007199254740992; set a smaller"):
        config(tmp_path, epochs=1e300)
    with pytest.raises(
        ConfigError, match=r"epochs: 9\d+\.0 epochs of 16 windows are more than 2\*\*53 = 9007199254740992 w"
    ):
        resolve_epochs(config(tmp_path, epochs=9e15))


def test_without_the_data_the_reason_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--sampling shuffle --epochs 2 --vocab-size 9 --batch-size 4 --context-len 10".split()
    there, missing = str(tmp_path / "a.npy"), str(tmp_path / "none.npy")
    config(tmp_path)
    with pytest.raises(ConfigError, match=r"epochs: total_steps follows .* cannot be read here \(.*none\.npy: no such"):
        schedule_main([*flags, "--train-data", missing])
    assert schedule_main([*flags, "--train-data", there]) == 0
    assert "6 steps" in capsys.readouterr().out
    config_main([*flags, "--train-data", there])
    assert "# total_steps is not set (epochs make it 6)" in capsys.readouterr().out
    config_main([*flags, "--train-data", missing])
    assert "# total_steps is not set (epochs: total_steps follows" in capsys.readouterr().out
