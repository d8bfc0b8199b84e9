"""Check that configuration.md is what its script writes, and that the settings without effect on bits have none."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import fit, settings_for, train
from tinytrain_dist.config.schema import FIELDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "scripts" / "configuration_page.py"))

# Another value for every setting that has no effect on bits, except those in the next table.
OTHER_VALUES: dict[str, Any] = {
    "stop_at_step": 6,
    "time_limit": 3000.0,
    "start_limit": 600.0,
    "step_limit": 600.0,
    "log_every": 2,
    "stability_every": 2,
    "eval_every": 2,
    "eval_steps": 2,
    "trackers": (),
    "early_stop_patience": 50,
    "sample_tokens": 0,
    "profile": "2:3",
    "log_save_prefix": "numbers",
    "allow": "seed",
    "max_skipped_steps": 3,
    "allow_drift": True,
    "activation_offload": True,
    "fingerprint_every": 2,
    "ckpt_every": 2,
    "ckpt_save_prefix": "state",
    "keep_last": 1,
    "keep_every": 4,
    "ckpt_async": False,
    "ckpt_writers": 1,
    "snapshot_every": 2,
    "save_limit": 600.0,
    "max_shard_bytes": 8000,
    "copies_keep_last": 1,
    "copies_keep_every": 4,
    "copies_end_limit": 300.0,
}
CHANGED_BY_THE_FOLDER = {"target_dir", "log_dir", "ckpt_dir", "val_data", "checkpoint_copies"}


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == SCRIPT["page"](), "run docs/scripts/configuration_page.py, and commit the page"


def test_every_setting_is_on_the_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"\n### `{name}`\n" not in page] == []


@pytest.mark.multiprocess
def test_settings_without_effect_on_bits_have_none(tmp_path: Path) -> None:
    without_effect = {name for name in FIELDS if SCRIPT["effect_on_bits"](name) == "none"}
    assert without_effect == {*OTHER_VALUES, *CHANGED_BY_THE_FOLDER}
    same = {"reproducible": True, "parallel": "ddp", "activation_checkpointing": "block"}
    plain = settings_for(tmp_path, "plain", **same)
    assert [name for name, value in OTHER_VALUES.items() if plain.get(name, FIELDS[name].default) == value] == []
    before = train(tmp_path, "plain", 2, **same).digests()
    folders = {"log_dir": str(tmp_path / "logs"), "ckpt_dir": str(tmp_path / "saved")}
    folders["checkpoint_copies"] = str(tmp_path / "copies")
    changed = settings_for(tmp_path, "changed", **same, **OTHER_VALUES, **folders, val_data=plain["train_data"])
    run_ranks(2, fit, changed)
    manifest = json.loads((tmp_path / "saved" / "state-00000006" / "manifest.json").read_text())
    after = {name: tensor["blake3"] for kind in manifest["tensors"].values() for name, tensor in kind.items()}
    assert after == before
