"""Check the values of a configuration: ranges, pairs of settings that contradict each other, settings without effect.

Must not know types (type_conversion.py), ranks or files. A problem is one sentence: the setting, what is expected, the
value, what to do.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Container
from typing import TYPE_CHECKING

from tinytrain_dist.config.batch_phases import batch_warmup_problems
from tinytrain_dist.config.batch_sizes import divisors, micro_batch_sizes, nearest_multiples
from tinytrain_dist.config.checkpoint_copies import copies_problems
from tinytrain_dist.config.defaults import changed_from_default
from tinytrain_dist.config.model_config import MODEL_SETTINGS
from tinytrain_dist.config.parallel_problems import parallel_problems
from tinytrain_dist.config.parameter_groups import group_problems, named_shapes, resolve_groups
from tinytrain_dist.config.rope_scaling import SETTINGS_OF_ROPE_TYPE
from tinytrain_dist.config.step_ranges import STEP_RANGES
from tinytrain_dist.config.weight_phases import weight_problems
from tinytrain_dist.utils.text import format_choices, format_list

if TYPE_CHECKING:  # not at run time, because schema.py imports this module
    from tinytrain_dist.config.schema import TrainingConfig

# A resume is refused if the checkpoint has another value of one of these settings, or other data.
IDENTITY_SETTINGS = (
    *MODEL_SETTINGS,
    "batch_size",
    "batch_size_warmup",
    "seed",
    "sampling",
    "train_weights",
    "loss_mask",
    "packing",
    "document_mask",
    "optimizer",
    "param_groups",
)
# The same for the part of these settings that is about steps before the checkpoint.
PAST_SETTINGS = ("skip_steps",)
# A resume of a reproducible run is refused if the checkpoint has another value of one of these settings. They change
# only how results are rounded.
ROUNDING_SETTINGS = ("reproducible", "micro_batch_size", "precision", "compile", "loss_chunk_tokens", "cp")

TRACKERS = ("tensorboard", "wandb", "mlflow")

# Larger numbers of steps, windows or tokens are not exact as float64, in which records and schedules hold them.
LARGEST_NUMBER = 1 << 53

AT_LEAST_ONE = tuple(
    "total_steps log_every eval_every eval_steps batch_size context_len num_layers num_heads d_model "
    "ckpt_every keep_last copies_keep_last max_shard_bytes max_skipped_steps ema_every muon_steps cp".split()
)
NONE_OR_AT_LEAST_ONE = tuple(
    "micro_batch_size vocab_size num_kv_heads head_dim d_ff stop_at_step keep_every dp_replicate dp_shard "
    "loss_chunk_tokens cosine_iters decay_iters rope_original_context_len cpu_threads early_stop_patience "
    "fingerprint_every stability_every ckpt_writers copies_keep_every".split()
)
POSITIVE_AND_FINITE = tuple(
    "lr_max eps norm_eps rope_theta grad_clip_norm time_limit rope_scaling_factor rope_beta_fast "
    "rope_beta_slow rope_attention_factor epochs skip_spikes z_loss logit_soft_cap".split()
)
NOT_NEGATIVE = tuple(
    "lr_min weight_decay seed warmup_iters start_limit step_limit save_limit sample_tokens copies_end_limit "
    "snapshot_every".split()
)


def find_problems(config: TrainingConfig) -> list[str]:
    """Return a sentence for each reason why this configuration cannot be run. Ranks and files are not examined."""
    problems = _range_problems(config)
    if problems:  # the checks below divide by these numbers
        return problems
    checks = (
        _text_problems,
        _shape_problems,
        _epoch_problems,
        _schedule_problems,
        _data_problems,
        _schedule_effect_problems,
        _optimizer_problems,
        parallel_problems,
        _resume_problems,
        lambda config: config.model.rope_problems(),
        _stop_and_profile_problems,
        _skipping_problems,
        _allow_problems,
        _average_problems,
        _evaluation_and_retention_problems,
        _reproducible_problems,
        _name_problems,
        _tracker_problems,
        copies_problems,
    )
    return [problem for check in checks for problem in check(config)]


def _range_problems(config: TrainingConfig) -> list[str]:
    """Return problems of single numbers: too small, negative, or not finite."""
    problems: list[str] = []
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        if value < 1:
            problems.append(f"{name}: {value} must be at least 1")
    for name in NONE_OR_AT_LEAST_ONE:
        value = config.fixed_micro_batch_size if name == "micro_batch_size" else getattr(config, name)
        if value is not None and value < 1:
            default = "" if _must_be_set(config, name) else " (leave it out for the default)"
            problems.append(f"{name}: {value} must be at least 1{default}")
    for name in POSITIVE_AND_FINITE:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:  # true for NaN as well
            problems.append(f"{name}: {value} must be greater than 0 and finite")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            problems.append(f"{name}: {value} must {'not be negative' if value < 0 else 'be a finite number'}")
    problems += _size_problems(config)
    if config.seed >= 1 << 64:
        problems.append(
            f"seed: {config.seed} must be less than 2**64 (one 64-bit word of the generator's key); use a smaller one"
        )
    return problems


def _size_problems(config: TrainingConfig) -> list[str]:
    """Return problems of numbers that are too large to be counted exactly."""
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, int) and name != "seed"}
    if config.epochs is not None and config.epochs < math.inf:
        numbers["epochs"] = math.ceil(config.epochs)
    problems = [
        f"{name}: {getattr(config, name)} must be at most 2**53 = {LARGEST_NUMBER}; set a smaller number"
        for name, value in numbers.items()
        if value > LARGEST_NUMBER
    ]
    if not problems and config.epochs is None and config.total_steps * config.batch_size > LARGEST_NUMBER:
        problems.append(
            f"total_steps: {config.total_steps} steps x batch_size {config.batch_size} are more than 2**53 = "
            f"{LARGEST_NUMBER} windows; set fewer steps"
        )
    return problems


def _must_be_set(config: TrainingConfig, name: str) -> bool:
    """Return whether another setting needs this one, so that it cannot be left out."""
    if name == "micro_batch_size":
        return config.reproducible
    return name == "rope_original_context_len" and name in SETTINGS_OF_ROPE_TYPE[config.model.resolved_rope_type]


def _value(config: TrainingConfig, name: str, used: object = None) -> str:
    """Return the value of a setting for a message, marked if it is the default, which the user may not have set.

    used: the value that follows from a default of None.
    """
    value = getattr(config, name)
    default = " (the default)" if value == type(config).__dataclass_fields__[name].default else ""
    return f"{value if used is None else used}{default}"


def _shape_problems(config: TrainingConfig) -> list[str]:
    """Return problems of sizes of the model or of a batch that do not fit together."""
    problems = config.model.shape_problems()
    if config.precision == "fp8" and not problems:
        problems += config.model.fp8_problems()
    micro_batch_size = config.fixed_micro_batch_size
    if micro_batch_size and config.batch_size % micro_batch_size:
        choices = micro_batch_sizes(config.batch_size, 1, config.reproducible)
        problems.append(
            f"batch_size: {config.batch_size} is not a multiple of micro_batch_size {micro_batch_size}; "
            f"micro_batch_size can be {format_list(choices)}"
        )
    if config.batch_size_warmup is not None:
        total_steps = config.total_steps if config.epochs is None else None
        problems += batch_warmup_problems(
            config.batch_size_warmup, config.batch_size, micro_batch_size, config.reproducible, total_steps
        )
    return problems


def _epoch_problems(config: TrainingConfig) -> list[str]:
    """Return problems of `epochs`, which stands for total_steps until the data is known."""
    if config.epochs is None:
        return []
    problems = []
    if config.sampling != "shuffle":
        problems.append(
            f"epochs: {config.epochs} needs sampling = shuffle, but sampling is {_value(config, 'sampling')}; set it, "
            "or set total_steps instead"
        )
    if config.total_steps != type(config).__dataclass_fields__["total_steps"].default:
        problems.append(f"epochs: {config.epochs} and total_steps {config.total_steps} are both set; leave one out")
    return problems


def _schedule_problems(config: TrainingConfig) -> list[str]:
    """Return problems of the learning-rate schedule and the optimizer."""
    problems = []
    if config.lr_min > config.lr_max:
        problems.append(
            f"lr_min: {_value(config, 'lr_min')} is greater than lr_max {_value(config, 'lr_max')}; set lr_min to at "
            f"most {config.lr_max}, or lr_max to at least {config.lr_min}"
        )
    if not all(0 <= beta < 1 for beta in config.betas):
        problems.append(f"betas: {config.betas} must both lie in [0, 1)")
    if config.epochs is not None:
        return problems  # total_steps, on which the others depend, is not known yet
    if config.schedule in ("cosine", "linear") and config.cosine_end < config.warmup_steps:
        problems.append(_warmup_problem(config))
    if config.schedule == "wsd" and config.warmup_steps + config.decay_steps > config.total_steps:
        problems.append(_wsd_problem(config))
    return problems


def _optimizer_problems(config: TrainingConfig) -> list[str]:
    """Return problems of the parameter groups, and of settings for an optimizer that no group has."""
    if not 0 <= config.muon_momentum < 1:
        return [f"muon_momentum: {config.muon_momentum} must lie in [0, 1)"]
    parameters = named_shapes(config.model) if config.param_groups or config.optimizer != "adamw" else []
    problems = group_problems(parameters, config.param_groups) if config.param_groups else []
    if problems or any(group.optimizer == "muon" for group in resolve_groups(parameters, config)):
        return problems
    if config.optimizer == "muon":
        problems.append("optimizer: muon has no effect, because param_groups gives all matrices to adamw; change one")
    problems += [
        f"{name}: {getattr(config, name)} has no effect without Muon; leave it out, or set optimizer = muon"
        for name in changed_from_default(config, ("muon_momentum", "muon_steps", "muon_scale"))
    ]
    return problems


def _warmup_problem(config: TrainingConfig) -> str:
    """Return why the cosine or the line ends before the warm-up, and what can be changed."""
    end = "cosine_iters" if config.cosine_iters else "total_steps"  # without cosine_iters the decay ends with the run
    warmup, last = config.warmup_steps, config.cosine_end
    return (
        f"{end}: {_value(config, end)} is less than warmup_iters {_value(config, 'warmup_iters', warmup)}; set {end} "
        f"to at least {warmup}, or warmup_iters to at most {last}"
    )


def _wsd_problem(config: TrainingConfig) -> str:
    """Return why warm-up and decay do not fit in the run, and what can be changed."""
    warmup, decay, total = config.warmup_steps, config.decay_steps, config.total_steps
    changes = []
    if decay <= total:
        changes.append(f"warmup_iters to at most {total - decay}")
    if warmup < total:
        changes.append(f"decay_iters to at most {total - warmup}")
    longer = total
    while (needed := _replaced_total(config, longer)) > longer:  # defaults grow with total_steps, but less than it
        longer = needed
    changes.append(f"total_steps to at least {longer}")
    return (
        f"decay_iters: {_value(config, 'decay_iters', decay)} + warmup_iters {_value(config, 'warmup_iters', warmup)} "
        f"is more than total_steps {_value(config, 'total_steps')}; set {', or '.join(changes)}"
    )


def _replaced_total(config: TrainingConfig, total: int) -> int:
    """Return how many steps warm-up and decay take together in a run of `total` steps."""
    kind = type(config)
    longer = object.__new__(kind)  # not checked
    longer.__dict__.update(vars(config), total_steps=total)
    return longer.warmup_steps + longer.decay_steps


def _data_problems(config: TrainingConfig) -> list[str]:
    """Return problems of the lists of token files and their weights."""
    problems = []
    for name, files in (("train_data", config.train_files), ("val_data", config.val_files)):
        repeated = [file for file in files if files.count(file) > 1]
        if repeated:
            can_be_weighted = name == "train_data" and len(set(files)) > 1
            more = ", and set train_weights to draw more from it" if can_be_weighted else ""
            problems.append(f"{name}: contains {repeated[0]} twice; list it once{more}")
    if config.train_weights is not None:
        total_steps = config.total_steps if config.epochs is None else None
        problems += weight_problems(config.train_weights, len(config.train_files), total_steps)
    return problems


def _schedule_effect_problems(config: TrainingConfig) -> list[str]:
    """Return problems of settings that belong to another schedule than the chosen one."""
    problems = []
    if config.schedule != "cosine" and config.cosine_iters is not None:
        problems.append(f"cosine_iters: has no effect with schedule = {config.schedule}; leave it out")
    if config.schedule != "wsd" and config.decay_iters is not None:
        problems.append(f"decay_iters: has no effect with schedule = {config.schedule}; leave it out")
    if config.schedule != "wsd" and config.decay_shape != "linear":
        problems.append(f"decay_shape: has no effect with schedule = {config.schedule}; leave it out")
    return problems


def _resume_problems(config: TrainingConfig) -> list[str]:
    """Return a problem if two settings name different checkpoints to resume from."""
    path = config.ckpt_path_to_resume
    if path and config.resume not in ("auto", path):
        return [f"resume: {config.resume!r} contradicts ckpt_path_to_resume {path!r}; set one"]
    return []


def _stop_and_profile_problems(config: TrainingConfig) -> list[str]:
    """Return problems of stop_at_step and profile."""
    problems = []
    if config.epochs is None and config.stop_at_step is not None and config.stop_at_step > config.total_steps:
        problems.append(f"stop_at_step: {config.stop_at_step} is beyond total_steps {config.total_steps}; leave it out")
    if config.profile is not None:
        last = config.last_step if config.epochs is None else 10**15  # not known yet
        if not re.fullmatch(r"[0-9]{1,15}:[0-9]{1,15}", config.profile):
            example = f"{min(20, last)}:{min(25, last)}"
            problems.append(f"profile: {config.profile!r} must be START:STOP, two step numbers, for example {example}")
        elif not (config.profiled_steps and 1 <= config.profiled_steps[0] <= last):
            problems.append(f"profile: {config.profile} must be START:STOP with 1 <= START <= STOP and START <= {last}")
    return problems


def _skipping_problems(config: TrainingConfig) -> list[str]:
    """Return problems of skip_spikes, spike_window and skip_steps."""
    problems = []
    if config.spike_window < 2:
        problems.append(f"spike_window: {config.spike_window} must be at least 2, to have a standard deviation")
    elif (
        config.skip_spikes is None and config.spike_window != type(config).__dataclass_fields__["spike_window"].default
    ):
        problems.append(
            f"spike_window: {config.spike_window} has no effect without skip_spikes; set it (6 is usual), or leave "
            "this out"
        )
    if config.skip_steps is None:
        return problems
    if not STEP_RANGES.fullmatch(config.skip_steps):
        return [
            *problems,
            f"skip_steps: {config.skip_steps!r} must be START:STOP, two step numbers, or several of these with commas "
            "between, for example 1000:1010,2000:2004",
        ]
    for start, stop in re.findall(r"(\d+):(\d+)", config.skip_steps):
        if not 1 <= int(start) <= int(stop):
            problems.append(f"skip_steps: {start}:{stop} must be START:STOP with 1 <= START <= STOP")
        elif config.epochs is None and int(stop) > config.total_steps:
            problems.append(f"skip_steps: {start}:{stop} goes beyond total_steps {config.total_steps}; end it there")
    return problems


def _allow_problems(config: TrainingConfig) -> list[str]:
    """Return a problem for each name in `allow` that is not checked on resume."""
    checked = (*IDENTITY_SETTINGS, *PAST_SETTINGS, "train_data")
    return [
        f"allow: {name} is not checked on resume; leave it out (checked: {', '.join(checked)})"
        for name in sorted(config.allowed_changes - {*checked})
    ]


def _average_problems(config: TrainingConfig) -> list[str]:
    """Return problems of the settings of the moving average of the weights."""
    decay = config.ema_decay
    if decay is not None and not 0 < decay < 1:  # true for NaN as well
        return [
            f"ema_decay: {decay} must be greater than 0 and less than 1 (0 would copy the weights, 1 would keep the "
            "initial ones); usual are 0.99 to 0.9999"
        ]
    if decay is not None:
        return []
    return [
        f"{name}: {_value(config, name)} has no effect without ema_decay; set it, or leave this out"
        for name in changed_from_default(config, ("ema_every", "ema_on_host"))
    ]


def _evaluation_and_retention_problems(config: TrainingConfig) -> list[str]:
    """Return problems of settings for evaluations and kept checkpoints that would have no effect."""
    problems = []
    if config.early_stop_patience is not None and not config.val_files:
        problems.append("early_stop_patience: has no effect without val_data; leave it out, or set val_data")
    if config.stability_every is not None and config.stability_every % config.log_every:
        choices = {
            "stability_every": nearest_multiples(config.stability_every, config.log_every),
            "log_every": [size for size in divisors(config.stability_every) if size <= config.log_every][-3:],
        }
        problems.append(
            f"stability_every: {config.stability_every} is not a multiple of log_every {_value(config, 'log_every')}, "
            f"so some of these steps have no record; possible: {format_choices(choices)}"
        )
    if config.keep_every is not None and config.keep_every % config.ckpt_every:
        choices = {
            "keep_every": nearest_multiples(config.keep_every, config.ckpt_every),
            "ckpt_every": [size for size in divisors(config.keep_every) if size <= config.ckpt_every][-3:],
        }
        problems.append(
            f"keep_every: {config.keep_every} is not a multiple of ckpt_every {_value(config, 'ckpt_every')}, so some "
            f"of these steps have no checkpoint; possible: {format_choices(choices)}"
        )
    return problems


EVALUATION_SETTINGS = ("eval_every", "eval_steps", "sample_tokens")


def unused_evaluation_settings(config: TrainingConfig, names: Container[str]) -> list[str]:
    """Return a problem for each of the settings `names` that only an evaluation uses, if the run has none.

    A default is accepted even if it is written out. `find_problems` does not call this, because configurations of old
    checkpoints must stay readable.
    """
    if config.val_files:
        return []
    fields = type(config).__dataclass_fields__
    return [
        f"{name}: has no effect without val_data; leave it out, or set val_data"
        for name in EVALUATION_SETTINGS
        if name in names and getattr(config, name) not in (fields[name].default, 0)
    ]


def _reproducible_problems(config: TrainingConfig) -> list[str]:
    """Return problems of settings that depend on `reproducible`."""
    problems = []
    if config.allow_drift and not config.reproducible:
        problems.append("allow_drift: has no effect with reproducible = false; leave it out")
    if config.reproducible and config.fixed_micro_batch_size is None:
        problems.append(
            "micro_batch_size: must be set to a number with reproducible = true, because the bits depend on it; "
            f"possible: {format_list(micro_batch_sizes(config.batch_size, 1, config.reproducible))}"
        )
    return problems


def _text_problems(config: TrainingConfig) -> list[str]:
    """Return a problem for each text that a file of settings cannot contain, or that no path can contain."""
    problems = []
    for name, value in vars(config).items():
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            try:
                text.encode()
            except UnicodeEncodeError:
                problems.append(f"{name}: {text!r} is not valid UTF-8; give another name")
            if "\0" in text:
                problems.append(f"{name}: {text!r} contains the character NUL; leave it out")
    return problems


def _name_problems(config: TrainingConfig) -> list[str]:
    """Return a problem for each prefix of file names that is no part of a file name."""
    return [
        f"{name}: {value!r} must be a plain name, not empty and without /"
        for name in ("ckpt_save_prefix", "log_save_prefix")
        if not (value := getattr(config, name)) or "/" in value
    ]


def _tracker_problems(config: TrainingConfig) -> list[str]:
    """Return a problem for each tracker that is unknown or listed twice. Whether it can be used is checked later."""
    problems = []
    for name in dict.fromkeys(config.trackers):
        if config.trackers.count(name) > 1:
            problems.append(f"trackers: contains {name} twice; list it once")
        if name in TRACKERS or re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name):
            continue
        nearest = difflib.get_close_matches(name.lower(), TRACKERS, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"use {', '.join(TRACKERS)} or package.module:ClassName"
        problems.append(f"trackers: {name!r} is unknown; {remedy}")
    return problems
