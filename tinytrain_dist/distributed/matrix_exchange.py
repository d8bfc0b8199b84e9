"""Let one rank compute each whole matrix from the rows of all ranks, and send every rank its rows of the result.

Messages and computation overlap: while a matrix is computed, the rows of the next ones are collected, and the results
of the last ones are sent. Over all rounds, a rank holds only a few matrices at a time. Must not know what is computed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.exchange_plan import ROUNDS_AHEAD, ExchangePlan, Round

SHARED_AT_ONCE = 8  # results of other replicas on their way to a rank

RowsOf = Callable[[int], Tensor]  # this rank's rows of a matrix
Compute = Callable[[int, Tensor], Tensor]  # a matrix and its index -> a matrix of the same shape
UseRows = Callable[[int, Tensor], None]  # takes this rank's rows of a result


@dataclass
class _InFlight:
    """A round in progress: this rank's buffers, and the handle of the collective that fills the last one."""

    matrices: Round
    work: Any = None
    whole: Tensor | None = None  # the matrix that this rank owns
    rows: Tensor | None = None  # flat: this rank's rows of the results that its replica has computed
    alive: list[Tensor | None] = field(default_factory=list)  # buffers that a collective still reads
    sharing: deque[tuple[int, Tensor, Any]] = field(default_factory=deque)  # replica, rows, handle
    unshared: Iterator[int] = field(default_factory=lambda: iter(()))  # replicas whose results are not yet requested

    def wait(self) -> None:
        """Wait for the collective; on a GPU, only what is enqueued afterwards waits."""
        if self.work is not None:
            self.work.wait()
        self.work = None
        self.alive.clear()


class MatrixExchange:
    """The messages of an `ExchangePlan` on the ranks of a context."""

    def __init__(self, plan: ExchangePlan, context: DistributedContext | None, dtype: torch.dtype) -> None:
        """`context`: this rank on the plan's mesh (None: it is alone). dtype: of all rows and results."""
        self.plan = plan
        self.context = context
        self.dtype = dtype
        self.replica = context.replica if context else 0
        self.shard = context.shard if context else 0
        self.rounds = plan.rounds()

    def run(self, rows_of: RowsOf, compute: Compute, use: UseRows, among: Collection[int]) -> None:
        """Compute the matrices `among` all of the plan, and use this rank's rows of each result.

        A collective: every rank passes the same `among`. `rows_of` is called on the ranks whose rows an owner needs,
        `compute` on the owner, `use` on every rank that has rows of the matrix. Does not wait for a GPU.
        """
        rounds = [{rank: index for rank, index in each.items() if index in among} for each in self.rounds]
        upcoming = (self._collect(each, rows_of) for each in rounds)
        collected = deque(itertools.islice(upcoming, ROUNDS_AHEAD))
        returning: deque[_InFlight] = deque()
        sharing: deque[_InFlight] = deque()
        while collected or returning or sharing:
            # A round is shared while the next one is computed, so what waits for it comes after that computation.
            is_computing = bool(collected)
            if is_computing:
                returning.append(self._compute(collected.popleft(), compute))
                collected.extend(itertools.islice(upcoming, 1))
            if sharing:
                self._use(sharing.popleft(), use)
            if returning and (self.plan.shards == 1 or len(returning) > is_computing):
                sharing.append(self._share(returning.popleft()))

    def _owned(self, matrices: Round) -> int | None:
        return matrices.get(self.replica * self.plan.shards + self.shard)

    def _empty(self, size: int) -> Tensor:
        assert self.context is not None, "a rank that is alone receives nothing"
        return torch.empty(size, dtype=self.dtype, device=self.context.device)

    def _collect(self, matrices: Round, rows_of: RowsOf) -> _InFlight:
        """Start to send this rank's rows of all matrices that its replica owns in a round to their owners."""
        flight = _InFlight(matrices)
        own = self._owned(matrices)
        if self.plan.shards == 1:
            flight.whole = None if own is None else rows_of(own).to(self.dtype)
            return flight
        needed = [index for index in self.plan.owned(matrices, self.replica) if index is not None]
        if needed:
            sent, received = self.plan.collect_sizes(matrices, self.replica, self.shard)
            rows = torch.cat([rows_of(index).reshape(-1).to(self.dtype) for index in needed])
            whole = self._empty(sum(received))  # the rows of all shards, in order: the whole matrix
            flight.alive = [rows]
            flight.work = self._all_to_all(whole, rows, received, sent)
            flight.whole = whole if own is None else whole.view(self.plan.shapes[own])
        return flight

    def _compute(self, flight: _InFlight, compute: Compute) -> _InFlight:
        """Compute this rank's matrix of a round, and start to return the rows of the result."""
        flight.wait()
        own = self._owned(flight.matrices)
        result = flight.whole
        if own is not None and flight.whole is not None:
            result = compute(own, flight.whole).reshape(-1).contiguous()
        flight.whole = None
        if self.plan.shards == 1:
            flight.rows = result
        elif result is not None:
            sent, received = self.plan.collect_sizes(flight.matrices, self.replica, self.shard)
            flight.rows = self._empty(sum(sent))
            flight.alive = [result]
            flight.work = self._all_to_all(flight.rows, result, sent, received)
        return flight

    def _share(self, flight: _InFlight) -> _InFlight:
        """Start to send this rank's rows to the ranks of other replicas that have the same rows."""
        flight.wait()
        flight.unshared = iter(range(self.plan.replicas))
        for replica in itertools.islice(flight.unshared, SHARED_AT_ONCE):
            self._start_sharing(flight, replica)
        return flight

    def _start_sharing(self, flight: _InFlight, replica: int) -> None:
        size = self.plan.share_size(flight.matrices, replica, self.shard)
        if not size:
            return
        rows = flight.rows if replica == self.replica else self._empty(size)
        assert rows is not None, "computed by this replica"
        work = None
        if self.plan.replicas > 1:
            assert self.context is not None
            work = collectives.broadcast(rows, replica, self.context.group(REPLICATE), wait=False)
        flight.sharing.append((replica, rows, work))

    def _use(self, flight: _InFlight, use: UseRows) -> None:
        """Use this rank's rows of all results of a round, as they arrive."""
        while flight.sharing:
            replica, rows, work = flight.sharing.popleft()
            if work is not None:
                work.wait()
            start = 0
            for index in self.plan.owned(flight.matrices, replica):
                if index is not None:
                    shape = self.plan.rows(index, self.shard), self.plan.shapes[index][1]
                    size = shape[0] * shape[1]
                    use(index, rows[start : start + size].view(shape))
                    start += size
            for next_replica in itertools.islice(flight.unshared, 1):
                self._start_sharing(flight, next_replica)

    def _all_to_all(self, output: Tensor, input: Tensor, received: list[int], sent: list[int]) -> Any:
        assert self.context is not None
        return collectives.all_to_all(
            output, input, self.context.group(SHARD), wait=False, received_sizes=received, sent_sizes=sent
        )
