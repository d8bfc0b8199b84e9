"""The settings of the runs that tests of checkpoints disturb."""

from __future__ import annotations

RUN = {"reproducible": True, "parallel": "fsdp", "total_steps": 8, "ckpt_every": 2, "eval_every": 100}
