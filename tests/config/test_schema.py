"""Check TrainingConfig: its fields and derived values, types, unknown names, and its text as TOML."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.configs import only_problem, write
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.config.sections import SECTIONS
from tinytrain_dist.errors import ConfigError, TinytrainError

ROOT = Path(__file__).resolve().parents[2]


# The first settings of this project. Their names are public, so they must stay.
NOTES = set(
    """batch_size context_len vocab_size num_layers num_heads d_model d_ff rope_theta total_steps log_every eval_every
    ckpt_every lr_max lr_min betas eps weight_decay grad_clip_norm warmup_iters cosine_iters device target_dir ckpt_dir
    log_dir ckpt_save_prefix log_save_prefix ckpt_path_to_resume""".split()
)


def test_every_original_name_is_a_field():
    assert set(FIELDS) >= NOTES


def test_target_dir_is_a_field():
    assert "target_dir" in {field.name for field in dataclasses.fields(TrainingConfig)}
    assert TrainingConfig(target_dir="elsewhere").checkpoints_dir == Path("elsewhere/checkpoints")


def test_every_public_attribute_is_a_field_or_derived():
    # a dataclass line without annotation is not a field: it could be neither set from TOML nor saved
    names = {name for name in vars(TrainingConfig) if not name.startswith("_")}
    stray = [n for n in names - set(FIELDS) if not isinstance(vars(TrainingConfig)[n], property | classmethod)]
    assert [name for name in stray if not callable(getattr(TrainingConfig, name))] == []


def test_every_field_has_a_heading_and_a_sentence():
    assert {f.metadata["section"] for f in FIELDS.values()} == set(SECTIONS)
    assert all(f.metadata["help"] for f in FIELDS.values())


def test_the_value_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().seed = 1  # type: ignore[misc]


def test_derived_facts_follow_their_settings():
    c = TrainingConfig(total_steps=1000, num_heads=8, d_model=512)
    assert (c.kv_heads, c.head_width, c.warmup_steps, c.cosine_end, c.decay_steps) == (8, 64, 10, 1000, 100)
    assert (c.last_step, c.resume_from, c.logs_dir) == (1000, "auto", Path("runs/default/logs"))
    c = TrainingConfig(
        total_steps=1000, num_heads=8, num_kv_heads=2, head_dim=32, warmup_iters=0, cosine_iters=500, stop_at_step=7,
        ckpt_path_to_resume="some/checkpoint", log_dir="l", ckpt_dir="c",
    )  # fmt: skip
    assert (c.kv_heads, c.head_width, c.warmup_steps, c.cosine_end) == (2, 32, 0, 500)
    assert (c.last_step, c.resume_from, c.logs_dir, c.checkpoints_dir) == (7, "some/checkpoint", Path("l"), Path("c"))


def test_betas_come_back_as_a_tuple():
    again = TrainingConfig.from_dict(json.loads(json.dumps(TrainingConfig(betas=(0.8, 0.9)).to_dict())))
    assert again.betas == (0.8, 0.9)
    assert isinstance(again.betas, tuple)
    assert isinstance(TrainingConfig.from_dict({"betas": [0, 0.5]}).betas[0], float)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("weigth_decay", "weight_decay"), ("batchsize", "batch_size"), ("grad-clip-norm", "grad_clip_norm")],
)
def test_an_unknown_setting_comes_with_the_nearest_name(wrong, right):
    assert only_problem(**{wrong: 1}) == f"{wrong}: unknown setting; did you mean {right}?"


def test_an_unknown_setting_like_no_other_points_to_help():
    assert only_problem(zzzzzz=1) == "zzzzzz: unknown setting; tinytrain config --help lists all of them"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("batch_size", "32", "a whole number"),
        ("batch_size", 32.0, "a whole number"),
        ("batch_size", True, "a whole number"),
        ("batch_size", None, "a whole number"),
        ("lr_max", "fast", "a number"),
        ("lr_max", True, "a number"),
        ("reproducible", 1, "true or false"),
        ("compile", "true", "true or false or None"),
        ("target_dir", 3, "a string"),
        ("parallel", "fdsp", "one of auto, none, ddp, fsdp, hsdp"),
        ("betas", [0.9], "two numbers"),
        ("betas", [0.9, "x"], "two numbers"),
        ("betas", 0.9, "two numbers"),
        ("vocab_size", "x", "a whole number or None"),
        ("train_data", {"a": 1}, "a string or a list of strings or None"),
        ("train_data", [], "a string or a list of strings or None"),
        ("train_data", ["a.npy", 3], "a string or a list of strings or None"),
        ("train_weights", 0.5, "a list of numbers or a list of strings or None"),
        ("train_weights", [0.5, "x"], "a list of numbers or a list of strings or None"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(key, value, kind):
    assert only_problem(**{key: value}) == f"{key}: {value!r} is not {kind}"


def test_whole_numbers_are_accepted_where_a_number_is_expected():
    config = TrainingConfig.from_dict({"lr_max": 1, "grad_clip_norm": None})
    assert (config.lr_max, type(config.lr_max), config.grad_clip_norm) == (1.0, float, None)


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_dict({"weigth_decay": 1, "lr_max": "x", "batch_size": 0, "eps": -1.0}, source="my.toml")
    error = caught.value
    assert [p.split(":")[0] for p in error.problems] == ["weigth_decay", "lr_max", "batch_size", "eps"]
    lines = str(error).splitlines()
    assert lines[0] == "4 problems in my.toml"
    assert all(line.startswith("  ") for line in lines[1:])
    assert isinstance(error, TinytrainError)
    assert isinstance(error, ValueError)


def test_round_trip_through_toml(tmp_path):
    config = TrainingConfig(
        target_dir='a "quoted" \\ folder', val_data=None, vocab_size=77, betas=(0.8, 0.99), eps=1e-12, compile=True,
        parallel="hsdp", dp_shard=2, time_limit=0.1, total_steps=50_000, num_kv_heads=4, d_ff=96,
        head_dim=48,
    )  # fmt: skip
    text = config.to_toml()
    again = load_config(write(tmp_path / "a.toml", text))
    assert again == config
    assert again.to_toml() == text
    assert set(tomllib.loads(text)) == set(SECTIONS)


def test_toml_has_the_derived_sizes_written_out(tmp_path):
    config = TrainingConfig(d_model=256)
    again = load_config(write(tmp_path / "a.toml", config.to_toml()))
    assert again == dataclasses.replace(config, d_ff=704, num_kv_heads=16, head_dim=16)


def test_toml_begins_with_a_comment():
    assert TrainingConfig().to_toml().startswith("# the resolved configuration")


@given(
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    lr=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_text_and_number_survives_toml(name, lr, seed):
    config = TrainingConfig(target_dir=name, lr_max=lr, lr_min=0.0, seed=seed)
    tree = tomllib.loads(config.to_toml())
    values = {key: value for section in tree.values() for key, value in section.items()}
    again = TrainingConfig.from_dict(values)
    assert (again.target_dir, again.lr_max, again.seed) == (name, lr, seed)


def test_steps_to_profile_include_both_ends():
    assert list(TrainingConfig(profile="3:5").profiled_steps) == [3, 4, 5]
    assert list(TrainingConfig().profiled_steps) == []


def test_toml_has_the_sections_in_their_order():
    sections = ["run", "data", "model", "optimizer", "parallel", "compute", "checkpoint"]
    assert list(SECTIONS) == sections
    text = TrainingConfig(cpu_threads=2, parallel="ddp").to_toml()
    assert list(tomllib.loads(text)) == sections
    assert tomllib.loads(text)["compute"]["cpu_threads"] == 2
    assert tomllib.loads(text)["parallel"]["parallel"] == "ddp"
