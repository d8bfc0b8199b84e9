"""Cut the global batch of a step: which micro-batches and sample slots each rank computes.

Must not know torch or which rank it runs on: every rank, and a login node, computes the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.text import format_list


def _is_power_of_two(number: float) -> bool:
    return number == int(number) and int(number) & (int(number) - 1) == 0


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is cut: batch_size = micro_batch_size x ranks x accumulation_steps.

    Sample slot s (0 .. batch_size - 1) belongs to micro-batch s // micro_batch_size, which is one forward pass.
    """

    batch_size: int
    micro_batch_size: int
    context_len: int
    replicate: int
    shard: int

    @classmethod
    def make(cls, config: TrainingConfig, dims: ParallelDims) -> BatchPlan:
        """Return the plan of a configuration on a mesh. Errors: ConfigError listing the sizes that divide."""
        ranks = dims.replicate * dims.shard
        micro = config.fixed_micro_batch_size or max(1, config.batch_size // ranks)
        leaves = config.batch_size // micro
        if config.batch_size % (micro * ranks):
            sizes = [n for n in range(1, leaves + 1) if leaves % n == 0]
            micros = [m for m in range(1, config.batch_size // ranks + 1) if config.batch_size % (m * ranks) == 0]
            raise ConfigError(
                f"batch_size: {config.batch_size} is not a multiple of micro_batch_size {micro} x {ranks} ranks = "
                f"{micro * ranks}; possible: ranks {format_list(sizes)}"
                + (f"; or micro_batch_size {format_list(micros)}" if micros else "")
            )
        if config.reproducible and leaves & (leaves - 1):  # then the ranks, a divisor, are a power of two as well
            possible = [m for m in range(1, config.batch_size + 1) if _is_power_of_two(config.batch_size / m)]
            raise ConfigError(
                f"reproducible: batch_size {config.batch_size} / micro_batch_size {micro} = {leaves} is not a power of "
                "two, so no tree of sums fits every number of ranks; possible: micro_batch_size "
                f"{format_list(possible)}"
            )
        return cls(config.batch_size, micro, config.context_len, dims.replicate, dims.shard)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self.replicate * self.shard

    @property
    def num_micro_batches(self) -> int:
        """Forward passes that make up one step, over all ranks."""
        return self.batch_size // self.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of one rank in one step."""
        return self.num_micro_batches // self.ranks

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one step over all ranks."""
        return self.batch_size * self.context_len

    def micro_batch_index(self, replica: int, shard: int, micro_step: int) -> int:
        """Return the micro-batch of the global batch that a rank computes in its micro_step.

        One formula serves every mode: with it the ranks of a replica hold neighbouring micro-batches in each micro-step
        (FSDP reduces there), and a replica holds a contiguous run of them (DDP reduces once at the end).
        """
        return (replica * self.accumulation_steps + micro_step) * self.shard + shard

    def slots(self, micro_batch: int) -> range:
        """Return the sample slots of one micro-batch."""
        return range(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size)

    def __str__(self) -> str:
        return (
            f"batch_size {self.batch_size} = micro_batch_size {self.micro_batch_size} x {self.ranks} ranks x "
            f"{self.accumulation_steps} accumulation steps; {self.tokens_per_step:,} tokens per step"
        )


def possible_micro_batch_sizes(config: TrainingConfig, dims: ParallelDims) -> list[int]:
    """Every micro_batch_size that divides on this mesh, smallest first. Errors: ConfigError if there is none."""
    whole = BatchPlan.make(replace(config, micro_batch_size=None), dims).micro_batch_size
    return [size for size in range(1, whole + 1) if whole % size == 0]
