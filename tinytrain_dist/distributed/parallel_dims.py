"""Choose the device mesh of a run: how many replicas, and how many shards in each.

These terms have the same meaning in the whole package:

* A replica is a group of ranks that together hold one whole copy of weights, gradients and optimizer state.
* A shard is the part of that copy that one rank holds. DDP has one shard in each replica, FSDP has one replica.
* An axis belongs to the mesh of ranks. The axis `dp_replicate` numbers the replicas, and `dp_shard` numbers the shards
  of each replica. Rank r is shard r % dp_shard of replica r // dp_shard.
* With context parallelism, each of these data-parallel ranks is a group of `cp` ranks, which follow one another. They
  have the same sequences, and each has some columns of them. So rank r is member r % cp of the group r // cp. FSDP and
  HSDP shard the weights over dp_shard x cp ranks; DDP replicates them on all ranks.
* A dim belongs to a tensor. Parameters are sharded over tensor dim 0 (their rows) along the axis `dp_shard`.

Must not know torch: a login node without torch makes the same choice as the ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tinytrain_dist.config.batch_sizes import divisors
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.text import format_list

MIN_SHARDED_PARAMETERS = 100_000_000  # of a model that `parallel = auto` shards on GPUs although a replica would fit
SETTINGS_OF_SOME_MODES = ("reshard_after_forward", "fingerprint_every")


@dataclass(frozen=True)
class ParallelDims:
    """The sizes of the mesh axes.

    * `mode`: none, ddp, fsdp or hsdp.
    * `replicate`: number of replicas, the size of the axis dp_replicate.
    * `shard`: number of shards in each replica, the size of the axis dp_shard.
    * `reason`: why this mode was chosen, for the log.
    * `cp`: number of ranks that share each sequence, the size of the axis cp.
    """

    mode: str
    replicate: int
    shard: int
    reason: str
    cp: int = 1

    @property
    def weight_replicas(self) -> int:
        """Return how many copies of the weights there are over all ranks."""
        return self.replicate if self._shards_weights else self.replicate * self.cp

    @property
    def weight_shards(self) -> int:
        """Return into how many shards each copy of the weights is divided."""
        return self.shard * self.cp if self._shards_weights else self.shard

    @property
    def _shards_weights(self) -> bool:
        return self.mode in ("fsdp", "hsdp")

    def __str__(self) -> str:
        sequences = f" x {self.cp} ranks for each sequence" if self.cp > 1 else ""
        return f"parallel = {self.mode}: {self.replicate} replica(s) x {self.shard} shard(s){sequences}; {self.reason}"


def shard_rows(rows: int, shards: int, index: int) -> tuple[int, int]:
    """Return the first row of shard `index` and the row after its last one.

    Shards have ceil(rows / shards) rows each; the last ones may be shorter or empty. This is how DTensor's Shard(0)
    splits dim 0.
    """
    rows_per_shard = -(-rows // shards)  # rounded up
    return min(rows, index * rows_per_shard), min(rows, (index + 1) * rows_per_shard)


def choose_parallel_dims(
    config: TrainingConfig, world_size: int, local_world_size: int, fits: bool = True, device_type: str = "cpu"
) -> ParallelDims:
    """Choose the mesh of a run with `world_size` ranks, `local_world_size` of them on each node.

    `fits`: whether weights, gradients and optimizer state fit on one device. `device_type`: cpu or cuda. Both matter
    only if `parallel` is auto.
    Errors: ConfigError if the mode cannot be used with this number of ranks. It lists what can be used.
    """
    cp = config.cp
    _check_cp(config, world_size, local_world_size)
    if config.parallel == "auto":
        prefers_shards = device_type == "cuda" and _gains_from_shards(config)
        return _choose_mode(world_size, local_world_size, cp, fits, prefers_shards)
    if config.parallel == "none" and world_size > cp:
        needed, also = ("1 process", "") if cp == 1 else (f"{cp} processes", f" with cp = {cp}")
        raise ConfigError(
            f"parallel: none runs on {needed}{also}, but there are {world_size}; start {needed}, or set "
            f"{describe_modes(config, ('auto', 'ddp', 'fsdp'))}"
        )
    if config.parallel == "hsdp":
        return _hsdp_dims(config, world_size // cp, local_world_size // cp)
    data_ranks = world_size // cp
    replicate = data_ranks if config.parallel == "ddp" else 1
    return ParallelDims(config.parallel, replicate, data_ranks // replicate, "as configured", cp)


def _check_cp(config: TrainingConfig, world_size: int, local_world_size: int) -> None:
    """Check that groups of `cp` ranks fill each node. Errors: ConfigError with the numbers that can be used."""
    for number, processes in (
        (local_world_size, f"{local_world_size} process(es) of a node"),
        (world_size, f"{world_size} processes"),
    ):
        if number % config.cp:
            common = math.gcd(world_size, local_world_size, config.context_len, config.num_heads)
            raise ConfigError(
                f"cp: {config.cp} does not divide the {processes}; possible: cp {format_list(divisors(common))}, or a "
                f"multiple of {config.cp} processes on each node"
            )


def _gains_from_shards(config: TrainingConfig) -> bool:
    """Return whether GPUs that share a replica compute a step faster than GPUs with a replica each.

    Each GPU then updates only its shard, and sends as many bytes as with DDP. For a small model the update takes less
    time than FSDP's work on the CPU. With reproducible = true, shards are summed in every micro-step, which costs more.
    """
    return config.model.approximate_parameter_count >= MIN_SHARDED_PARAMETERS and not config.reproducible


def _choose_mode(world_size: int, local_world_size: int, cp: int, fits: bool, prefers_shards: bool) -> ParallelDims:
    """Choose the mesh for `parallel = auto`.

    * DDP if weights, gradients and optimizer state fit on one device. But if `prefers_shards` is true and a node has
      several devices: HSDP with one replica on each node, or FSDP on a single node.
    * Otherwise HSDP with one replica on each node, if there are several nodes with several ranks each.
    * Otherwise FSDP over all ranks.
    """
    if world_size == 1:
        return ParallelDims("none", 1, 1, "chosen because there is one process")
    data_ranks, ranks_of_node = world_size // cp, local_world_size // cp
    if fits and prefers_shards and local_world_size > 1 and world_size % local_world_size == 0:
        nodes = world_size // local_world_size
        reason = "chosen because the GPUs of a node update a model of this size faster if each holds a shard of it"
        return ParallelDims("hsdp" if nodes > 1 else "fsdp", nodes, ranks_of_node, reason, cp)
    if fits:
        return ParallelDims("ddp", data_ranks, 1, "chosen because the model and its optimizer fit on one device", cp)
    if 1 < local_world_size < world_size:
        nodes = world_size // local_world_size
        reason = "chosen because the model needs the devices of one node"
        return ParallelDims("hsdp", nodes, ranks_of_node, reason, cp)
    return ParallelDims("fsdp", 1, data_ranks, "chosen because the model does not fit on one device", cp)


def _hsdp_dims(config: TrainingConfig, data_ranks: int, data_ranks_of_node: int) -> ParallelDims:
    """Choose the mesh for `parallel = hsdp`.

    If only one of dp_replicate and dp_shard is set, the other is derived from it. If neither is set, each node is a
    replica. A mesh with one shard becomes DDP, and a mesh with one replica becomes FSDP.
    Errors: ConfigError if dp_replicate x dp_shard is not the number of data-parallel ranks.
    """
    shard = config.dp_shard or data_ranks_of_node
    if config.dp_replicate and not config.dp_shard:
        shard = data_ranks // config.dp_replicate
    replicate = config.dp_replicate or data_ranks // max(1, shard)
    if replicate * shard != data_ranks:
        raise ConfigError(_hsdp_problem(config, data_ranks, data_ranks_of_node))
    if shard * config.cp == 1:
        return ParallelDims("ddp", replicate, 1, "hsdp with one shard is ddp")
    if replicate == 1:
        return ParallelDims("fsdp", 1, shard, "hsdp with one replica is fsdp", config.cp)
    return ParallelDims("hsdp", replicate, shard, "as configured", config.cp)


def _hsdp_problem(config: TrainingConfig, data_ranks: int, data_ranks_of_node: int) -> str:
    """Return why hsdp cannot divide these ranks, and what can be used instead."""
    replicate, shard = config.dp_replicate, config.dp_shard
    processes = "processes" if config.cp == 1 else f"groups of {config.cp} processes"
    if replicate and shard:
        problem = f"dp_replicate x dp_shard: {replicate} x {shard} = {replicate * shard}, but there are {data_ranks} "
        problem += processes
    elif replicate or shard:
        name = "dp_replicate" if replicate else "dp_shard"
        problem = f"{name}: {replicate or shard} does not divide the {data_ranks} {processes}"
    else:
        problem = (
            f"parallel: hsdp makes each node a replica, but {data_ranks} {processes} are not {data_ranks_of_node} on "
            "each node, as here"
        )
    pairs = [f"{data_ranks // size} x {size}" for size in range(2, data_ranks) if data_ranks % size == 0]
    if pairs:
        return f"{problem}; possible: dp_replicate x dp_shard {', '.join(pairs)}"
    return f"{problem}; possible: {describe_modes(config, ('ddp', 'fsdp'))}"


def describe_modes(config: TrainingConfig, modes: tuple[str, ...]) -> str:
    """Return those of the modes that the other settings allow, and what must be left out with them."""
    names = [name for name in ("dp_replicate", "dp_shard") if getattr(config, name) is not None]
    allowed = [mode for mode in modes if _is_allowed(config, parallel=mode, dp_replicate=None, dp_shard=None)]
    if not allowed:
        allowed = [modes[0]]
        names += [name for name in SETTINGS_OF_SOME_MODES if getattr(config, name) is not None]
    return f"parallel = {' or '.join(allowed)}" + (f" without {' and '.join(names)}" if names else "")


def _is_allowed(config: TrainingConfig, **changes: Any) -> bool:
    """Return whether the configuration is valid with these changes."""
    try:
        replace(config, **changes)
    except ConfigError:
        return False
    return True
