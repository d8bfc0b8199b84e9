"""Decide how many of the ranks that are there a configuration can use. The others wait as spares.

Must not know torch: agents ask before ranks are started, and ranks before they join.
"""

from __future__ import annotations

import os

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError


def usable_ranks(config: TrainingConfig, ranks: int, ranks_per_node: int) -> int:
    """Return the number of ranks, at most `ranks`, on which a step is the shortest; 0 if there is none.

    It depends on batch_size, micro_batch_size and the mode, which stay as configured. Of several numbers with the same
    largest share of a rank, it is the smallest one with whole replicas, because more of them would only wait; with
    shards it is the largest one, because then each rank needs the least memory.
    """
    tried = {count: _plan_or_problem(config, count, ranks_per_node) for count in range(1, ranks + 1)}
    plans = {count: plan for count, plan in tried.items() if isinstance(plan, BatchPlan)}

    def cost(count: int) -> tuple[int, int]:
        plan = plans[count]
        return plan.accumulation_steps * plan.micro_batch_size, count if plan.shard == 1 else -count

    return min(plans, key=cost, default=0)


def fewest_nodes_problems(config: TrainingConfig, nodes: int, ranks_per_node: int, option: str) -> list[str]:
    """Return why a run cannot go on with this smallest number of nodes, as sentences that begin with the option."""
    ranks = nodes * ranks_per_node
    if usable_ranks(config, ranks, ranks_per_node):
        return []
    return [
        f"{option}: {nodes} node(s) with {ranks_per_node} process(es) each, the fewest, cannot train this run: "
        f"{_plan_or_problem(config, ranks, ranks_per_node)}"
    ]


def _plan_or_problem(config: TrainingConfig, ranks: int, ranks_per_node: int) -> BatchPlan | str:
    """Return the plan of a batch on so many ranks, or why there is none."""
    try:
        return BatchPlan.make(config, choose_parallel_dims(config, ranks, min(ranks, ranks_per_node)))
    except ConfigError as error:
        return "; ".join(error.problems)


def describe_spares(config: TrainingConfig, ranks: int, ranks_per_node: int) -> str:
    """Return a sentence about the ranks that wait as spares; "" if all are used."""
    used = usable_ranks(config, ranks, ranks_per_node)
    if used == ranks or used == 0:
        return ""
    return (
        f"{ranks - used} of {ranks} ranks wait as spares, because more than {used} would not make a step of batch_size "
        f"{config.batch_size} shorter (parallel = {config.parallel})"
    )


def leave_spares_out(config: TrainingConfig) -> str:
    """Make the world of this launch one of usable ranks; return why this rank is a spare, "" if it is not.

    Changes the variables of the launcher. Every rank calls this before it joins the others. Without any usable number
    of ranks nothing is changed, and the run says what is wrong.
    """
    ranks, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    used = usable_ranks(config, ranks, per_node) or ranks
    if int(os.environ["RANK"]) >= used:
        return describe_spares(config, ranks, per_node)
    os.environ["WORLD_SIZE"] = str(used)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(used, per_node))
    return ""
