"""Plan which rank computes which whole matrix, and what ranks send each other for it: a function of shapes and mesh.

Every matrix has one owner among all ranks. The work is divided into rounds, in each of which a rank owns at most one
matrix. Must not know torch, or what is computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from tinytrain_dist.distributed.parallel_dims import shard_rows

ROUNDS_AHEAD = 2  # whose rows are collected early; a GPU collects those of the next round while it computes

Round = dict[int, int]  # index of a matrix by rank of its owner


def owner_rounds(costs: Sequence[float], ranks: int) -> list[Round]:
    """Return the rounds in which matrices of these costs are computed. The sums of the ranks' costs are balanced.

    The most expensive matrix that is left goes to the rank with the least work; ties go to the lower index and rank.
    Every rank computes its matrices in this order, so the matrices of a round cost about the same.
    """
    work = [(0.0, rank) for rank in range(ranks)]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        cost, rank = heapq.heappop(work)
        owned[rank].append(index)
        heapq.heappush(work, (cost + costs[index], rank))
    longest = max(map(len, owned))
    return [{rank: own[place] for rank, own in enumerate(owned) if place < len(own)} for place in range(longest)]


@dataclass(frozen=True)
class ExchangePlan:
    """The owners of matrices with these shapes on a mesh of replicas and shards, and the sizes of all messages.

    A rank holds the rows of its shard. An owner needs all rows, and gets them from the ranks of its replica. Sizes are
    numbers of elements.
    """

    shapes: tuple[tuple[int, int], ...]
    costs: tuple[float, ...]
    replicas: int = 1
    shards: int = 1

    def rounds(self) -> list[Round]:
        """Return the matrices of each round, by rank of the owner. Rank r is shard r % shards of r // shards."""
        return owner_rounds(self.costs, self.replicas * self.shards) if self.shapes else []

    def rows(self, index: int, shard: int) -> int:
        """Return how many rows of a matrix a shard has."""
        start, stop = shard_rows(self.shapes[index][0], self.shards, shard)
        return stop - start

    def size(self, index: int | None, shard: int) -> int:
        """Return the size of a shard's rows of a matrix; 0 for no matrix."""
        return 0 if index is None else self.rows(index, shard) * self.shapes[index][1]

    def owned(self, matrices: Round, replica: int) -> list[int | None]:
        """Return the matrix of each rank of a replica in a round, by shard."""
        return [matrices.get(replica * self.shards + shard) for shard in range(self.shards)]

    def collect_sizes(self, matrices: Round, replica: int, shard: int) -> tuple[list[int], list[int]]:
        """Return what a rank sends to and receives from each rank of its replica so that owners have whole matrices.

        The results go the opposite way.
        """
        owned = self.owned(matrices, replica)
        sent = [self.size(index, shard) for index in owned]
        return sent, [self.size(owned[shard], other) for other in range(self.shards)]

    def share_size(self, matrices: Round, replica: int, shard: int) -> int:
        """Return the size of a shard's rows of all matrices that a replica owns in a round."""
        return sum(self.size(index, shard) for index in self.owned(matrices, replica))
