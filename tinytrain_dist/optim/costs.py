"""Say what an update costs: the operations of Newton-Schulz by rank, and the memory traffic of each optimizer.

Must not know torch: `tinytrain plan` uses these numbers for GPUs that this machine does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinytrain_dist.config.parameter_groups import named_shapes, resolve_groups
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.exchange_plan import ExchangePlan

# Bytes read and written for each weight, all float32. AdamW is one kernel. Muon has several: for the momentum 44, to
# apply the result 38. What only the owner of a matrix does is not included.
UPDATE_BYTES = {"adamw": 28, "muon": 82}


def newton_schulz_flops(rows: int, columns: int, steps: int) -> float:
    """Return the operations to orthogonalize a matrix: in each step, two products with it and a square of k x k."""
    k, n = sorted((rows, columns))
    return steps * (4.0 * k * k * n + 2.0 * k**3)


def newton_schulz_plan(
    shapes: Sequence[tuple[int, int]], steps: Sequence[int], replicas: int, shards: int
) -> ExchangePlan:
    """Return which rank orthogonalizes which matrix, for a balanced number of operations. steps: of each matrix."""
    costs = tuple(newton_schulz_flops(*shape, count) for shape, count in zip(shapes, steps, strict=True))
    return ExchangePlan(tuple(shapes), costs, replicas, shards)


@dataclass(frozen=True)
class UpdateWork:
    """What the update of a run takes.

    * `bytes`: of memory that updating all weights reads and writes, without the gradient norm and Newton-Schulz.
    * `plan`: of the matrices that are orthogonalized; without any if no group has Muon.
    """

    bytes: float
    plan: ExchangePlan

    def owned_flops(self) -> list[float]:
        """Return the operations of Newton-Schulz of each rank."""
        flops = [0.0] * (self.plan.replicas * self.plan.shards)
        for matrices in self.plan.rounds():
            for rank, index in matrices.items():
                flops[rank] += self.plan.costs[index]
        return flops


def update_work(config: TrainingConfig, replicas: int, shards: int) -> UpdateWork:
    """Return what the update of this configuration takes on a mesh."""
    groups = resolve_groups(named_shapes(config.model), config)
    shapes = [
        (parameter.shape[0], parameter.shape[1])
        for group in groups
        if group.optimizer == "muon"
        for parameter in group.parameters
    ]
    plan = newton_schulz_plan(shapes, [config.muon_steps] * len(shapes), replicas, shards)
    return UpdateWork(sum(group.num_weights * UPDATE_BYTES[group.optimizer] for group in groups), plan)
