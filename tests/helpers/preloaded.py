"""What the server process of tests/helpers/ranks.py imports once, for all ranks that are forked from it.

A rank that trains would need 0.6 s of processor time to import the trainer and TensorBoard itself.
"""

from __future__ import annotations

import gc
import importlib

for name in (
    "tinytrain_dist.training.build",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "numpy.ma",
    "pytest",
    "hypothesis",
    "tensorboard.plugins.hparams.metadata",
    "tinytrain_dist.metrics.trackers.tensorboard",
    "tests.helpers.training",
):
    importlib.import_module(name)
gc.freeze()  # training collects garbage at its start, which would take a rank 0.2 s for all these modules
