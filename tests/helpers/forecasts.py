"""A small model, its memory estimate, and the cluster on which it is forecast."""

from __future__ import annotations

from typing import Any

from tests.helpers.memory import MODEL
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS
from tinytrain_dist.training import forecast, memory_estimate

SMALL: dict[str, Any] = {**MODEL, "num_layers": 2, "d_model": 64}


def estimated(context: DistributedContext, **settings: Any) -> memory_estimate.MemoryEstimate:
    """Estimate the memory of a step of the small model with these settings."""
    config = TrainingConfig(**{**SMALL, **settings})
    dims = choose_parallel_dims(config, context.world_size, context.local_world_size)
    return memory_estimate.estimate_memory(config, context.with_mesh(dims))


def meta_model() -> Any:
    """Return the small model without memory for its weights."""
    import torch

    from tinytrain_dist.model.transformer import TransformerLM

    with torch.device("meta"):
        return TransformerLM(TrainingConfig(**SMALL))


def two_nodes() -> forecast.Cluster:
    """Return 2 nodes with 2 H100 each."""
    return forecast.Cluster(2, 2, DEVICE_SPECS["h100"])
