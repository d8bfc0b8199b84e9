"""Decide which checkpoints a run may resume from: which ones to try, and whether their state belongs to this run.

Must not know tensors: their names and shapes are compared when they are read (`sharded_io.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tinytrain_dist.config.batch_phases import sizes_before
from tinytrain_dist.config.model_config import SHAPE_SETTINGS
from tinytrain_dist.config.parameter_groups import optimizer_of_parameters
from tinytrain_dist.config.schema import FIELDS, IDENTITY_SETTINGS, TrainingConfig
from tinytrain_dist.config.step_ranges import format_step_ranges, parse_step_ranges, up_to
from tinytrain_dist.config.weight_phases import phases_before
from tinytrain_dist.errors import CheckpointError, ConfigError
from tinytrain_dist.utils.shard_paths import NoTokenFilesError, shard_paths
from tinytrain_dist.utils.text import format_list, is_url

# Versions without these settings trained as their defaults do, and their checkpoints do not have them.
ADDED_SETTINGS = (
    "batch_size_warmup",
    "sampling",
    "loss_mask",
    "document_mask",
    "packing",
    "optimizer",
    "param_groups",
    "logit_soft_cap",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_attention_factor",
    "cp",
)
ADDED_ROUNDING_SETTINGS = ("cp",)  # the same for what `check_same_numerics` compares


def checkpoints_to_try(config: TrainingConfig, own: list[Path]) -> list[Path]:
    """Return the checkpoints to try for the `resume` setting, the preferred one last; empty for a new run.

    `own`: the committed checkpoints of this run, in order of steps. Errors: CheckpointError if one folder would then
    hold the checkpoints of two different histories.
    """
    if config.resume_from == "auto":
        return own
    if config.resume_from == "never":
        if own:
            raise CheckpointError(
                f"{config.checkpoints_dir}: holds {len(own)} checkpoint(s), but resume = never starts a new run; "
                f"set resume = auto, or {other_folders(config)}"
            )
        return []
    if is_url(config.resume_from):
        return own[-1:]  # it was downloaded if there was no own one
    path = Path(config.resume_from)
    if path.resolve().parent != config.checkpoints_dir.resolve():
        # A run that started from this path and was then requeued resumes from its own newest checkpoint.
        return own[-1:] or [path]
    names = [checkpoint.name for checkpoint in own]
    later = [name for name in names if name > path.name]
    if path.name in names and later:
        raise CheckpointError(
            f"resume = {path}: its folder also holds {len(later)} later checkpoint(s), up to {later[-1]}, and would "
            f"mix two histories; set {other_folders(config)}, or move the later ones away"
        )
    return [path]


def check_same_run(path: Path, state: dict[str, Any], config: TrainingConfig, data: dict[str, Any]) -> None:
    """Check that the settings and the data that identify a run are the saved ones, except those named in `allow`.

    Args:
        path: the checkpoint, for the message
        state: its trainer_state.json
        config: the settings of this run
        data: fingerprints of the token files of this run

    Errors: CheckpointError that lists all differences, with both values; also for a mean of checkpoints.
    """
    if "averaged" in state:
        raise CheckpointError(
            f"{path}: is a mean of {len(state['averaged'])} checkpoints without the state of an optimizer, so no run "
            f"resumes from it; set init_from = {path} to start a new run with its weights"
        )
    allowed = config.allowed_changes
    refused = {
        name: f"{name}: {saved} in the checkpoint, {now} now"
        for name, saved, now in _changed_settings(state, config)
        if name in IDENTITY_SETTINGS and name not in allowed
    }
    if "skip_steps" not in allowed and (change := _changed_past_steps(state, config)):
        refused["skip_steps"] = change
    if state.get("data") != data and "train_data" not in allowed:
        changed_files = "".join(f"; {change}" for change in _changed_files(state.get("data"), config))
        refused["train_data"] = f"train_data: {state.get('data')} in the checkpoint, {data} now{changed_files}"
    refused |= _changed_shapes(state, config)
    other_optimizer = _changed_optimizer(state, config)
    refused |= other_optimizer
    if refused:
        remedies = ["restore these settings", how_to_start_anew(config)]
        if other_optimizer:
            remedies[1] += f" and init_from = {path}, which begins with its weights and no state"
        elif not refused.keys() & SHAPE_SETTINGS:  # otherwise the tensors do not fit, whatever is allowed
            remedies.append(f"set allow = {','.join(sorted(allowed | refused.keys()))}")
        raise CheckpointError(
            f"{path}: belongs to another run; {', or '.join(remedies)}:\n  " + "\n  ".join(refused.values())
        )


def _changed_shapes(state: dict[str, Any], config: TrainingConfig) -> dict[str, str]:
    """Return a sentence for each setting of the model that differs, if the saved tensors have other shapes, else {}.

    The run cannot continue from them, whatever is allowed.
    """
    changed = [change for change in _changed_settings(state, config) if change[0] in SHAPE_SETTINGS]
    try:
        saved = TrainingConfig.from_dict(state.get("config", {}))
    except ConfigError:
        return {}  # of another version; shapes are compared when tensors are read
    if saved.model.parameter_shapes() == config.model.parameter_shapes():
        return {}
    return {
        name: f"{name}: {before} in the checkpoint, {now} now; the tensors of the checkpoint do not fit this model, so "
        "allow has no effect"
        for name, before, now in changed
    }


def _changed_optimizer(state: dict[str, Any], config: TrainingConfig) -> dict[str, str]:
    """Return a sentence by setting if some parameter has another optimizer than in the checkpoint, else {}.

    Its state has other tensors then, so the run cannot continue from it, whatever is allowed.
    """
    settings = state.get("config", {})
    try:
        saved = TrainingConfig.from_dict(settings)
    except ConfigError:
        return {}  # of another version; names of tensors are compared when they are read
    before, now = optimizer_of_parameters(saved), optimizer_of_parameters(config)
    others = [name for name in before if name in now and now[name] != before[name]]
    if not settings or not others:
        return {}
    first = others[0]
    more = f" and {len(others) - 1} more parameters" if len(others) > 1 else ""
    changed = "optimizer" if saved.optimizer != config.optimizer else "param_groups"
    return {
        changed: f"{changed}: {getattr(saved, changed)} in the checkpoint, {getattr(config, changed)} now; the "
        f"checkpoint holds the state of {before[first]} for {first}{more}, which {now[first]} cannot continue from, so "
        "allow has no effect"
    }


def check_steps_left(path: Path, state: dict[str, Any], config: TrainingConfig) -> None:
    """Check that the run does not end before its checkpoint. Errors: CheckpointError. Its last step may be the same."""
    step = state.get("step", 0)
    if step > config.total_steps:
        raise CheckpointError(
            f"total_steps: {config.total_steps} is less than {step}, the step of {path} that this run continues from, "
            f"so nothing would be trained; set it to more than {step} to train on, or {how_to_start_anew(config)}"
        )


def nothing_to_train(config: TrainingConfig, resumed_step: int) -> str:
    """Return why an unfinished run trains nothing, if stop_at_step is not beyond where it continues, else ""."""
    stop = config.stop_at_step
    if resumed_step == 0 or resumed_step >= config.total_steps or stop is None or stop > resumed_step:
        return ""
    return (
        f"nothing was trained, because stop_at_step {stop} is not beyond step {resumed_step}, from which this run "
        f"continued; set it to more than {resumed_step}, or leave it out"
    )


def _changed_past_steps(state: dict[str, Any], config: TrainingConfig) -> str:
    """Return "" if `skip_steps` leaves out the same of the steps that the checkpoint has behind it, else both values.

    Later steps may change: what was trained is then still what the newest configuration says.
    """
    step = state.get("step", 0)
    saved = up_to(parse_step_ranges(state.get("config", {}).get("skip_steps")), step)
    now = up_to(config.left_out_steps, step)
    if saved == now:
        return ""
    values = [format_step_ranges(ranges) or "none" for ranges in (saved, now)]
    return (
        f"skip_steps: of the steps 1 to {step}, {values[0]} left out in the checkpoint, {values[1]} now (to leave out "
        "others, resume from a checkpoint before them, and move later ones away)"
    )


def _changed_files(saved: Any, config: TrainingConfig) -> list[str]:
    """Return which files of train_data are missing or new, as far as their numbers tell it: ends of a sentence.

    saved: the data in a checkpoint. Of several files it names only the first and the last one.
    """
    sources = saved.get("train") if isinstance(saved, dict) else None
    changes = []
    for source, entry in zip(sources if isinstance(sources, list) else [sources], config.train_files, strict=False):
        if not isinstance(source, dict):
            continue
        before = _numbered_names(str(source.get("file")), source.get("shards", 1))
        try:
            now = {Path(path).name for path in shard_paths(entry)}
        except NoTokenFilesError:
            continue
        if before and max(len(before), len(now)) > 1:
            for what, names in (("missing now", sorted(before - now)), ("new", sorted(now - before))):
                changes += [f"{what} in {entry}: {format_list(names)}"] if names else []
    return changes


def _numbered_names(shown: str, count: int) -> set[str]:
    """Return the names of `count` files that are shown as "FIRST .. LAST" and numbered without gaps; else {}."""
    first, _, last = shown.partition(" .. ")
    if count == 1:
        return {shown}
    for start, end in zip(re.finditer(r"\d+", first), re.finditer(r"\d+", last), strict=False):
        low, high = int(start[0]), int(end[0])
        around = first[: start.start()], first[start.end() :]
        if start[0] != end[0]:
            same = around == (last[: end.start()], last[end.end() :])
            names = {f"{around[0]}{number:0{len(start[0])}d}{around[1]}" for number in range(low, low + count)}
            return names if same and high - low + 1 == count and last in names else set()
    return set()


def other_folders(config: TrainingConfig) -> str:
    """Return the settings that must have other values so that the checkpoints and logs of a run go elsewhere."""
    names = ["target_dir", *(name for name in ("ckpt_dir", "log_dir") if getattr(config, name))]
    return f"another {' and '.join(names)}"


def how_to_restore(config: TrainingConfig) -> str:
    """Return what to do if all checkpoints are damaged; they have other names then, so a start can download a copy."""
    return "restore one" if config.checkpoint_copies is None else "start again, from the newest copy of a checkpoint"


def how_to_start_anew(config: TrainingConfig) -> str:
    """Return what to do to train from step 0, with the checkpoints of this folder left as they are."""
    named = [name for name in ("resume", "ckpt_path_to_resume") if getattr(config, name) not in ("auto", None)]
    without = f", without {' and '.join(named)}" if named else ""
    return f"start a new run with {other_folders(config)}{without}"


def check_same_numerics(path: Path, state: dict[str, Any], config: TrainingConfig, numerics: dict[str, Any]) -> None:
    """Check that a reproducible run will compute the same bits as the run that saved the checkpoint.

    `numerics`: what else affects computed bits, besides the settings that `check_same_run` compares. Examples are
    versions and thread counts.
    Errors: CheckpointError that lists all differences, unless allow_drift is set or the run is not reproducible.
    """
    saved = {name: FIELDS[name].default for name in ADDED_ROUNDING_SETTINGS} | state.get("bits", {})
    differences = [
        f"{name}: {saved.get(name)} in the checkpoint, {now} now"
        for name, now in numerics.items()
        if saved.get(name) != now
    ]
    if differences and config.reproducible and not config.allow_drift:
        raise CheckpointError(
            f"{path}: resuming here would not be bit-identical; restore these settings or set allow_drift = true:\n  "
            + "\n  ".join(differences)
        )


def describe_changes(state: dict[str, Any], config: TrainingConfig) -> list[str]:
    """Return "setting: saved value -> present value" for each setting that differs from the checkpoint."""
    return [f"{name}: {saved} -> {now}" for name, saved, now in _changed_settings(state, config)]


def _changed_settings(state: dict[str, Any], config: TrainingConfig) -> list[tuple[str, Any, Any]]:
    """Return (name, saved value, present value) of the settings that both have and that differ."""
    saved = state.get("config", {})
    if saved:
        # before there was rope_type, llama3 was the only scaling
        rope_type = None if saved.get("rope_scaling_factor") is None else "llama3"
        saved = {name: FIELDS[name].default for name in ADDED_SETTINGS} | {"rope_type": rope_type} | saved
    # phases that begin when this run has ended do not change it, and its configuration must not have them
    if isinstance(weights := saved.get("train_weights"), list):
        saved = saved | {"train_weights": list(phases_before(tuple(weights), config.total_steps) or ())}
    if isinstance(warmup := saved.get("batch_size_warmup"), list):
        size, shorter = sizes_before(saved["batch_size"], warmup, config.total_steps)
        saved = saved | {"batch_size": size, "batch_size_warmup": None if shorter is None else list(shorter)}
    return [(name, saved[name], now) for name, now in config.resolved().items() if name in saved and saved[name] != now]
