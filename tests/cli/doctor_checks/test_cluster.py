"""How ranks must lie on hosts, and what is compared between them."""

from __future__ import annotations

import pytest
import torch

from tinytrain_dist.cli.doctor_checks import cluster
from tinytrain_dist.distributed.context import DistributedContext


@pytest.mark.parametrize(
    ("hosts", "says"),
    [
        (["a", "a", "b", "b"], ""),
        (["a", "a", "b"], "different numbers of processes (2 on a, 1 on b)"),
        (["a", "b", "a", "b"], "--distribution=block"),
    ],
)
def test_shape_of_the_world(hosts: list[str], says: str) -> None:
    context = DistributedContext(0, 0, len(hosts), 2, "a", torch.device("cpu"))
    assert says in " ".join(cluster.rank_placement_problems(hosts, context))
    assert bool(says) == bool(cluster.rank_placement_problems(hosts, context))
