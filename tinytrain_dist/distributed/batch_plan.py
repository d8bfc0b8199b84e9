"""Divide the global batch of a step: decide which micro-batches and sample slots each rank computes.

Must not know torch or which rank it runs on: every rank, and a login node, computes the same plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tinytrain_dist.config.batch_phases import BatchSizes, division_problem
from tinytrain_dist.config.batch_sizes import (
    divides,
    divisors,
    even_micro_batch_sizes,
    micro_batch_sizes,
    nearest_batch_sizes,
)
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.parallel_dims import ParallelDims, choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.text import format_choices

MAX_RANKS_OFFERED = 4  # numbers of ranks in a message


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is divided: into micro-batches, and these among the ranks.

    * `batch_size`: sequences in one step over all ranks. Each has a sample slot, 0 .. batch_size - 1.
    * `micro_batch_size`: sequences in one forward pass. Slot s belongs to micro-batch s // micro_batch_size.
    * `context_len`: tokens in one sequence.
    * `replicate`, `shard`: the sizes of the mesh axes, as in ParallelDims. Their product is the number of data-parallel
      ranks.
    * `cp`: number of ranks that are one data-parallel rank. They compute the same micro-batches. Each of them has a
      slice of the columns, in the order of ranks.

    The number of ranks need not divide the number of micro-batches. The shares are then uneven:

    * Over a whole step, a replica computes a contiguous range of micro-batches. The ranges differ by one micro-batch at
      most. DDP sums the replicas' gradients once, at the end.
    * In a micro-step, the ranks of a replica compute consecutive micro-batches. FSDP sums their gradients. In the last
      micro-step of a replica, the last ranks may have no micro-batch left.
    """

    batch_size: int
    micro_batch_size: int
    context_len: int
    replicate: int
    shard: int
    cp: int = 1

    @classmethod
    def make(cls, config: TrainingConfig, dims: ParallelDims) -> BatchPlan:
        """Return the plan of a batch of `batch_size` for a configuration on a mesh.

        Without a micro_batch_size, a rank computes its part of a batch in one pass, or that of the smallest batch if
        there is a warm-up: all steps have the same micro_batch_size, so that compiled code and memory stay the same.
        If the ranks do not divide the batch, it is the largest size with which the shares are nearly even.
        Errors: ConfigError if a batch cannot be divided. It lists the sizes that can be used.
        """
        ranks = dims.replicate * dims.shard
        given = config.fixed_micro_batch_size
        if not divides(config.batch_size, given or 1, ranks, config.reproducible):
            raise ConfigError(_division_problem(config, dims))
        divided = (division_problem(phase, given, ranks, config.reproducible) for phase in config.batch_sizes.phases)
        if problems := list(filter(None, divided)):
            raise ConfigError(problems)
        micro_batch_size = given or _micro_batch_sizes(config, ranks)[-1]
        return cls(config.batch_size, micro_batch_size, config.context_len, dims.replicate, dims.shard, dims.cp)

    @property
    def ranks(self) -> int:
        """Return the number of data-parallel ranks."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        """Return the number of all ranks."""
        return self.ranks * self.cp

    @property
    def num_micro_batches(self) -> int:
        """Return the number of forward passes that make up one step, over all ranks."""
        return self.batch_size // self.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Return the number of forward passes in one step of a rank with the largest share."""
        return -(-self.num_micro_batches // self.ranks)

    @property
    def tokens_per_step(self) -> int:
        """Return the number of target tokens in one step, over all ranks."""
        return self.batch_size * self.context_len

    def micro_batches_of(self, replica: int) -> range:
        """Return the micro-batches of the global batch that the ranks of a replica compute."""
        count = self.num_micro_batches
        return range(replica * count // self.replicate, (replica + 1) * count // self.replicate)

    def micro_steps_of(self, replica: int) -> range:
        """Return the micro-steps of a replica; in each, every rank of it runs one forward pass."""
        return range(-(-len(self.micro_batches_of(replica)) // self.shard))

    def relative_share(self, replica: int) -> float:
        """Return the micro-steps of a replica, as a share of those of the replica that has most of them."""
        return len(self.micro_steps_of(replica)) / self.accumulation_steps

    def micro_batch_index(self, replica: int, shard: int, micro_step: int) -> int | None:
        """Return which micro-batch of the global batch a rank computes, 0 .. num_micro_batches - 1.

        `replica`, `shard`: the rank's coordinates on the mesh. `micro_step`: one of `micro_steps_of`. Returns None if
        the rank has no micro-batch left in the last micro-step of its replica.
        """
        own = self.micro_batches_of(replica)
        position = micro_step * self.shard + shard
        return own[position] if position < len(own) else None

    def slots(self, micro_batch: int) -> range:
        """Return the sample slots of the micro-batch with this index in the global batch."""
        return range(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size)

    def share(self, replica: int, shard: int, cp_index: int = 0) -> BatchShare:
        """Return what the rank at these coordinates on the mesh computes of the batch."""
        return _share(self, replica, shard, cp_index)

    @property
    def unused_share(self) -> float:
        """Return the share of the ranks' time in which ranks with a smaller share wait for the others."""
        return 1 - self.num_micro_batches / (self.ranks * self.accumulation_steps)

    def __str__(self) -> str:
        tokens = f"{self.tokens_per_step:,} tokens per step"
        if self.cp > 1:
            tokens += f"; each sequence on {self.cp} ranks with {self.context_len // self.cp:,} tokens each"
        if not self.unused_share:
            ranks = "ranks" if self.cp == 1 else "data-parallel ranks"
            return (
                f"batch_size {self.batch_size} = micro_batch_size {self.micro_batch_size} x {self.ranks} {ranks} x "
                f"{self.accumulation_steps} accumulation steps; {tokens}"
            )
        most = self.accumulation_steps
        count = sum(len(self.share(*divmod(rank, self.shard)).micro_batches) == most for rank in range(self.ranks))
        return (
            f"batch_size {self.batch_size} = micro_batch_size {self.micro_batch_size} x {self.num_micro_batches} "
            f"micro-batches; {tokens}\nuneven shares: {count} of {self.ranks} ranks compute {most} micro-batches, the "
            f"others {most - 1}, so {self.unused_share:.0%} of the ranks' time is unused"
        )


@dataclass(frozen=True)
class BatchShare:
    """What one rank computes of one batch.

    * `replica`, `cp_index`: the rank's coordinates on the axes dp_replicate and cp.
    * `micro_steps`: those of its replica.
    * `micro_batches`: the index in the global batch of the micro-batch of each micro-step. There may be none for the
      last micro-step.
    * `slots`: the sample slots in these micro-batches.
    """

    plan: BatchPlan
    replica: int
    micro_steps: Sequence[int]
    micro_batches: tuple[int, ...]
    slots: tuple[int, ...]
    cp_index: int = 0

    @property
    def columns(self) -> slice:
        """Return the columns of its windows that this rank computes: all of them, or those of its place in `cp`."""
        width = self.plan.context_len // self.plan.cp
        return slice(self.cp_index * width, (self.cp_index + 1) * width)

    def is_last(self, micro_step: int) -> bool:
        """Return whether this is the last micro-step of this rank in an optimizer step."""
        return micro_step == self.plan.micro_steps_of(self.replica)[-1]

    def is_repeated(self, micro_step: int) -> bool:
        """Return whether the rank has no micro-batch left, and repeats one without effect.

        It does so because every rank of a replica must take part in FSDP's collectives.
        """
        return micro_step >= len(self.micro_batches)

    def replica_part(self, micro_step: int) -> range:
        """Return the micro-batches that all ranks of the replica compute in a micro-step, in the order of ranks."""
        start = micro_step * self.plan.shard
        return self.plan.micro_batches_of(self.replica)[start : start + self.plan.shard]


@lru_cache  # the shares of a rank in the phases of a run, which are used in every step
def _share(plan: BatchPlan, replica: int, shard: int, cp_index: int) -> BatchShare:
    micro_batches = tuple(plan.micro_batches_of(replica)[shard :: plan.shard])
    slots = tuple(slot for index in micro_batches for slot in plan.slots(index))
    return BatchShare(plan, replica, plan.micro_steps_of(replica), micro_batches, slots, cp_index)


@dataclass(frozen=True)
class BatchPlans:
    """The plan of every step: `whole` with the batch size of the step. A pure function of the step."""

    whole: BatchPlan  # of a batch of `batch_size`
    sizes: BatchSizes

    @classmethod
    def make(cls, config: TrainingConfig, dims: ParallelDims) -> BatchPlans:
        """Return the plans for a configuration on a mesh. Errors: as for BatchPlan.make."""
        return cls(BatchPlan.make(config, dims), config.batch_sizes)

    def at(self, step: int) -> BatchPlan:
        """Return the plan of the step after `step` completed steps."""
        return replace(self.whole, batch_size=self.sizes.at(step))

    def tokens_before(self, step: int) -> int:
        """Return the number of target tokens in the first `step` steps, over all ranks."""
        return self.sizes.before(step) * self.whole.context_len

    def __str__(self) -> str:
        if not self.sizes.varies:
            return str(self.whole)
        unused = [self.at(phase.from_step).unused_share for phase in self.sizes.phases]
        shares = f"; unused: {', '.join(f'{share:.0%}' for share in unused)} of the ranks' time" if any(unused) else ""
        return f"{self.whole}\nbatch_size_warmup: {self.sizes}{shares}"


def possible_micro_batch_sizes(config: TrainingConfig, dims: ParallelDims) -> list[int]:
    """Return every micro_batch_size with which the shares of the ranks are (nearly) even, smallest first.

    Errors: ConfigError if there is none.
    """
    BatchPlan.make(replace(config, micro_batch_size=None), dims)
    return _micro_batch_sizes(config, dims.replicate * dims.shard)


def _micro_batch_sizes(config: TrainingConfig, ranks: int) -> list[int]:
    """Return the sizes for `possible_micro_batch_sizes`, of a batch that can be divided."""
    smallest = min(phase.batch_size for phase in config.batch_sizes.phases)
    common = config.batch_sizes.common_divisor
    sizes = [size for size in divisors(common) if divides(smallest, size, ranks)]
    return even_micro_batch_sizes(sizes, common if common % ranks == 0 else config.batch_size, ranks)


def _division_problem(config: TrainingConfig, dims: ParallelDims) -> str:
    """Return why the batch cannot be divided on this mesh, and what can be used instead."""
    batch_size, ranks = config.batch_size, dims.replicate * dims.shard
    given = config.fixed_micro_batch_size
    count = batch_size // (given or 1)
    shared = "" if dims.cp == 1 else f" (cp = {dims.cp} processes are one data-parallel rank)"
    if given is None:
        problem = f"batch_size: {batch_size} is fewer than {ranks} ranks, and each rank needs a sequence{shared}"
    elif count < ranks:
        problem = (
            f"batch_size: {batch_size} / micro_batch_size {given} = {count} micro-batches are fewer than {ranks} "
            f"ranks, and each rank needs one{shared}"
        )
    else:
        problem = (
            f"reproducible: batch_size {batch_size} / micro_batch_size {given} = {count} is not a power of two, which "
            "the binary tree of gradient sums requires"
        )
    return f"{problem}; possible: {_possible_changes(config, ranks)}"


def _possible_changes(config: TrainingConfig, ranks: int) -> str:
    """Return the changes of one setting with which the batch can be divided. There is always a batch_size."""
    batch_size, given, exact = config.batch_size, config.fixed_micro_batch_size, config.reproducible
    fewer = (count for count in range(min(ranks, batch_size // (given or 1)), 0, -1))
    allowed = (n for n in fewer if divides(batch_size, given or 1, n, exact) and _allows_ranks(config, n))
    choices = {
        "ranks": sorted(count * config.cp for count in itertools.islice(allowed, MAX_RANKS_OFFERED)),
        "micro_batch_size": micro_batch_sizes(batch_size, ranks, exact) if given else [],
        "batch_size": nearest_batch_sizes(batch_size, given or 1, ranks, exact),
    }
    return format_choices(choices)


def _allows_ranks(config: TrainingConfig, ranks: int) -> bool:
    """Return whether the configured mode can be used with this number of data-parallel ranks, on one node."""
    try:
        choose_parallel_dims(config, ranks * config.cp, ranks * config.cp)
    except ConfigError:
        return False
    return True
