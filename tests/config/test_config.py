"""Owns the checks of TrainingConfig: what it refuses and in which words, TOML, the command line, derived facts.

Must not know torch: the module under test promises that a login node can check a run without it.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.config.loading import load_config, parse_command_line, read_toml, resolve_vocab_size
from tinytrain_dist.config.schema import FIELDS, SECTIONS, TrainingConfig
from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.utils.text import format_list

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

# The fields of the notes that this project grew from, in no order: their names are public API.
NOTES = set(
    """batch_size context_len vocab_size num_layers num_heads d_model d_ff rope_theta total_steps log_every eval_every
    ckpt_every lr_max lr_min betas eps weight_decay grad_clip_norm warmup_iters cosine_iters device target_dir ckpt_dir
    log_dir ckpt_save_prefix log_save_prefix ckpt_path_to_resume""".split()
)


def problems_of(**values: object) -> list[str]:
    """The sentences with which these settings are refused; [] when they are taken."""
    try:
        TrainingConfig.from_dict(values)
    except ConfigError as error:
        return error.problems
    return []


def only_problem(**values: object) -> str:
    problems = problems_of(**values)
    assert len(problems) == 1, problems
    return problems[0]


# --- the value -----------------------------------------------------------------------------------------------------


def test_every_name_of_the_notes_is_a_field():
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


def test_replace_of_d_model_gives_a_new_ffn_dim():
    small = TrainingConfig(d_model=256)
    assert small.ffn_dim == 704  # 8/3 x 256 = 682.67, up to a multiple of 64
    large = dataclasses.replace(small, d_model=512)
    assert large.ffn_dim == 1408
    assert large.d_ff is None
    assert dataclasses.replace(large, d_ff=100).ffn_dim == 100


@given(st.integers(1, 4096))
def test_ffn_dim_is_the_next_multiple_of_64(half_width):
    d_model = 2 * half_width
    ffn_dim = TrainingConfig(d_model=d_model, num_heads=1).ffn_dim
    assert ffn_dim % 64 == 0
    assert ffn_dim * 3 >= 8 * d_model > (ffn_dim - 64) * 3


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


def test_listed_names_the_first_and_says_that_there_are_more():
    assert format_list([1, 2, 3]) == "1, 2, 3"
    assert format_list(list(range(1, 20)), most=3) == "1, 2, 3, ..."


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("weigth_decay", "weight_decay"), ("batchsize", "batch_size"), ("grad-clip-norm", "grad_clip_norm")],
)
def test_an_unknown_setting_comes_with_the_nearest_name(wrong, right):
    assert only_problem(**{wrong: 1}) == f"{wrong}: unknown setting; did you mean {right}?"


def test_an_unknown_setting_like_no_other_points_to_help():
    assert only_problem(zzzzzz=1) == "zzzzzz: unknown setting; launch/train.py --help lists all of them"


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
        ("target_dir", 3, "a text"),
        ("parallel", "fdsp", "one of auto, none, ddp, fsdp, hsdp"),
        ("betas", [0.9], "two numbers"),
        ("betas", [0.9, "x"], "two numbers"),
        ("betas", 0.9, "two numbers"),
        ("vocab_size", "x", "a whole number or None"),
        ("train_data", {"a": 1}, "a text or a list of texts or None"),
        ("train_data", [], "a text or a list of texts or None"),
        ("train_data", ["a.npy", 3], "a text or a list of texts or None"),
        ("train_weights", 0.5, "a list of numbers or None"),
        ("train_weights", [0.5, "x"], "a list of numbers or None"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(key, value, kind):
    assert only_problem(**{key: value}) == f"{key}: {value!r} is not {kind}"


def test_whole_numbers_are_taken_where_a_number_is_wanted():
    config = TrainingConfig.from_dict({"lr_max": 1, "grad_clip_norm": None})
    assert (config.lr_max, type(config.lr_max), config.grad_clip_norm) == (1.0, float, None)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_dict({"weigth_decay": 1, "lr_max": "x", "batch_size": 0, "eps": -1.0}, source="my.toml")
    error = caught.value
    assert [p.split(":")[0] for p in error.problems] == ["weigth_decay", "lr_max", "batch_size", "eps"]
    lines = str(error).splitlines()
    assert lines[0] == "4 problems in my.toml"
    assert all(line.startswith("  ") for line in lines[1:])
    assert isinstance(error, TinytrainError)
    assert isinstance(error, ValueError)


def test_one_problem_is_written_in_the_singular():
    assert str(ConfigError("a: b", "c")) == "1 problem in c\n  a: b"


@pytest.mark.parametrize(
    "name",
    "total_steps log_every eval_every eval_steps batch_size context_len num_layers num_heads d_model ckpt_every "
    "keep_last max_shard_bytes max_skipped_steps micro_batch_size vocab_size num_kv_heads head_dim d_ff stop_at_step "
    "keep_every dp_replicate dp_shard loss_chunk_tokens cosine_iters decay_iters rope_original_context_len".split(),
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(name, value):
    assert only_problem(**{name: value}).startswith(f"{name}: {value} must be at least 1")


@pytest.mark.parametrize("name", "lr_max eps norm_eps rope_theta grad_clip_norm time_limit rope_scaling_factor".split())
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_positive_and_finite(name, value):
    assert only_problem(**{name: value}) == f"{name}: {value} must be greater than 0 and finite"


@pytest.mark.parametrize(
    ("name", "value"), [("lr_min", -0.1), ("weight_decay", float("nan")), ("seed", -1), ("warmup_iters", -1)]
)
def test_some_numbers_are_not_negative(name, value):
    assert only_problem(**{name: value}) == f"{name}: {value} must not be negative"


def test_a_seed_is_one_word():
    # the draws of evaluation have 1 in the second word of the generator's key
    assert problems_of(seed=2**64 - 1) == []
    assert only_problem(seed=2**64).startswith("seed: 18446744073709551616 must be less than 2**64")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"d_model": 100, "num_heads": 3}, "d_model: 100 is not a multiple of num_heads 3"),
        ({"d_model": 12, "num_heads": 4}, "d_model: head width 3 is odd"),
        ({"head_dim": 5}, "d_model: head width 5 is odd"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 8"),
        (
            {"batch_size": 12, "micro_batch_size": 5},
            "batch_size: 12 is not a multiple of micro_batch_size 5; micro_batch_size can be 1, 2, 3, 4, 6, 12",
        ),
        ({"lr_min": 0.2, "lr_max": 0.1}, "lr_min: 0.2 is greater than lr_max 0.1"),
        ({"betas": [0.9, 1.0]}, "betas: (0.9, 1.0) must both lie in [0, 1)"),
        ({"betas": [float("nan"), 0.9]}, "betas: (nan, 0.9) must both lie in [0, 1)"),
        ({"warmup_iters": 50, "cosine_iters": 40}, "cosine_iters: 40 ends before warmup_iters 50"),
        (
            {"schedule": "wsd", "total_steps": 100, "warmup_iters": 50, "decay_iters": 51},
            "decay_iters: 51 + warmup_iters 50 is more than total_steps 100",
        ),
        ({"resume": "never", "ckpt_path_to_resume": "x"}, "resume: 'never' contradicts ckpt_path_to_resume 'x'"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling_factor: needs rope_original_context_len"),
        ({"rope_original_context_len": 8}, "rope_scaling_factor: needs rope_original_context_len"),
        (
            {"rope_scaling_factor": 8.0, "rope_original_context_len": 64, "rope_low_freq_factor": 4.0},
            "rope_low_freq_factor: 4.0 must be below 4.0",
        ),
        ({"total_steps": 10, "stop_at_step": 11}, "stop_at_step: 11 is beyond total_steps 10"),
        ({"reproducible": True}, "micro_batch_size: must be set with reproducible = true"),
        ({"log_save_prefix": "a/b"}, "ckpt_save_prefix, log_save_prefix: must be plain names"),
        ({"ckpt_save_prefix": ""}, "ckpt_save_prefix, log_save_prefix: must be plain names"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, sentence):
    assert only_problem(**values).startswith(sentence)


@pytest.mark.parametrize(
    ("values", "with_effect"),
    [
        ({"schedule": "constant", "cosine_iters": 10}, {"schedule": "cosine"}),
        ({"schedule": "cosine", "decay_iters": 10}, {"schedule": "wsd"}),
        ({"parallel": "ddp", "dp_replicate": 2}, {"parallel": "hsdp"}),
        ({"parallel": "auto", "dp_shard": 2}, {"parallel": "hsdp"}),
        (
            {"rope_low_freq_factor": 2.0},
            {"rope_scaling_factor": 8.0, "rope_original_context_len": 64},
        ),
    ],
)
def test_a_setting_without_effect_is_an_error(values, with_effect):
    assert "has no effect with" in only_problem(**{"warmup_iters": 1, **values})
    assert problems_of(**{"warmup_iters": 1, **values, **with_effect}) == []


# --- TOML ----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_settings_are_read_under_their_headings_or_without_any(tmp_path):
    path = write(tmp_path / "a.toml", 'seed = 7\n[data]\nbatch_size = 8\n[parallel]\nparallel = "ddp"\n')
    assert load_config(path) == TrainingConfig(seed=7, batch_size=8, parallel="ddp")
    assert load_config(path, {"seed": 9}).seed == 9
    assert load_config(None) == TrainingConfig()


def test_a_file_with_several_problems_says_them_all(tmp_path):
    text = (
        "seed = 1\n[run]\nseed = 2\nbatch_size = 4\n[optimiser]\nlr_max = 1.0\n[optimizer]\nweigth_decay = 1\neps = 0\n"
    )
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"log_every": 0})
    assert caught.value.problems == [
        "seed: set twice, to 1 and 2; keep one",
        "batch_size: stands under [run]; move it to [data]",
        "[optimiser]: unknown heading; use one of optimizer",
        "weigth_decay: unknown setting; did you mean weight_decay?",
        "log_every: 0 must be at least 1",
        "eps: 0.0 must be greater than 0 and finite",
    ]
    assert str(caught.value).startswith(f"6 problems in {path}")


def test_a_layout_problem_alone_is_an_error_too(tmp_path):
    path = write(tmp_path / "a.toml", "[run]\nbatch_size = 4\n")
    with pytest.raises(ConfigError, match="1 problem"):
        load_config(path)


def test_an_unknown_heading_like_no_other_lists_all_of_them(tmp_path):
    _, problems = read_toml(write(tmp_path / "a.toml", "[zzz]\n"))
    assert problems == [f"[zzz]: unknown heading; use one of {', '.join(SECTIONS)}"]


@pytest.mark.parametrize("text", ["seed = \n", "seed = 1\nseed = 2\n"])
def test_a_file_that_is_not_toml(tmp_path, text):
    with pytest.raises(ConfigError, match=r"is not TOML: .*line"):
        load_config(write(tmp_path / "a.toml", text))


def test_a_file_of_other_bytes_or_a_missing_file_is_a_sentence(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.toml")


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


def test_toml_is_commented_as_ours():
    assert TrainingConfig().to_toml().startswith("# the resolved configuration")


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    lr=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_text_and_number_survives_toml(name, lr, seed):
    config = TrainingConfig(target_dir=name, lr_max=lr, lr_min=0.0, seed=seed)
    tree = tomllib.loads(config.to_toml())
    values = {key: value for section in tree.values() for key, value in section.items()}
    again = TrainingConfig.from_dict(values)
    assert (again.target_dir, again.lr_max, again.seed) == (name, lr, seed)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_is_a_page_of_documentation(path):
    config = load_config(path)
    assert config.train_data is not None
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    assert head[0].endswith(".")  # the purpose, one sentence
    words = " ".join(head)
    assert "hardware " in words
    assert re.search(r"\btime\b", words)
    assert re.search(r"\bloss\b", words)
    assert "command " in words
    command = words[words.index("command ") :]
    assert f"configs/{path.name}" in command or "launch/" in command


def test_there_are_configs():
    assert {"quickstart", "tinystories"} <= {path.stem for path in CONFIGS}


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [["--batch-size", "8"], ["--batch_size", "8"], ["--batch-size=8"], ["--batch_size=8"]])
def test_dashes_underscores_and_equals_are_the_same(flag):
    assert parse_command_line(flag) == TrainingConfig(batch_size=8)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--compile"], True), (["--compile", "true"], True), (["--compile=True"], True), (["--compile=true"], True),
        (["--no-compile"], False), (["--no_compile"], False), (["--compile", "false"], False),
        (["--compile=False"], False),
    ],
)  # fmt: skip
def test_booleans_can_be_written_in_every_way(tmp_path, flags, value):
    path = write(tmp_path / "a.toml", f"[parallel]\ncompile = {'false' if value else 'true'}\n")
    assert parse_command_line([str(path), *flags, "--seed", "3"]) == TrainingConfig(compile=value, seed=3)


def test_betas_take_two_values():
    assert parse_command_line(["--betas", "0.5", "0.75", "--seed", "1"]).betas == (0.5, 0.75)


def test_none_and_text_with_equals_sign():
    config = parse_command_line(["--grad-clip-norm", "None", "--target-dir=a=b"])
    assert (config.grad_clip_norm, config.target_dir) == (None, "a=b")


def test_every_setting_is_a_flag():
    flags = []
    for name in FIELDS:
        value = getattr(TrainingConfig(), name)
        flags += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    assert parse_command_line(flags) == TrainingConfig()


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path / "a.toml", "[run]\nseed = 1\ntotal_steps = 5\n")
    config = parse_command_line([str(path), "--seed", "2"])
    assert (config.seed, config.total_steps) == (2, 5)
    assert parse_command_line([str(path)]).seed == 1
    assert parse_command_line([]) == TrainingConfig()


def test_unknown_flags_come_together_with_all_other_problems(tmp_path):
    path = write(tmp_path / "a.toml", "[run]\nlog_every = 0\n[modle]\n")
    with pytest.raises(ConfigError) as caught:
        parse_command_line(
            [str(path), "--weigth-decay", "0.1", "--batch-size", "0", "--no-seed", "--dmodel=3", "--no-such"]
        )
    assert caught.value.problems == [
        "[modle]: unknown heading; use one of model",
        "weigth_decay: unknown setting; did you mean weight_decay?",
        "no_seed: unknown setting; did you mean seed?",
        "dmodel: unknown setting; did you mean d_model?",
        "no_such: unknown setting; launch/train.py --help lists all of them",
        "log_every: 0 must be at least 1",
        "batch_size: 0 must be at least 1",
    ]


def test_a_negative_value_is_a_value():
    with pytest.raises(ConfigError, match="seed: -1 must not be negative"):
        parse_command_line(["--seed", "-1"])


@pytest.mark.parametrize(
    "args", [["--seed", "x"], ["--compile", "maybe"], ["--betas", "0.9"], ["--seed=1", "stray"], ["--seed=1", "a.toml"]]
)
def test_a_value_that_cannot_be_parsed_ends_the_process(args, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(args)
    assert caught.value.code == 2


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in FIELDS if f"--{name.replace('_', '-')}" not in text] == []


def test_no_torch_is_imported():
    code = (
        "import sys, tinytrain_dist.config.loading as c, tinytrain_dist.distributed.batch_plan\n"
        "import tinytrain_dist.reliability.stop_requests\n"
        "c.parse_command_line(['configs/quickstart.toml', '--seed', '1'])\n"
        "import tinytrain_dist; tinytrain_dist.TrainingConfig, tinytrain_dist.BatchPlan\n"
        "print([m for m in ('torch', 'numpy', 'tensorboard', 'safetensors') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# --- vocab_size from meta.json -------------------------------------------------------------------------------------


def test_vocab_size_is_taken_from_the_data(tmp_path):
    write(tmp_path / "meta.json", '{"vocab_size": 321}')
    config = TrainingConfig(train_data=str(tmp_path / "train.npy"))
    assert resolve_vocab_size(config) == dataclasses.replace(config, vocab_size=321)
    padded = dataclasses.replace(config, vocab_size=384)
    assert resolve_vocab_size(padded) is padded


def test_a_vocab_size_below_that_of_the_data_is_an_error(tmp_path):
    write(tmp_path / "meta.json", '{"vocab_size": 321}')
    with pytest.raises(ConfigError, match=r"vocab_size: 320 is less than the 321 of .*meta\.json"):
        resolve_vocab_size(TrainingConfig(train_data=str(tmp_path / "train.npy"), vocab_size=320))


def test_raw_token_files_need_a_vocab_size(tmp_path):
    config = TrainingConfig(train_data=str(tmp_path / "train.npy"))
    with pytest.raises(ConfigError, match=r"vocab_size: not set, and there is no .*meta\.json"):
        resolve_vocab_size(config)
    write(tmp_path / "meta.json", "{}")
    with pytest.raises(ConfigError, match="vocab_size: not set"):
        resolve_vocab_size(config)
    assert resolve_vocab_size(dataclasses.replace(config, vocab_size=5)).vocab_size == 5


@pytest.mark.parametrize("text", ["{", "[1]", '{"vocab_size": "many"}', '{"vocab_size": 0}'])
def test_a_broken_meta_json_is_a_sentence(tmp_path, text):
    write(tmp_path / "meta.json", text)
    with pytest.raises(ConfigError, match=r"meta\.json"):
        resolve_vocab_size(TrainingConfig(train_data=str(tmp_path / "train.npy")))


def test_no_training_data_is_a_sentence():
    with pytest.raises(ConfigError, match="train_data: not set"):
        resolve_vocab_size(TrainingConfig())


@pytest.mark.parametrize("profile", ["3", "3:", "a:b", "0:2", "5:3", "11:12", "3:4:5", "-1:2", " 1:2"])
def test_steps_to_profile_are_two_numbers_within_the_run(profile):
    assert only_problem(profile=profile, total_steps=10).startswith(f"profile: {profile!r}"[:9])


def test_steps_to_profile_include_both_ends():
    assert list(TrainingConfig(profile="3:5").profiled_steps) == [3, 4, 5]
    assert list(TrainingConfig().profiled_steps) == []
