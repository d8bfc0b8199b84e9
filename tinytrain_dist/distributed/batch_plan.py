"""Divide the global batch of a step: decide which micro-batches and sample slots each rank computes.

Must not know torch or which rank it runs on: every rank, and a login node, computes the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.text import format_list


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is divided: batch_size = micro_batch_size x ranks x accumulation_steps.

    * `batch_size`: sequences in one step over all ranks. Each has a sample slot, 0 .. batch_size - 1.
    * `micro_batch_size`: sequences in one forward pass. Slot s belongs to micro-batch s // micro_batch_size.
    * `context_len`: tokens in one sequence.
    * `replicate`, `shard`: the sizes of the mesh axes, as in ParallelDims.
    """

    batch_size: int
    micro_batch_size: int
    context_len: int
    replicate: int
    shard: int

    @classmethod
    def make(cls, config: TrainingConfig, dims: ParallelDims) -> BatchPlan:
        """Return the plan for a configuration on a mesh.

        Errors: ConfigError if the batch cannot be divided evenly. It lists the sizes that can be used.
        """
        ranks = dims.replicate * dims.shard
        micro_batch_size = config.fixed_micro_batch_size or max(1, config.batch_size // ranks)
        _check_divides(config, micro_batch_size, ranks)
        if config.reproducible:
            _check_power_of_two(config, micro_batch_size)
        return cls(config.batch_size, micro_batch_size, config.context_len, dims.replicate, dims.shard)

    @property
    def ranks(self) -> int:
        """Return the number of data-parallel ranks."""
        return self.replicate * self.shard

    @property
    def num_micro_batches(self) -> int:
        """Return the number of forward passes that make up one step, over all ranks."""
        return self.batch_size // self.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Return the number of forward passes of one rank in one step."""
        return self.num_micro_batches // self.ranks

    @property
    def tokens_per_step(self) -> int:
        """Return the number of target tokens in one step, over all ranks."""
        return self.batch_size * self.context_len

    def micro_batch_index(self, replica: int, shard: int, micro_step: int) -> int:
        """Return which micro-batch of the global batch a rank computes, 0 .. num_micro_batches - 1.

        `replica`, `shard`: the rank's coordinates on the mesh. `micro_step`: 0 .. accumulation_steps - 1. The formula
        is the same in every mode:

        * In a micro-step, the ranks of a replica compute consecutive micro-batches. FSDP sums their gradients.
        * Over a whole step, a replica computes a contiguous range of micro-batches. DDP sums the replicas' gradients
          once, at the end.
        """
        return (replica * self.accumulation_steps + micro_step) * self.shard + shard

    def slots(self, micro_batch: int) -> range:
        """Return the sample slots of the micro-batch with this index in the global batch."""
        return range(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size)

    def __str__(self) -> str:
        return (
            f"batch_size {self.batch_size} = micro_batch_size {self.micro_batch_size} x {self.ranks} ranks x "
            f"{self.accumulation_steps} accumulation steps; {self.tokens_per_step:,} tokens per step"
        )


def possible_micro_batch_sizes(config: TrainingConfig, dims: ParallelDims) -> list[int]:
    """Return every micro_batch_size that divides the batch evenly on this mesh, smallest first.

    Errors: ConfigError if there is none.
    """
    # without a micro_batch_size, a rank computes its whole part of the batch in one pass
    largest = BatchPlan.make(replace(config, micro_batch_size=None), dims).micro_batch_size
    return [size for size in range(1, largest + 1) if largest % size == 0]


def _check_divides(config: TrainingConfig, micro_batch_size: int, ranks: int) -> None:
    """Check that every rank gets the same whole number of micro-batches. Errors: ConfigError."""
    sequences_per_pass = micro_batch_size * ranks  # over all ranks
    if config.batch_size % sequences_per_pass == 0:
        return
    num_micro_batches = config.batch_size // micro_batch_size
    rank_counts = [count for count in range(1, num_micro_batches + 1) if num_micro_batches % count == 0]
    most_per_rank = config.batch_size // ranks
    sizes = [size for size in range(1, most_per_rank + 1) if config.batch_size % (size * ranks) == 0]
    raise ConfigError(
        f"batch_size: {config.batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {ranks} ranks = "
        f"{sequences_per_pass}; possible: ranks {format_list(rank_counts)}"
        + (f"; or micro_batch_size {format_list(sizes)}" if sizes else "")
    )


def _check_power_of_two(config: TrainingConfig, micro_batch_size: int) -> None:
    """Check that the number of micro-batches is a power of two. Errors: ConfigError.

    The number of ranks divides the number of micro-batches, so it is then a power of two as well.
    """
    num_micro_batches = config.batch_size // micro_batch_size
    if _is_power_of_two(num_micro_batches):
        return
    sizes = [size for size in range(1, config.batch_size + 1) if _is_power_of_two(config.batch_size / size)]
    raise ConfigError(
        f"reproducible: batch_size {config.batch_size} / micro_batch_size {micro_batch_size} = {num_micro_batches} is "
        "not a power of two, which the binary tree of gradient sums requires; possible: micro_batch_size "
        f"{format_list(sizes)}"
    )


def _is_power_of_two(number: float) -> bool:
    return number == int(number) and int(number) & (int(number) - 1) == 0
