"""Which checkpoints a run tries to resume from, and which states it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import settings_for
from tinytrain_dist import CheckpointError, TrainingConfig
from tinytrain_dist.checkpoint.resume_rules import (
    check_same_numerics,
    check_same_run,
    check_steps_left,
    checkpoints_to_try,
    describe_changes,
    nothing_to_train,
)

DATA = {"train": "abc"}


def config_for(folder: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig(**settings_for(folder, "run", **settings))


def own_checkpoints(config: TrainingConfig) -> list[Path]:
    return [config.checkpoints_dir / f"checkpoint-{step:08d}" for step in (2, 4, 6)]


def test_auto_tries_all_and_the_newest_first(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    assert checkpoints_to_try(config, own_checkpoints(config)) == own_checkpoints(config)
    assert checkpoints_to_try(config, []) == []


def test_never_refuses_to_mix_runs(tmp_path: Path) -> None:
    config = config_for(tmp_path, resume="never")
    assert checkpoints_to_try(config, []) == []
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoint\(s\), but resume = never starts a new run"):
        checkpoints_to_try(config, own_checkpoints(config))


def test_a_path_elsewhere_is_where_the_run_began(tmp_path: Path) -> None:
    elsewhere = tmp_path / "first" / "checkpoints" / "checkpoint-00000003"
    config = config_for(tmp_path, resume=str(elsewhere))
    assert checkpoints_to_try(config, []) == [elsewhere]
    assert checkpoints_to_try(config, own_checkpoints(config)) == own_checkpoints(config)[-1:]


def test_of_the_own_checkpoints_only_the_newest_can_be_named(tmp_path: Path) -> None:
    own = own_checkpoints(config_for(tmp_path))
    assert checkpoints_to_try(config_for(tmp_path, resume=str(own[2])), own) == own[2:]
    with pytest.raises(CheckpointError, match=r"also holds 1 later checkpoint\(s\), up to checkpoint-00000006"):
        checkpoints_to_try(config_for(tmp_path, resume=str(own[1])), own)


def saved_state(config: TrainingConfig, **changes: Any) -> dict[str, Any]:
    return {"config": {**config.resolved(), **changes}, "data": DATA, "bits": {"torch": "1", "threads": 1}}


def test_settings_that_make_the_run_are_refused_with_both_values(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    state = saved_state(config, seed=7, context_len=11, lr_max=0.5)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(tmp_path, state, config, {"train": "xyz"})
    message = str(caught.value)
    assert f"seed: 7 in the checkpoint, {config.seed} now" in message
    assert "context_len: 11 in the checkpoint, 12 now" in message
    assert "train_data: {'train': 'abc'} in the checkpoint, {'train': 'xyz'} now" in message
    assert "lr_max" not in message, "this one may change"
    allowing = config_for(tmp_path, allow="seed, context_len, train_data")
    check_same_run(tmp_path, state, allowing, {"train": "xyz"})
    check_same_run(tmp_path, saved_state(config), config, DATA)


def test_a_checkpoint_from_before_there_was_a_choice_drew_random_windows(tmp_path: Path) -> None:
    state = saved_state(config_for(tmp_path))
    del state["config"]["sampling"]
    check_same_run(tmp_path, state, config_for(tmp_path), DATA)
    shuffling = config_for(tmp_path, sampling="shuffle")
    with pytest.raises(CheckpointError, match="sampling: random in the checkpoint, shuffle now"):
        check_same_run(tmp_path, state, shuffling, DATA)
    assert describe_changes(state, shuffling) == ["sampling: random -> shuffle"]
    check_same_run(tmp_path, state, config_for(tmp_path, sampling="shuffle", allow="sampling"), DATA)


def test_a_reproducible_run_refuses_other_numerics(tmp_path: Path) -> None:
    state = saved_state(config_for(tmp_path))
    now = {"torch": "1", "threads": 2}
    with pytest.raises(CheckpointError, match=r"not be bit-identical(.|\n)*threads: 1 in the checkpoint, 2 now"):
        check_same_numerics(tmp_path, state, config_for(tmp_path, reproducible=True), now)
    check_same_numerics(tmp_path, state, config_for(tmp_path, reproducible=True), state["bits"])
    check_same_numerics(tmp_path, state, config_for(tmp_path, reproducible=True, allow_drift=True), now)
    check_same_numerics(tmp_path, state, config_for(tmp_path, reproducible=False), now)


def test_a_checkpoint_from_before_ranks_shared_sequences_had_none_that_did(tmp_path: Path) -> None:
    config = config_for(tmp_path, reproducible=True)
    state = saved_state(config)
    check_same_numerics(tmp_path, state, config, {**state["bits"], "cp": 1})
    with pytest.raises(CheckpointError, match="cp: 1 in the checkpoint, 2 now"):
        check_same_numerics(tmp_path, state, config, {**state["bits"], "cp": 2})
    del state["config"]["cp"]
    assert describe_changes(state, config_for(tmp_path, cp=2, reproducible=True)) == ["cp: 1 -> 2"]


def test_changes_are_described_with_both_values(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    assert describe_changes(saved_state(config, lr_max=0.5, gone_since=3), config) == [
        f"lr_max: 0.5 -> {config.lr_max}"
    ]
    assert describe_changes({}, config) == []


def refusal(state: dict[str, Any], config: TrainingConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_same_run(Path("x"), state, config, DATA)
    return str(caught.value).partition(":\n")[0]


def test_what_may_be_allowed_is_given_as_it_is_set(tmp_path: Path) -> None:
    config = config_for(tmp_path, allow="norm_eps")
    state = saved_state(config, seed=7, context_len=11)
    advice = refusal(state, config).partition("set allow = ")[2]
    assert advice == "context_len,norm_eps,seed"
    check_same_run(tmp_path, state, config_for(tmp_path, allow=advice), DATA)
    assert "allow" not in refusal(saved_state(config, num_layers=7, seed=7), config), "the weights would not fit"


def test_a_setting_that_changes_shapes_is_named_although_it_is_allowed(tmp_path: Path) -> None:
    config = config_for(tmp_path, allow="num_layers, num_heads")
    state = saved_state(config, num_layers=7)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(Path("x"), state, config, DATA)
    first, *others = str(caught.value).splitlines()
    assert first == "x: belongs to another run; restore these settings, or start a new run with another target_dir:"
    assert others == [
        f"  num_layers: 7 in the checkpoint, {config.num_layers} now; the tensors of the checkpoint do not fit this "
        "model, so allow has no effect"
    ]
    # the heads together are as wide, so all tensors have the same shapes
    one = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4}
    two = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 2}
    changed = config_for(tmp_path, **two, allow="num_heads, num_kv_heads, head_dim")
    check_same_run(Path("x"), saved_state(config_for(tmp_path, **one)), changed, DATA)


def test_a_stop_that_is_not_beyond_the_checkpoint_trains_nothing(tmp_path: Path) -> None:
    stopping = config_for(tmp_path, stop_at_step=4)  # of 6 steps
    assert [step for step in range(7) if nothing_to_train(stopping, step)] == [4, 5], "a finished run needs no stop"
    assert "set it to more than 5, or leave it out" in nothing_to_train(stopping, 5)
    assert nothing_to_train(config_for(tmp_path), 5) == ""


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "start a new run with another target_dir"),
        ({"ckpt_dir": "c", "log_dir": "l"}, "start a new run with another target_dir and ckpt_dir and log_dir"),
        ({"resume": "x/checkpoint-00000003"}, "start a new run with another target_dir, without resume"),
        (
            {"ckpt_path_to_resume": "x/checkpoint-00000003"},
            "start a new run with another target_dir, without ckpt_path_to_resume",
        ),
    ],
)
def test_a_new_run_needs_other_folders_and_no_checkpoint(tmp_path: Path, settings: Any, advice: str) -> None:
    config = config_for(tmp_path, **settings)
    assert f"restore these settings, or {advice}" in refusal(saved_state(config, num_layers=7), config)


def test_another_folder_of_checkpoints_is_advised_where_that_one_is_full(tmp_path: Path) -> None:
    config = config_for(tmp_path, resume="never", ckpt_dir=str(tmp_path / "shared"))
    with pytest.raises(CheckpointError, match=r"or another target_dir and ckpt_dir$"):
        checkpoints_to_try(config, own_checkpoints(config))


def test_a_checkpoint_of_a_version_without_masks_was_trained_without(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    state = saved_state(config)
    for name in ("loss_mask", "document_mask", "logit_soft_cap"):
        del state["config"][name]
    check_same_run(tmp_path, state, config, DATA)
    assert describe_changes(state, config) == []
    with pytest.raises(CheckpointError, match="document_mask: False in the checkpoint, True now"):
        check_same_run(tmp_path, state, config_for(tmp_path, document_mask=True), DATA)
    with pytest.raises(CheckpointError, match=r"logit_soft_cap: None in the checkpoint, 30\.0 now"):
        check_same_run(tmp_path, state, config_for(tmp_path, logit_soft_cap=30.0), DATA)
    check_same_run(tmp_path, {"data": DATA}, config_for(tmp_path, loss_mask=True), DATA)  # saved by an own loop


def test_a_checkpoint_of_a_version_with_only_one_rotary_scaling_has_that_one(tmp_path: Path) -> None:
    factor = {"rope_scaling_factor": 8.0, "rope_original_context_len": 8}
    for settings, other, saved in ((factor, {"rope_type": "yarn"}, "llama3"), ({}, {"rope_type": "linear"}, "None")):
        config = config_for(tmp_path, **settings)
        state = saved_state(config)
        for name in ("rope_type", "rope_beta_fast", "rope_beta_slow", "rope_attention_factor"):
            del state["config"][name]
        check_same_run(tmp_path, state, config, DATA)
        assert describe_changes(state, config) == []
        with pytest.raises(CheckpointError, match=f"rope_type: {saved} in the checkpoint, {other['rope_type']} now"):
            check_same_run(
                tmp_path, state, config_for(tmp_path, **{"rope_scaling_factor": 8.0} | settings | other), DATA
            )
    check_same_run(tmp_path, state, config_for(tmp_path, rope_type="default"), DATA)


def test_phases_that_begin_after_the_end_are_not_compared(tmp_path: Path) -> None:
    sources = {"train_data": ["a", "b"], "total_steps": 7}
    state = saved_state(config_for(tmp_path, **sources), train_weights=["0: 1 1", "5: 1 3", "7: 3 1"])
    same = config_for(tmp_path, **sources, train_weights=["0: 1 1", "5: 1 3"])
    check_same_run(tmp_path, state, same, DATA)
    assert not any("train_weights" in change for change in describe_changes(state, same))
    with pytest.raises(CheckpointError, match="train_weights: "):
        check_same_run(tmp_path, state, config_for(tmp_path, **sources, train_weights=["0: 1 1"]), DATA)


def test_a_run_that_would_end_before_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_steps_left(Path("c"), {"step": 7}, config_for(tmp_path, total_steps=6))
    assert str(caught.value) == (
        "total_steps: 6 is less than 7, the step of c that this run continues from, so nothing would be trained; set "
        "it to more than 7 to train on, or start a new run with another target_dir"
    )
    check_steps_left(Path("c"), {"step": 7}, config_for(tmp_path, total_steps=7))
    check_steps_left(Path("c"), {"step": 7}, config_for(tmp_path, total_steps=9, stop_at_step=5))


def test_another_optimizer_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    adamw, muon = config_for(tmp_path), config_for(tmp_path, optimizer="muon")
    of_norms = {"param_groups": ["*norm*: lr_factor=0.5"], "allow": "param_groups"}
    check_same_run(tmp_path, saved_state(adamw), config_for(tmp_path, **of_norms), DATA)
    by_groups = config_for(tmp_path, param_groups=["*_proj.weight: optimizer=muon"], allow="param_groups")
    for state, config, setting in (
        (saved_state(adamw), replace(muon, allow="optimizer"), "optimizer: adamw in the checkpoint, muon now; the "),
        (saved_state(adamw), by_groups, "param_groups: () in the checkpoint, ('*_proj.weight: optimizer=muon',) now"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check_same_run(Path("c"), state, config, DATA)
        first_line, problem = str(caught.value).split(":\n  ")
        assert "set allow" not in first_line
        assert "start a new run with another target_dir and init_from = c, which begins with its weights" in first_line
        assert problem.startswith(setting)
        state_of = "holds the state of adamw for model.layers.0.self_attn.q_proj.weight and 13 more parameters, which"
        assert f"{state_of} muon cannot continue from, so allow has no effect" in problem


def test_batch_sizes_that_begin_after_the_end_are_not_compared(tmp_path: Path) -> None:
    state = saved_state(config_for(tmp_path), batch_size=8, batch_size_warmup=["0: 2", "5: 4", "7: 8"])
    for steps, size, warmup in ((7, 4, ["0: 2", "5: 4"]), (5, 2, None)):
        same = config_for(tmp_path, total_steps=steps, batch_size=size, batch_size_warmup=warmup)
        check_same_run(tmp_path, state, same, DATA)
        assert not any("batch_size" in change for change in describe_changes(state, same))
    with pytest.raises(CheckpointError, match=r"batch_size: 4 in the checkpoint, 2 now(.|\n)*batch_size_warmup: "):
        check_same_run(tmp_path, state, config_for(tmp_path, total_steps=7, batch_size=2), DATA)


def test_shards_that_are_missing_or_new_are_named(tmp_path: Path) -> None:
    for number in (0, 1, 3, 4):
        (tmp_path / f"train-{number:03d}.npy").touch()
    (tmp_path / "other.npy").touch()
    config = config_for(tmp_path, train_data=[f"{tmp_path}/train-*.npy", f"{tmp_path}/other.npy"], train_weights=None)
    numbered = {"file": "train-000.npy .. train-003.npy", "shards": 4, "sha256": "a"}
    state = saved_state(config) | {"data": {"train": [numbered, {"file": "other.npy", "sha256": "b"}]}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(Path("c"), state, config, DATA)
    glob = f"{tmp_path}/train-*.npy"
    assert str(caught.value).endswith(f"now; missing now in {glob}: train-002.npy; new in {glob}: train-004.npy")
    for shown in ("a.npy .. b.npy", "train-000.npy .. train-007.npy"):  # the names between are not known
        state["data"]["train"][0] = numbered | {"file": shown}
        with pytest.raises(CheckpointError) as caught:
            check_same_run(Path("c"), state, config, DATA)
        assert str(caught.value).endswith("'abc'} now")
