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
    """Return the largest number of ranks, at most `ranks`, on which this configuration can be trained; 0 for none.

    It depends on batch_size, micro_batch_size and the mode, which stay as configured.
    """
    return next((count for count in range(ranks, 0, -1) if _problem(config, count, ranks_per_node) is None), 0)


def fewest_nodes_problems(config: TrainingConfig, nodes: int, ranks_per_node: int, option: str) -> list[str]:
    """Return why a run cannot go on with this smallest number of nodes, as sentences that begin with the option."""
    ranks = nodes * ranks_per_node
    if usable_ranks(config, ranks, ranks_per_node):
        return []
    return [
        f"{option}: {nodes} node(s) with {ranks_per_node} process(es) each, the fewest, cannot train this run: "
        f"{_problem(config, ranks, ranks_per_node)}"
    ]


def _problem(config: TrainingConfig, ranks: int, ranks_per_node: int) -> str | None:
    try:
        BatchPlan.make(config, choose_parallel_dims(config, ranks, min(ranks, ranks_per_node)))
    except ConfigError as error:
        return "; ".join(error.problems)
    return None


def describe_spares(config: TrainingConfig, ranks: int, ranks_per_node: int) -> str:
    """Return a sentence about the ranks that wait as spares; "" if all are used."""
    used = usable_ranks(config, ranks, ranks_per_node)
    if used == ranks or used == 0:
        return ""
    return (
        f"{ranks - used} of {ranks} ranks wait as spares, because batch_size {config.batch_size} and the mode "
        f"(parallel = {config.parallel}) can use at most {used} of them"
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
