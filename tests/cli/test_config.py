"""`tinytrain config`: values, where they come from, and output that is a configuration itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

from tests.helpers.tools import Cli
from tests.helpers.training import config_file
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.config.schema import FIELDS


def test_every_value_has_its_origin_and_the_output_is_a_configuration(tinytrain: Cli, tmp_path: Path) -> None:
    path = config_file(tmp_path, total_steps=7)
    code, out, _ = tinytrain("config", path, "--seed", 3)
    assert code == 0
    assert f"total_steps = 7  # {path}\n" in out
    assert "seed = 3  # command line\n" in out
    assert "weight_decay = " in out
    assert "vocab_size = 53  # meta.json of the data\n" in out
    assert "# stop_at_step is not set (default)\n" in out
    assert all(f"# {setting.metadata['help'][:40]}" in out for setting in FIELDS.values())
    (tmp_path / "again.toml").write_text(out)
    assert load_config(tmp_path / "again.toml").resolved() == {
        **load_config(path, {"seed": 3}).resolved(),
        "vocab_size": 53,
    }
    code, changed, _ = tinytrain("config", path, "--seed", 3, "--changed")
    values = {name: value for section in tomllib.loads(changed).values() for name, value in section.items()}
    assert values["seed"] == 3
    assert all(value != FIELDS[name].default for name, value in values.items())


def test_a_derived_size_says_so(tinytrain: Cli) -> None:
    assert "d_ff = 384  # derived from other settings\n" in tinytrain("config", "--d-model", 128)[1]


def test_a_wrong_setting_is_an_error(tinytrain: Cli) -> None:
    code, out, err = tinytrain("config", "--lr-maxx", 3)
    assert (code, out) == (2, "")
    assert "did you mean lr_max?" in err


def test_changed_shows_no_defaults(tinytrain: Cli) -> None:
    code, out, _ = tinytrain("config", "--changed", "--seed", 7)
    assert code == 0
    assert tomllib.loads(out) == {"run": {"seed": 7}}
