"""Check a configuration: every problem that shows without looking at ranks or files, as one sentence each."""

from __future__ import annotations

import math
import re

from tinytrain_dist.config.schema import IDENTITY_SETTINGS, TrainingConfig
from tinytrain_dist.utils.text import format_list

AT_LEAST_ONE = tuple(
    "total_steps log_every eval_every eval_steps batch_size context_len num_layers num_heads d_model "
    "ckpt_every keep_last max_shard_bytes max_skipped_steps ckpt_writers".split()
)
NONE_OR_AT_LEAST_ONE = tuple(
    "micro_batch_size vocab_size num_kv_heads head_dim d_ff stop_at_step keep_every dp_replicate dp_shard "
    "loss_chunk_tokens cosine_iters decay_iters rope_original_context_len cpu_threads early_stop_patience "
    "fingerprint_every".split()
)


def find_problems(c: TrainingConfig) -> list[str]:
    """Every sentence that says why this configuration cannot be run, without looking at ranks or files."""
    found: list[str] = []

    def need(ok: bool, sentence: str) -> None:
        if not ok:
            found.append(sentence)

    for name in AT_LEAST_ONE:
        need(getattr(c, name) >= 1, f"{name}: {getattr(c, name)} must be at least 1")
    for name in NONE_OR_AT_LEAST_ONE:
        value = c.fixed_micro_batch_size if name == "micro_batch_size" else getattr(c, name)
        need(value is None or value >= 1, f"{name}: {value} must be at least 1 (leave it out for the default)")
    for name in (
        "lr_max",
        "eps",
        "norm_eps",
        "rope_theta",
        "grad_clip_norm",
        "time_limit",
        "rope_scaling_factor",
    ):
        value = getattr(c, name)
        need(value is None or 0 < value < math.inf, f"{name}: {value} must be greater than 0 and finite")
    not_negative = "lr_min weight_decay seed warmup_iters start_limit step_limit save_limit sample_tokens"
    for name in not_negative.split():
        value = getattr(c, name)
        need(value is None or 0 <= value < math.inf, f"{name}: {value} must not be negative")
    need(c.seed < 1 << 64, f"seed: {c.seed} must be less than 2**64; the generator's key has one word for it")
    if found:  # the sentences below divide by these numbers
        return found
    return _shape_problems(c) + _schedule_problems(c) + _data_problems(c) + _effect_problems(c)


def _shape_problems(c: TrainingConfig) -> list[str]:
    found = []
    if c.head_dim is None and c.d_model % c.num_heads:
        found.append(f"d_model: {c.d_model} is not a multiple of num_heads {c.num_heads}; change one, or set head_dim")
    elif c.head_width % 2:
        found.append(f"d_model: head width {c.head_width} is odd; rotary embeddings need d_model/num_heads even")
    if c.num_heads % c.kv_heads:
        found.append(f"num_kv_heads: {c.kv_heads} does not divide num_heads {c.num_heads}")
    if c.fixed_micro_batch_size and c.batch_size % c.fixed_micro_batch_size:
        choices = [m for m in range(1, c.batch_size + 1) if c.batch_size % m == 0]
        found.append(
            f"batch_size: {c.batch_size} is not a multiple of micro_batch_size {c.micro_batch_size}; "
            f"micro_batch_size can be {format_list(choices)}"
        )
    return found


def _schedule_problems(c: TrainingConfig) -> list[str]:
    found = []
    if c.lr_min > c.lr_max:
        found.append(f"lr_min: {c.lr_min} is greater than lr_max {c.lr_max}; swap them")
    if not all(0 <= beta < 1 for beta in c.betas):
        found.append(f"betas: {c.betas} must both lie in [0, 1)")
    if c.schedule == "cosine" and c.cosine_end < c.warmup_steps:
        found.append(f"cosine_iters: {c.cosine_end} ends before warmup_iters {c.warmup_steps}; raise it")
    if c.schedule == "wsd" and c.warmup_steps + c.decay_steps > c.total_steps:
        found.append(
            f"decay_iters: {c.decay_steps} + warmup_iters {c.warmup_steps} is more than total_steps {c.total_steps}"
        )
    return found


def _data_problems(c: TrainingConfig) -> list[str]:
    found = []
    for name, files in (("train_data", c.train_files), ("val_data", c.val_files)):
        if twice := [file for file in files if files.count(file) > 1]:
            found.append(f"{name}: names {twice[0]} twice; name it once, and set train_weights to draw more from it")
    if c.train_weights is not None:
        count, weights = len(c.train_files), list(c.train_weights)
        if count < 2:
            found.append("train_weights: has no effect without several files in train_data; leave it out")
        elif len(weights) != count:
            found.append(f"train_weights: {len(weights)} numbers for {count} files in train_data; give one for each")
        if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            found.append(f"train_weights: {weights} must be finite and not negative, and one of them more than 0")
    return found


def _effect_problems(c: TrainingConfig) -> list[str]:
    """Find settings that are set but would change nothing, or that contradict each other."""
    found = []
    if c.schedule != "cosine" and c.cosine_iters is not None:
        found.append(f"cosine_iters: has no effect with schedule = {c.schedule}; leave it out")
    if c.schedule != "wsd" and c.decay_iters is not None:
        found.append(f"decay_iters: has no effect with schedule = {c.schedule}; leave it out")
    if c.parallel != "hsdp":
        found += [
            f"{name}: has no effect with parallel = {c.parallel}; leave it out, or set parallel = hsdp"
            for name in ("dp_replicate", "dp_shard")
            if getattr(c, name) is not None
        ]
    if c.parallel in ("none", "fsdp") and c.fingerprint_every is not None:
        found.append(f"fingerprint_every: parallel = {c.parallel} has no replicas to compare; leave it out")
    if c.ckpt_path_to_resume and c.resume not in ("auto", c.ckpt_path_to_resume):
        found.append(f"resume: {c.resume!r} contradicts ckpt_path_to_resume {c.ckpt_path_to_resume!r}; set one")
    if (c.rope_scaling_factor is None) != (c.rope_original_context_len is None):
        found.append("rope_scaling_factor: needs rope_original_context_len, and the other way round; set both")
    if c.rope_scaling_factor is None and (c.rope_low_freq_factor, c.rope_high_freq_factor) != (1.0, 4.0):
        found.append("rope_low_freq_factor: has no effect without rope_scaling_factor; leave it out")
    if c.rope_low_freq_factor >= c.rope_high_freq_factor:
        found.append(f"rope_low_freq_factor: {c.rope_low_freq_factor} must be below {c.rope_high_freq_factor}")
    if c.stop_at_step is not None and c.stop_at_step > c.total_steps:
        found.append(f"stop_at_step: {c.stop_at_step} is beyond total_steps {c.total_steps}; leave it out")
    if c.profile is not None and not re.fullmatch(r"[0-9]{1,15}:[0-9]{1,15}", c.profile):
        found.append(f"profile: {c.profile!r} must be START:STOP, two step numbers, for example 20:25")
    elif c.profile is not None and not (c.profiled_steps and 1 <= c.profiled_steps[0] <= c.last_step):
        found.append(f"profile: {c.profile} must be START:STOP with 1 <= START <= STOP, START at most {c.last_step}")
    for name in sorted(c.allowed_changes - {*IDENTITY_SETTINGS, "train_data"}):
        found.append(f"allow: {name} is not checked on resume; checked are {', '.join(IDENTITY_SETTINGS)}, train_data")
    if c.early_stop_patience is not None and not c.val_files:
        found.append("early_stop_patience: has no effect without val_data; leave it out, or set val_data")
    if c.keep_every is not None and c.keep_every % c.ckpt_every:
        found.append(
            f"keep_every: {c.keep_every} is not a multiple of ckpt_every {c.ckpt_every}, so there is no checkpoint at "
            "most of these steps; change one"
        )
    if c.allow_drift and not c.reproducible:
        found.append("allow_drift: has no effect with reproducible = false; leave it out")
    if c.reproducible and c.fixed_micro_batch_size is None:
        found.append("micro_batch_size: must be set with reproducible = true to a number, since it decides bits")
    if "/" in c.ckpt_save_prefix + c.log_save_prefix or not (c.ckpt_save_prefix and c.log_save_prefix):
        found.append("ckpt_save_prefix, log_save_prefix: must be plain names, without /")
    return found
