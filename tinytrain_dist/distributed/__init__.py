"""Ranks, meshes and collectives: the only package that calls torch.distributed.

A training loop of your own starts with `init_distributed` and ends with `shutdown`. Both are imported on first use, so
that a login node can compute a batch plan without importing torch. `start` and `close` are their old names, from before
version 0.1.

Reading order: `parallel_dims` and `batch_plan` (arithmetic without torch), `network` and `rendezvous` (used before a
process group exists), `context`, `collectives`, `dtensor`, `shard_transfer`, `fake_backend`, `process_end`,
`torch_internals`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAME_IN_CONTEXT = {
    "init_distributed": "init_distributed",
    "shutdown": "shutdown",
    "DistributedContext": "DistributedContext",
    "start": "init_distributed",
    "close": "shutdown",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _NAME_IN_CONTEXT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.context"), _NAME_IN_CONTEXT[name])
