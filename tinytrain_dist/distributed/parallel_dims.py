"""Choose the device mesh of a run: how many replicas, and how many shards in each.

Must not know torch: a login node makes the same choice as the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError


@dataclass(frozen=True)
class ParallelDims:
    """How ranks share the work: `replicate` groups of `shard` ranks, the mode's name, and why it was chosen."""

    mode: str
    replicate: int
    shard: int
    reason: str

    def __str__(self) -> str:
        return f"parallel = {self.mode}: {self.replicate} replica(s) x {self.shard} shard(s); {self.reason}"


def choose_parallel_dims(
    config: TrainingConfig, world_size: int, local_world_size: int, fits: bool = True
) -> ParallelDims:
    """Choose the mesh of a run. `fits`: one device holds weights, gradients and optimizer state.

    Errors: ConfigError where the mode and the number of ranks do not go together, listing what would.
    """
    if config.parallel == "auto":
        if world_size == 1:
            return ParallelDims("none", 1, 1, "chosen because there is one process")
        if fits:
            return ParallelDims("ddp", world_size, 1, "chosen because the model and its optimizer fit on one device")
        if 1 < local_world_size < world_size:
            nodes = world_size // local_world_size
            return ParallelDims(
                "hsdp", nodes, local_world_size, "chosen because the model needs the devices of one node"
            )
        return ParallelDims("fsdp", 1, world_size, "chosen because the model does not fit on one device")
    if config.parallel == "none" and world_size > 1:
        raise ConfigError(f"parallel: none runs on 1 process, but there are {world_size}; use ddp, fsdp or auto")
    if config.parallel != "hsdp":
        replicate = world_size if config.parallel == "ddp" else 1
        return ParallelDims(config.parallel, replicate, world_size // replicate, "as configured")
    shard = config.dp_shard or (world_size // config.dp_replicate if config.dp_replicate else local_world_size)
    replicate = config.dp_replicate or world_size // max(1, shard)
    if replicate * shard != world_size:
        pairs = [f"{world_size // s} x {s}" for s in range(2, world_size) if world_size % s == 0]
        raise ConfigError(
            f"dp_replicate x dp_shard: {replicate} x {shard} is not the {world_size} processes there are; "
            f"possible: {', '.join(pairs) or 'none, use ddp or fsdp'}"
        )
    if shard == 1:
        return ParallelDims("ddp", replicate, 1, "hsdp with one shard is ddp")
    if replicate == 1:
        return ParallelDims("fsdp", 1, shard, "hsdp with one replica is fsdp")
    return ParallelDims("hsdp", replicate, shard, "as configured")
