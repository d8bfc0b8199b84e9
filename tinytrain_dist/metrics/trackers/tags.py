"""Name the numbers and events of a run as all trackers show them. Must not know any tracker."""

from __future__ import annotations

# The numbers of a logged step, by the part of their tag before the name.
TAG_GROUPS = {
    "train": ("loss", "lr", "grad_norm", "z_loss", "epoch", "batch_size"),
    "speed": ("tokens_per_second", "step_seconds", "data_wait_seconds", "memory_gib", "mfu", "goodput"),
    "health": ("skipped_steps", "slowest_to_median", "slowest_rank"),
}
TAGS = {name: f"{group}/{name}" for group, names in TAG_GROUPS.items() for name in names}
# In a chart of events, each kind is a row of dots, one at the step of each event.
EVENTS = (
    "resumed", "restarted", "saved", "save_failed", "skipped", "slow", "replicas_differ", "stopped", "recompiled",
    "output_lost", "first_step", "epoch", "parameter_groups", "branched", "copied", "copy_failed", "left_out",
    "recovered",
    "snapshot", "snapshot_failed", "initialized",
)  # fmt: skip
EVENT_ROWS = {kind: row for row, kind in enumerate(EVENTS, 1)}  # 0 for any other kind
