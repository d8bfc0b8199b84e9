"""Check which values of settings are refused, and with which sentence."""

import dataclasses
import math
from typing import Any

import pytest

from tests.helpers.configs import only_problem, problems_of
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError

YARN = {"rope_type": "yarn", "rope_scaling_factor": 4.0, "rope_original_context_len": 64}


@pytest.mark.parametrize(
    "name",
    "total_steps log_every eval_every eval_steps batch_size context_len num_layers num_heads d_model ckpt_every "
    "keep_last max_shard_bytes max_skipped_steps micro_batch_size vocab_size num_kv_heads head_dim d_ff stop_at_step "
    "keep_every dp_replicate dp_shard cp loss_chunk_tokens cosine_iters decay_iters rope_original_context_len".split(),
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(name, value):
    assert only_problem(**{name: value}).startswith(f"{name}: {value} must be at least 1")


@pytest.mark.parametrize(
    "name",
    "lr_max eps norm_eps rope_theta grad_clip_norm time_limit rope_scaling_factor rope_beta_fast rope_beta_slow "
    "rope_attention_factor skip_spikes z_loss logit_soft_cap".split(),
)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_positive_and_finite(name, value):
    assert only_problem(**{name: value}) == f"{name}: {value} must be greater than 0 and finite"


@pytest.mark.parametrize(
    ("name", "value"), [("lr_min", -0.1), ("weight_decay", -1.0), ("seed", -1), ("warmup_iters", -1)]
)
def test_some_numbers_are_not_negative(name, value):
    assert only_problem(**{name: value}) == f"{name}: {value} must not be negative"


@pytest.mark.parametrize("name", ["lr_min", "weight_decay", "start_limit", "step_limit", "save_limit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_negative_can_still_be_wrong(name, value):
    assert only_problem(**{name: value}) == f"{name}: {value} must be a finite number"


def test_numbers_are_small_enough_to_be_exact():
    assert problems_of(total_steps=2**53 // 4, batch_size=4) == []
    for name in ("total_steps", "batch_size", "log_every", "ckpt_every"):
        assert only_problem(**{name: 2**53 + 1}).startswith(f"{name}: 9007199254740993 must be at most 2**53 = 9007199")
    assert "steps x batch_size 4 are more than 2**53" in only_problem(total_steps=2**53 // 4 + 1, batch_size=4)


def test_a_seed_has_at_most_64_bits():
    # evaluation uses 1 as the second word of the generator's key
    assert problems_of(seed=2**64 - 1) == []
    assert only_problem(seed=2**64).startswith("seed: 18446744073709551616 must be less than 2**64")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"d_model": 100, "num_heads": 3}, "d_model: 100 is not a multiple of num_heads 3"),
        (
            {"d_model": 12, "num_heads": 4},
            "d_model: 12 / num_heads 4 = 3 is odd, but rotary embeddings need an even width",
        ),
        ({"head_dim": 5}, "head_dim: 5 is odd, but rotary embeddings need an even width; possible: head_dim 4, 6"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 8"),
        (
            {"batch_size": 12, "micro_batch_size": 5},
            "batch_size: 12 is not a multiple of micro_batch_size 5; micro_batch_size can be 1, 2, 3, 4, 6, 12",
        ),
        ({"lr_min": 0.2, "lr_max": 0.1}, "lr_min: 0.2 is greater than lr_max 0.1"),
        ({"betas": [0.9, 1.0]}, "betas: (0.9, 1.0) must both lie in [0, 1)"),
        ({"betas": [float("nan"), 0.9]}, "betas: (nan, 0.9) must both lie in [0, 1)"),
        ({"warmup_iters": 50, "cosine_iters": 40}, "cosine_iters: 40 is less than warmup_iters 50"),
        ({"schedule": "linear", "warmup_iters": 50, "total_steps": 40}, "total_steps: 40 is less than warmup_iters 50"),
        (
            {"schedule": "wsd", "total_steps": 100, "warmup_iters": 50, "decay_iters": 51},
            "decay_iters: 51 + warmup_iters 50 is more than total_steps 100",
        ),
        ({"resume": "never", "ckpt_path_to_resume": "x"}, "resume: 'never' contradicts ckpt_path_to_resume 'x'"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling_factor: needs rope_original_context_len"),
        ({"rope_original_context_len": 8}, "rope_scaling_factor: needs rope_original_context_len"),
        (
            {"rope_scaling_factor": 8.0, "rope_original_context_len": 64, "rope_low_freq_factor": 4.0},
            "rope_low_freq_factor: 4.0 must be below rope_high_freq_factor 4.0",
        ),
        (
            {"rope_type": "yarn", "context_len": 512, "rope_original_context_len": 128},
            "rope_scaling_factor: must be set with rope_type = yarn; usual is context_len divided by the one that the "
            "weights were trained with before, which is 4",
        ),
        (
            {"rope_type": "yarn", "rope_scaling_factor": 4.0},
            "rope_original_context_len: must be set with rope_type = yarn; set it to the context_len that the weights",
        ),
        ({"rope_type": "linear"}, "rope_scaling_factor: must be set with rope_type = linear; usual is context_len"),
        (YARN | {"rope_beta_slow": 32.0}, "rope_beta_slow: 32.0 must be below rope_beta_fast 32.0 (the default)"),
        (YARN | {"rope_theta": 1.0}, "rope_theta: 1.0 must be greater than 1 with rope_type = yarn"),
        (
            YARN | {"rope_type": "dynamic", "context_len": 64},
            "rope_type: dynamic has no effect while context_len 64 is at most rope_original_context_len 64;",
        ),
        (YARN | {"rope_type": "dynamic", "head_dim": 2}, "rope_type: dynamic needs heads wider than 2; set head_dim"),
        ({"total_steps": 10, "stop_at_step": 11}, "stop_at_step: 11 is beyond total_steps 10"),
        ({"reproducible": True}, "micro_batch_size: must be set to a number with reproducible = true"),
        ({"log_save_prefix": "a/b"}, "log_save_prefix: 'a/b' must be a plain name"),
        ({"ckpt_save_prefix": ""}, "ckpt_save_prefix: '' must be a plain name"),
        (
            {"stability_every": 15},
            "stability_every: 15 is not a multiple of log_every 10 (the default), so some of these steps "
            "have no record; possible: ",
        ),
        ({"skip_spikes": 6.0, "spike_window": 1}, "spike_window: 1 must be at least 2"),
        ({"spike_window": 64}, "spike_window: 64 has no effect without skip_spikes; set it (6 is usual)"),
        ({"skip_steps": "5"}, "skip_steps: '5' must be START:STOP, two step numbers, or several of these"),
        ({"skip_steps": "5:6;8:9"}, "skip_steps: '5:6;8:9' must be START:STOP"),
        ({"skip_steps": "0:6"}, "skip_steps: 0:6 must be START:STOP with 1 <= START <= STOP"),
        ({"skip_steps": "1:2, 7:6"}, "skip_steps: 7:6 must be START:STOP with 1 <= START <= STOP"),
        (
            {"total_steps": 10, "warmup_iters": 0, "skip_steps": "5:11"},
            "skip_steps: 5:11 goes beyond total_steps 10; end it there",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, sentence):
    assert only_problem(**values).startswith(sentence)


@pytest.mark.parametrize(
    ("values", "with_effect"),
    [
        ({"schedule": "constant", "cosine_iters": 10}, {"schedule": "cosine"}),
        ({"schedule": "cosine", "decay_iters": 10}, {"schedule": "wsd"}),
        ({"schedule": "linear", "decay_iters": 10}, {"schedule": "wsd"}),
        ({"schedule": "linear", "cosine_iters": 10}, {"schedule": "cosine"}),
        ({"schedule": "linear", "decay_shape": "sqrt"}, {"schedule": "wsd"}),
        ({"parallel": "ddp", "dp_replicate": 2}, {"parallel": "hsdp"}),
        ({"parallel": "auto", "dp_shard": 2}, {"parallel": "hsdp"}),
        ({"parallel": "ddp", "reshard_after_forward": True}, {"parallel": "fsdp"}),
        (
            {"rope_low_freq_factor": 2.0},
            {"rope_scaling_factor": 8.0, "rope_original_context_len": 64},
        ),
        ({"rope_type": "default", "rope_beta_fast": 9.0}, YARN),
        ({"rope_beta_slow": 0.5}, YARN),
        ({"rope_attention_factor": 1.5}, YARN),
        ({"rope_type": "linear", "rope_scaling_factor": 4.0, "rope_original_context_len": 64}, {"rope_type": "yarn"}),
        (YARN | {"rope_type": "dynamic", "rope_beta_fast": 9.0}, {"rope_type": "yarn"}),
        (YARN | {"rope_low_freq_factor": 2.0}, {"rope_type": "llama3"}),
    ],
)
def test_a_setting_without_effect_is_an_error(values, with_effect):
    assert "has no effect with" in only_problem(**{"warmup_iters": 1, **values})
    assert problems_of(**{"warmup_iters": 1, **values, **with_effect}) == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train_weights": [1.0]}, "train_weights: has no effect without several files"),
        ({"train_data": "a", "train_weights": [1, 2]}, "train_weights: has no effect without several files"),
        ({"train_data": ["a", "b"], "train_weights": [1]}, "train_weights: 1 numbers for 2 files"),
        ({"train_data": ["a", "b"], "train_weights": [1, -1]}, "train_weights: [1.0, -1.0] must be"),
        ({"train_data": ["a", "b"], "train_weights": [0, 0]}, "train_weights: [0.0, 0.0] must be"),
        ({"train_data": ["a", "b"], "train_weights": [1, math.nan]}, "train_weights: [1.0, nan] must be"),
        ({"train_data": ["a", "b"], "train_weights": [1, math.inf]}, "train_weights: [1.0, inf] must be"),
        ({"train_weights": ["0: 1 2"]}, "train_weights: has no effect without several files"),
        ({"train_data": ["a", "b"], "train_weights": ["0 1 2"]}, "train_weights: '0 1 2' must be STEP: WEIGHT"),
        ({"train_data": ["a", "b"], "train_weights": ["-1: 1 2"]}, "train_weights: '-1: 1 2' must be STEP: WEIGHT"),
        ({"train_data": ["a", "b"], "train_weights": ["0: 1 x"]}, "train_weights: '0: 1 x' must be STEP: WEIGHT"),
        ({"train_data": ["a", "b"], "train_weights": ["0:"]}, "train_weights: '0:' must be STEP: WEIGHT"),
        ({"train_data": ["a", "b"], "train_weights": ["0: 1"]}, "train_weights: 1 numbers from step 0 on for 2 files"),
        ({"train_data": ["a", "b"], "train_weights": ["0: 0 0"]}, "train_weights: [0.0, 0.0] must be"),
        ({"train_data": ["a", "b"], "train_weights": ["5: 1 1"]}, "train_weights: the first phase begins at step 5"),
        (
            {"train_data": ["a", "b"], "train_weights": ["0: 1 1", "9: 1 2", "9: 1 3"]},
            "train_weights: the phase from step 9 comes after the one from step 9",
        ),
        (
            {"train_data": ["a", "b"], "train_weights": ["0: 1 1", "40000: 1 2"]},
            "train_weights: the phase from step 40000 has no effect, because total_steps is 40000",
        ),
        ({"epochs": 2.0}, "epochs: 2.0 needs sampling = shuffle, but sampling is random (the default)"),
        ({"epochs": 0.0, "sampling": "shuffle"}, "epochs: 0.0 must be greater than 0"),
        (
            {"epochs": 2.0, "sampling": "shuffle", "total_steps": 7, "warmup_iters": 0},
            "epochs: 2.0 and total_steps 7 are both set; leave one out",
        ),
        ({"train_data": ["a", "b", "a"]}, "train_data: contains a twice"),
        ({"val_data": ["a", "a"]}, "val_data: contains a twice"),
        ({"early_stop_patience": 3}, "early_stop_patience: has no effect without val_data"),
        ({"early_stop_patience": 0, "val_data": "a"}, "early_stop_patience: 0 must be at least 1"),
        ({"keep_every": 1500, "ckpt_every": 1000}, "keep_every: 1500 is not a multiple of ckpt_every 1000"),
    ],
)
def test_settings_of_files_and_evaluation_that_do_not_fit_are_refused(values: dict[str, Any], sentence: str) -> None:
    assert only_problem(**values).startswith(sentence)


def test_what_depends_on_the_length_is_checked_when_epochs_have_given_it() -> None:
    weights = ["0: 1 1", "50000: 1 2"]
    given = {"train_data": ["a", "b"], "train_weights": weights, "warmup_iters": 50_000, "stop_at_step": 60_000}
    config = TrainingConfig.from_dict({"epochs": 2, "sampling": "shuffle", "profile": "50000:50001", **given})
    assert dataclasses.replace(config, epochs=None, total_steps=70_000).total_steps == 70_000
    with pytest.raises(ConfigError, match="60000 is beyond total_steps 55000"):
        dataclasses.replace(config, epochs=None, total_steps=55_000)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"cp": 3}, "cp: 3 does not divide num_heads 4; possible: cp 1, 2, 4"),
        ({"cp": 4, "context_len": 510}, "cp: 4 does not divide context_len 510; possible: cp 1, 2"),
    ],
)
def test_ranks_that_share_sequences_divide_columns_and_heads(values: dict[str, Any], sentence: str) -> None:
    assert only_problem(**{"num_heads": 4, "context_len": 516, **values}) == sentence


def test_replicas_are_those_of_the_weights() -> None:
    refused = only_problem(parallel="none", fingerprint_every=2)
    assert refused == "fingerprint_every: parallel = none has no replicas to compare; leave it out"
    assert problems_of(parallel="none", fingerprint_every=2, cp=2) == []
    assert problems_of(parallel="fsdp", fingerprint_every=2, cp=2) != []


@pytest.mark.parametrize("profile", ["3", "3:", "a:b", "0:2", "5:3", "11:12", "3:4:5", "-1:2", " 1:2"])
def test_steps_to_profile_are_two_numbers_within_the_run(profile):
    assert only_problem(profile=profile, total_steps=10).startswith(f"profile: {profile!r}"[:9])


def test_offload_moves_what_checkpointed_blocks_keep() -> None:
    assert problems_of(activation_offload=True, activation_checkpointing="block") == []
    for how in ("none", "selective"):
        assert only_problem(activation_offload=True, activation_checkpointing=how) == (
            "activation_offload: needs activation_checkpointing = block, whose inputs it moves, but that is "
            f"{how}; set it, or leave activation_offload out"
        )


def test_trackers_are_known_names_or_classes_and_each_is_there_once():
    assert problems_of(trackers=[]) == problems_of(trackers=["mlflow", "a.b_c:Own"]) == []
    assert problems_of(trackers=["wandn"]) == ["trackers: 'wandn' is unknown; did you mean wandb?"]
    expected = "use tensorboard, wandb, mlflow or package.module:ClassName"
    assert problems_of(trackers=["a-b:Own"]) == [f"trackers: 'a-b:Own' is unknown; {expected}"]
    assert problems_of(trackers=["wandb", "wandb"]) == ["trackers: contains wandb twice; list it once"]


@pytest.mark.parametrize(
    "values", [{"target_dir": "runs/\udcff"}, {"train_data": ("a.npy", "\udcff.npy")}, {"resume": "\udcff"}]
)
def test_a_text_that_no_file_of_settings_can_contain_is_refused(values: dict[str, Any]) -> None:
    (name,) = values
    assert only_problem(**values).startswith(f"{name}: ")
    assert "is not valid UTF-8; give another name" in only_problem(**values)


def test_a_path_has_no_nul() -> None:
    assert only_problem(log_dir="a\0b") == "log_dir: 'a\\x00b' contains the character NUL; leave it out"
