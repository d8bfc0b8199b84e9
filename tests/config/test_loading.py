"""Check how a configuration is read: TOML files, the command line, the vocabulary of the data; without torch."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.configs import write
from tinytrain_dist.config.loading import load_config, parse_command_line, read_toml, resolve_vocab_size
from tinytrain_dist.config.schema import FIELDS, HELP_COMMAND, TrainingConfig
from tinytrain_dist.config.sections import SECTIONS
from tinytrain_dist.config.weight_phases import weight_phases
from tinytrain_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_settings_are_read_in_their_sections_or_outside_all(tmp_path):
    path = write(tmp_path / "a.toml", 'seed = 7\n[data]\nbatch_size = 8\n[parallel]\nparallel = "ddp"\n')
    assert load_config(path) == TrainingConfig(seed=7, batch_size=8, parallel="ddp")
    assert load_config(path, {"seed": 9}).seed == 9
    assert load_config(None) == TrainingConfig()


def test_all_problems_of_a_file_are_reported(tmp_path):
    text = (
        "seed = 1\n[run]\nseed = 2\nbatch_size = 4\n[optimiser]\nlr_max = 1.0\n[optimizer]\nweigth_decay = 1\neps = 0\n"
    )
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"log_every": 0})
    assert caught.value.problems == [
        "seed: set twice, to 1 and 2; keep one",
        "batch_size: is under [run]; move it to [data]",
        "[optimiser]: unknown section; use one of optimizer",
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
    assert problems == [f"[zzz]: unknown section; use one of {', '.join(SECTIONS)}"]


@pytest.mark.parametrize("text", ["seed = \n", "seed = 1\nseed = 2\n"])
def test_a_file_that_is_not_toml(tmp_path, text):
    with pytest.raises(ConfigError, match=r"is not TOML: .*line"):
        load_config(write(tmp_path / "a.toml", text))


def test_a_file_that_is_not_utf8_or_missing_is_reported(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.toml")


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


def test_lists_of_files_and_weights_survive_toml_json_and_the_command_line(tmp_path: Path) -> None:
    config = TrainingConfig(train_data=["a b.npy", "b.npy"], train_weights=[1, 2.5], val_data=("c.npy",), vocab_size=9)  # type: ignore[arg-type]
    assert config.train_data == ("a b.npy", "b.npy")
    assert config.train_weights == (1.0, 2.5)
    assert hash(config)
    loaded = load_config(write(tmp_path / "run.toml", config.to_toml()))
    assert (loaded.train_data, loaded.train_weights, loaded.val_data) == (
        config.train_data,
        config.train_weights,
        config.val_data,
    )
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    parsed = parse_command_line("--train-data x.npy y.npy --train_weights 3 1 --val-data z.npy --seed 4".split())
    assert (parsed.train_data, parsed.train_weights, parsed.val_data) == (("x.npy", "y.npy"), (3.0, 1.0), "z.npy")
    assert (parsed.train_files, parsed.val_files) == (("x.npy", "y.npy"), ("z.npy",))


def test_phases_of_weights_survive_toml_json_and_the_command_line(tmp_path: Path) -> None:
    phases = ("0: 0.7 0.3", "9000: 0.2 0.8")
    config = TrainingConfig(train_data=("a.npy", "b.npy"), train_weights=phases, vocab_size=9)
    assert weight_phases(config.train_weights) == ((0, (0.7, 0.3)), (9000, (0.2, 0.8)))
    assert load_config(write(tmp_path / "run.toml", config.to_toml())).train_weights == phases
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    parsed = parse_command_line(["--train-data", "a.npy", "b.npy", "--train-weights", *phases, "--vocab-size", "9"])
    assert parsed == config
    assert weight_phases((0.7, 0.3)) == ((0, (0.7, 0.3)),)
    assert weight_phases(None) == ()


def test_epochs_and_total_steps_replace_each_other_on_the_command_line(tmp_path: Path) -> None:
    steps = str(write(tmp_path / "steps.toml", 'total_steps = 40000\nsampling = "shuffle"\n'))
    epochs = str(write(tmp_path / "epochs.toml", 'epochs = 2\nsampling = "shuffle"\n'))
    both = str(write(tmp_path / "both.toml", 'epochs = 2\ntotal_steps = 40000\nsampling = "shuffle"\n'))
    assert parse_command_line([steps, "--epochs", "1.5"]).epochs == 1.5
    by_steps = parse_command_line([epochs, "--total-steps", "9"])
    assert (by_steps.epochs, by_steps.total_steps) == (None, 9)
    for args in ([both], [steps, "--epochs", "2", "--total-steps", "40000"]):
        with pytest.raises(ConfigError, match=r"epochs: 2\.0 and total_steps 40000 are both set; leave one out"):
            parse_command_line(args)


def test_total_steps_that_epochs_will_give_are_not_written_down(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=2.0, sampling="shuffle")
    assert "total_steps" not in config.to_toml()
    assert load_config(write(tmp_path / "run.toml", config.to_toml())).epochs == 2.0
    assert TrainingConfig.from_dict(config.to_dict()) == config


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
        "[modle]: unknown section; use one of model",
        "weigth_decay: unknown setting; did you mean weight_decay?",
        "no_seed: unknown setting; did you mean seed?",
        "dmodel: unknown setting; did you mean d_model?",
        f"no_such: unknown setting; {HELP_COMMAND} lists all of them",
        "log_every: 0 must be at least 1",
        "batch_size: 0 must be at least 1",
    ]


def test_a_negative_value_is_a_value():
    with pytest.raises(ConfigError, match="seed: -1 must not be negative"):
        parse_command_line(["--seed", "-1"])


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--seed", "x"], "seed: expected a whole number, got 'x'"),
        (["--lr-max=1,5"], "lr_max: expected a number, got '1,5'"),
        (["--keep_every", "1.5"], "keep_every: expected a whole number or None, got '1.5'"),
        (["--betas", "a", "b"], "betas: expected two numbers, got 'a b'"),
        (
            ["--betas", "0.9"],
            f"Missing value for argument '--betas'. Expected 2 values; {HELP_COMMAND} lists all settings",
        ),
        (
            ["--compile", "maybe"],
            f"Unrecognized options: maybe; {HELP_COMMAND} lists all settings",
        ),
        (
            ["--seed=1", "stray"],
            f"Unrecognized options: stray; {HELP_COMMAND} lists all settings",
        ),
        (
            ["--seed=1", "a.toml"],
            f"Unrecognized options: a.toml; {HELP_COMMAND} lists all settings",
        ),
    ],
)
def test_a_value_that_cannot_be_parsed_is_one_of_the_problems(args, problem, tmp_path, capsys):
    path = write(tmp_path / "a.toml", "[modle]\n")
    with pytest.raises(ConfigError) as caught:
        parse_command_line([str(path), *args, "--batchsize", "8"])
    assert caught.value.problems == [
        problem,
        "[modle]: unknown section; use one of model",
        "batchsize: unknown setting; did you mean batch_size?",
    ]
    assert capsys.readouterr() == ("", "")


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


def test_vocab_size_is_taken_from_the_data(tmp_path):
    write(tmp_path / "meta.json", '{"vocab_size": 321}')
    config = TrainingConfig(train_data=str(tmp_path / "train.npy"))
    assert resolve_vocab_size(config) == dataclasses.replace(config, vocab_size=321)
    padded = dataclasses.replace(config, vocab_size=384)
    assert resolve_vocab_size(padded) is padded


def test_a_vocab_size_below_that_of_the_data_is_an_error(tmp_path):
    write(tmp_path / "meta.json", '{"vocab_size": 321}')
    with pytest.raises(ConfigError, match=r"vocab_size: 320 is less than the 321 in .*meta\.json"):
        resolve_vocab_size(TrainingConfig(train_data=str(tmp_path / "train.npy"), vocab_size=320))


def test_raw_token_files_need_a_vocab_size(tmp_path):
    config = TrainingConfig(train_data=str(tmp_path / "train.npy"))
    with pytest.raises(ConfigError, match=r"train_data: .*train\.npy: no such token file"):
        resolve_vocab_size(config)
    write(tmp_path / "train.npy", "")
    with pytest.raises(ConfigError, match=r"vocab_size: not set, and there is no .*meta\.json"):
        resolve_vocab_size(config)
    write(tmp_path / "meta.json", "{}")
    with pytest.raises(ConfigError, match="vocab_size: not set"):
        resolve_vocab_size(config)
    assert resolve_vocab_size(dataclasses.replace(config, vocab_size=5)).vocab_size == 5


@pytest.mark.parametrize("text", ["{", "[1]", '{"vocab_size": "many"}', '{"vocab_size": 0}'])
def test_a_broken_meta_json_is_reported(tmp_path, text):
    write(tmp_path / "meta.json", text)
    with pytest.raises(ConfigError, match=r"meta\.json"):
        resolve_vocab_size(TrainingConfig(train_data=str(tmp_path / "train.npy")))


def test_the_vocabulary_of_several_files_is_the_largest_and_their_tokenizer_the_same(tmp_path: Path) -> None:
    for name, size, digest in (("a", 10, "1"), ("b", 20, "1"), ("c", 10, "2")):
        (tmp_path / name).mkdir()
        meta = {"vocab_size": size, "digests": {"tokenizer.json": digest}}
        write(tmp_path / name / "meta.json", json.dumps(meta))
    a, b, c = (str(tmp_path / name / "train.npy") for name in "abc")
    assert resolve_vocab_size(TrainingConfig(train_data=(a, b))).vocab_size == 20
    assert resolve_vocab_size(TrainingConfig(train_data=(a,), val_data=b)).vocab_size == 10
    with pytest.raises(ConfigError, match=r"vocab_size: 15 is less than the 20 in .*/b/meta\.json"):
        resolve_vocab_size(TrainingConfig(train_data=(a, b), vocab_size=15))
    for config in (TrainingConfig(train_data=(a, c)), TrainingConfig(train_data=a, val_data=c)):
        with pytest.raises(
            ConfigError,
            match=r"/a and .*/c were made with different tokenizers.*/a --out .*/c --over",
        ):
            resolve_vocab_size(config)


def test_no_training_data_is_reported():
    with pytest.raises(ConfigError, match="train_data: not set"):
        resolve_vocab_size(TrainingConfig())


COMPUTE_SETTINGS = {
    "precision": '"bf16"', "compile": "true", "reproducible": "true", "allow_drift": "true", "cpu_threads": "3",
    "loss_chunk_tokens": "128",
}  # fmt: skip


def test_the_heading_compute_holds_what_is_not_parallelism():
    under = {name for name, field in FIELDS.items() if field.metadata["section"] == "compute"}
    assert under == set(COMPUTE_SETTINGS)


@pytest.mark.parametrize("section", ["compute", "parallel"])
def test_settings_of_compute_load_in_their_section_and_in_the_former_one(tmp_path, section):
    lines = "".join(f"{name} = {value}\n" for name, value in COMPUTE_SETTINGS.items())
    path = write(tmp_path / "a.toml", f"[{section}]\n{lines}[data]\nmicro_batch_size = 8\n[run]\nseed = 1\n")
    expected = TrainingConfig(
        precision="bf16", compile=True, reproducible=True, allow_drift=True, cpu_threads=3, loss_chunk_tokens=128,
        micro_batch_size=8, seed=1,
    )  # fmt: skip
    assert read_toml(path)[1] == []
    assert load_config(path) == expected


def test_a_setting_of_compute_under_a_third_heading_or_under_both_is_an_error(tmp_path):
    path = write(tmp_path / "a.toml", "[run]\ncompile = true\n[compute]\ncpu_threads = 2\ndp_shard = 2\n")
    assert read_toml(path)[1] == [
        "compile: is under [run]; move it to [compute]",
        "dp_shard: is under [compute]; move it to [parallel]",
    ]
    path = write(tmp_path / "a.toml", "[parallel]\ncpu_threads = 1\n[compute]\ncpu_threads = 2\n")
    assert read_toml(path)[1] == ["cpu_threads: set twice, to 1 and 2; keep one"]


def test_a_byte_order_mark_is_read_and_another_encoding_is_a_sentence(tmp_path):
    path = tmp_path / "b.toml"
    path.write_bytes("\ufeff[run]\nseed = 7 # ü\n".encode())
    assert load_config(path).seed == 7
    path.write_bytes("[run]\nseed = 7 # ü\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"byte 18 is not UTF-8; save the file as UTF-8"):
        load_config(path)
    for text in ("a = " + "[" * 100_000, "a = " + "1" * 5000):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not TOML"):
            load_config(path)


@pytest.mark.parametrize(("name", "value"), [("eval_every", 7), ("eval_steps", 3), ("sample_tokens", 5)])
def test_a_setting_of_evaluations_has_no_effect_without_val_data(tmp_path: Path, name: str, value: int) -> None:
    path = write(tmp_path / "a.toml", f"{name} = {value}\n")
    problem = f"{name}: has no effect without val_data; leave it out, or set val_data"
    for load in (lambda: load_config(path), lambda: parse_command_line([f"--{name}", str(value)])):
        with pytest.raises(ConfigError) as caught:
            load()
        assert caught.value.problems == [problem]
    assert load_config(path, {"val_data": "a.npy"}).val_files == ("a.npy",)
    assert load_config(None) == TrainingConfig(), "a default is no mistake"
    spelled_out = write(tmp_path / "config.toml", TrainingConfig().to_toml())
    assert load_config(spelled_out).resolved() == TrainingConfig().resolved(), "nor in the config.toml of a run"
    assert getattr(TrainingConfig.from_dict({name: value}), name) == value, "an old checkpoint can be read"


def test_samples_may_be_disabled_without_evaluations() -> None:
    assert parse_command_line(["--sample-tokens", "0"]).sample_tokens == 0


def test_a_run_stands_for_its_config(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[run]\nseed = 7\n")
    assert parse_command_line([str(tmp_path / "run"), "--total-steps", "9"]).seed == 7
    with pytest.raises(ConfigError, match="cannot be read: is a folder"):
        parse_command_line([str(tmp_path)])
