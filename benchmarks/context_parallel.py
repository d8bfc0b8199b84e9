"""Compare two ways of context parallelism: heads exchanged by all-to-all, or keys and values gathered by all ranks.

    python benchmarks/context_parallel.py [--contexts 1024 4096] [--cp 2 4] [--heads 8] [--kv-heads 8 2 1] [--rounds 5]
    python benchmarks/context_parallel.py --paper [--heads 32] [--kv-heads 8 32] [--tokens-per-rank 16384]

* all-to-all: what tinytrain_dist does (DeepSpeed Ulysses). A rank has consecutive positions. For attention it gets all
  positions of H / cp heads.
* all-gather: as in Llama 3 (arXiv 2407.21783, section 3.3.2). A rank keeps its queries, and gets all keys and values.
  The sequence is cut into 2 cp chunks, and rank r has chunks r and 2 cp - 1 - r, so that causal masks give all ranks
  equal work. It exists only here.

Without --paper, forward and backward of attention run on real processes (gloo, float32, one thread each), with both
methods by turns on the same inputs. Printed are the medians of whole passes and of the exchange alone, the bytes that a
rank sends, and the size of the queries, keys and values that attention gets. Output and gradients must be those of one
process, otherwise the exit code is 1. More ranks than cores share them: then only the sum of the work is compared.

--paper computes the same for H100s in bf16. For s positions on cp ranks, t = s / cp, H query heads, K key/value heads,
K' = lcm(K, cp), heads of width e, z bytes per element, a rank sends in a layer, in forward and as much in backward:

* all-to-all: (cp - 1) / cp * t * (2 H + 2 K') * e * z. It keeps queries, keys and values for backward: t * (H + 2 K')
  * e * z bytes;
* all-gather: (cp - 1) * t * 2 K * e * z. It keeps (t * H + s * 2 K) * e * z bytes. If it gathers again in backward
  instead, it sends half as much again.

So the all-gather sends less if cp * K < H + K'. Times are those of metrics/collective_times.py: bytes at 80 % of a link
and latency. In an all-to-all to other nodes, each GPU uses its own port; the ring of an all-gather crosses nodes once,
through all ports of a node. Computation is attention, 2 s^2 H e FLOPs in forward and 2.5 times as many in backward, and
the other products of a block of Llama's form (d_ff = 3.5 d_model), all at half of the peak.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.ranks import run_ranks  # noqa: E402
from tinytrain_dist.distributed.collectives import Group, all_gather, exchange_parts, group_size  # noqa: E402
from tinytrain_dist.distributed.context import CONTEXT, DistributedContext, init_distributed  # noqa: E402
from tinytrain_dist.distributed.parallel_dims import ParallelDims  # noqa: E402
from tinytrain_dist.metrics.collective_times import RankGroup, gather_time  # noqa: E402
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, REACHABLE_SHARE_OF_LINKS  # noqa: E402
from tinytrain_dist.model.attention import CausalAttention, causal_attention  # noqa: E402
from tinytrain_dist.parallel.context_parallel import HeadExchange  # noqa: E402

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k and v of a rank's positions -> its part of the output

METHODS = ("all-to-all", "all-gather")
BLOCK_ROWS = 256  # queries that attend to gathered keys at once
TOLERANCE = 1e-4  # largest difference from one process, as a share of the largest value
DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Case:
    """Attention of one sequence on cp ranks."""

    context: int
    cp: int
    heads: int
    kv_heads: int
    head_width: int
    element_bytes: int = 4

    @property
    def exchanged_kv_heads(self) -> int:
        """Key/value heads of the all-to-all, which repeats them until cp divides them."""
        return math.lcm(self.kv_heads, self.cp)

    def _bytes(self, positions: int, heads: int) -> int:
        return positions * heads * self.head_width * self.element_bytes

    def sent_bytes(self, method: str) -> int:
        """Return what a rank sends to other ranks in forward, and again in backward."""
        tokens = self.context // self.cp
        if method == "all-gather":
            return (self.cp - 1) * self._bytes(tokens, 2 * self.kv_heads)
        return self._bytes(tokens, 2 * (self.heads + self.exchanged_kv_heads)) * (self.cp - 1) // self.cp

    def kept_bytes(self, method: str) -> int:
        """Return the size of the queries, keys and values that attention gets, which are kept for backward."""
        if method == "all-gather":
            return self._bytes(self.context // self.cp, self.heads) + self._bytes(self.context, 2 * self.kv_heads)
        return self._bytes(self.context // self.cp, self.heads + 2 * self.exchanged_kv_heads)


# ---------------------------------------------------------------- the two methods


def own_positions(method: str, case: Case, rank: int) -> Tensor:
    """Return the positions of a rank: consecutive ones, or a chunk from the head and one from the tail."""
    if method == "all-to-all":
        return torch.arange(case.context).chunk(case.cp)[rank]
    chunks = torch.arange(case.context).chunk(2 * case.cp)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


class GatheredParts(torch.autograd.Function):
    """The parts of all ranks, in a new first dim. Backward is a reduce-scatter: each rank gets the sum for its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group_name = group.group_name
        parts = part.new_empty(group_size(group), *part.shape)
        all_gather(parts, part.contiguous(), group)
        return parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # gloo's own reduce-scatter sends more than a ring would
        return exchange_parts(grad_outputs[0], ctx.group_name).sum(dim=0), None


def gather_positions(k_bkte: Tensor, v_bkte: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return the keys and values of all positions, in order: [b, k, s, e]. One message for both."""
    parts: Tensor = GatheredParts.apply(torch.stack([k_bkte, v_bkte]), group)  # type: ignore[no-untyped-call]
    first_chunks, last_chunks = parts.chunk(2, dim=4)  # of each rank: [c, 2, b, k, chunk, e]
    chunks = torch.cat([first_chunks, last_chunks.flip(0)])
    k_bkse, v_bkse = chunks.movedim(0, 3).flatten(3, 4)
    return k_bkse, v_bkse


def attend_rows(q_bhte: Tensor, k_bkse: Tensor, v_bkse: Tensor, start: int) -> Tensor:
    """Return causal attention of consecutive queries, the first of which has position `start`: [b, h, t, e]."""
    groups = q_bhte.shape[1] // k_bkse.shape[1]
    k_bhse, v_bhse = k_bkse.repeat_interleave(groups, dim=1), v_bkse.repeat_interleave(groups, dim=1)
    blocks = []
    # blocks of rows, because a kernel with a mask computes all keys of each row
    for q_rows in q_bhte.split(BLOCK_ROWS, dim=2):
        stop = start + q_rows.shape[2]
        mask = torch.ones(q_rows.shape[2], stop, dtype=torch.bool).tril(diagonal=start)
        blocks.append(F.scaled_dot_product_attention(q_rows, k_bhse[:, :, :stop], v_bhse[:, :, :stop], attn_mask=mask))
        start = stop
    return torch.cat(blocks, dim=2)


class AddedKeys(nn.Module):
    """Takes the place of attention to measure the exchange alone: it costs little, and all inputs get gradients."""

    def forward(self, q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, mask: None = None) -> Tensor:
        return q_bhte + (k_bkte + v_bkte).repeat_interleave(q_bhte.shape[1] // k_bkte.shape[1], dim=1)


def build(method: str, case: Case, context: DistributedContext, with_attention: bool) -> Attend:
    """Return attention with this method, or without attention its exchange alone."""
    group = context.group(CONTEXT)
    assert group is not None, "cp is more than 1"
    if method == "all-to-all":
        return HeadExchange(CausalAttention() if with_attention else AddedKeys(), group)
    chunks = own_positions(method, case, context.rank).chunk(2)
    own = [slice(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]

    def attend(q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor) -> Tensor:
        k_bkse, v_bkse = gather_positions(k_bkte, v_bkte, group)
        if not with_attention:
            k_bkte, v_bkte = (torch.cat([x[:, :, part] for part in own], dim=2) for x in (k_bkse, v_bkse))
            added: Tensor = AddedKeys()(q_bhte, k_bkte, v_bkte)
            return added
        rows = zip(q_bhte.chunk(2, dim=2), own, strict=True)
        return torch.cat([attend_rows(q_rows, k_bkse, v_bkse, part.start) for q_rows, part in rows], dim=2)

    return attend


# ---------------------------------------------------------------- measured


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this process sends to the others of a group, as torch's operators get them."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ranks = ranks
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::send":
            self.total += sum(tensor.nbytes for tensor in args[0])
        elif name == "_c10d_functional::all_to_all_single":
            self.total += args[0].nbytes * (self.ranks - 1) // self.ranks
        elif "c10d" in name and name.split("::")[1] not in ("recv_", "wait_tensor"):
            raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


@dataclass
class Turns:
    """What a rank measured of a case with one method."""

    sent_bytes: int  # in forward and backward
    difference: float  # from one process: the largest, of the output and of all gradients
    seconds: list[float] = field(default_factory=list)
    exchange_seconds: list[float] = field(default_factory=list)


class Inputs:
    """Queries, keys, values and gradients of the output for the whole sequence, and what one process computes."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        shapes = [(1, count, case.context, case.head_width) for count in counts]
        *self.tensors, self.grad = [torch.randn(shape, generator=generator) for shape in shapes]
        self.expected = self.run(causal_attention, torch.arange(case.context))

    def run(self, attend: Attend, positions: Tensor) -> list[Tensor]:
        """Return the output at these positions, and the gradients of q, k and v there."""
        parts = [tensor[:, :, positions].requires_grad_() for tensor in self.tensors]
        y = attend(*parts)
        y.backward(self.grad[:, :, positions])
        return [y.detach(), *(part.grad for part in parts if part.grad is not None)]

    def difference(self, found: list[Tensor], positions: Tensor) -> float:
        """Return the largest difference from one process, as a share of the largest value of its tensor."""
        pairs = zip(found, self.expected, strict=True)
        return max(float((part - whole[:, :, positions]).abs().max() / whole.abs().max()) for part, whole in pairs)


def measure(cases: list[Case], rounds: int) -> list[dict[str, Turns]]:
    """On a rank: return what each method did in each case."""
    context = init_distributed("cpu")
    context = context.with_mesh(ParallelDims("none", 1, 1, "", context.world_size))

    def seconds_of(attend: Attend, inputs: Inputs, positions: Tensor) -> float:
        context.barrier()
        start = time.perf_counter()
        inputs.run(attend, positions)
        context.barrier()
        return time.perf_counter() - start

    results = []
    for case in cases:
        inputs = Inputs(case)
        positions = {method: own_positions(method, case, context.rank) for method in METHODS}
        whole = {method: build(method, case, context, with_attention=True) for method in METHODS}
        exchange = {method: build(method, case, context, with_attention=False) for method in METHODS}
        turns = {}
        for method in METHODS:  # also warms up
            with SentBytes(case.cp) as sent:
                found = inputs.run(whole[method], positions[method])
            turns[method] = Turns(sent.total, inputs.difference(found, positions[method]))
        for _ in range(rounds):
            for method in METHODS:
                turns[method].seconds.append(seconds_of(whole[method], inputs, positions[method]))
            for method in METHODS:
                turns[method].exchange_seconds.append(seconds_of(exchange[method], inputs, positions[method]))
        results.append(turns)
    return results


def print_measured(cases: list[Case], rounds: int) -> bool:
    """Measure and print all cases; return whether both methods computed what one process computes."""
    print("forward and backward of attention (the exchange alone); bytes of both passes; pairs are", *METHODS)
    print_row("context", "cp", "heads", "kv heads", "all-to-all", "all-gather", "ratio", "MB sent", "MB kept")
    differences = []
    for cp in sorted({case.cp for case in cases}):
        of_cp = [case for case in cases if case.cp == cp]
        ranks = run_ranks(cp, measure, of_cp, rounds, timeout_seconds=3600)
        for index, case in enumerate(of_cp):
            differences += [rank[index][method].difference for rank in ranks for method in METHODS]
            turns = [ranks[0][index][method] for method in METHODS]
            times = [
                f"{1e3 * statistics.median(turn.seconds):.1f} ms ({1e3 * statistics.median(turn.exchange_seconds):.1f})"
                for turn in turns
            ]
            ratios = [gather / exchange for exchange, gather in zip(*(turn.seconds for turn in turns), strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
            sent = ", ".join(f"{turn.sent_bytes / 1e6:.2f}" for turn in turns)
            kept = ", ".join(f"{case.kept_bytes(method) / 1e6:.2f}" for method in METHODS)
            print_row(f"{case.context:,}", cp, case.heads, case.kv_heads, *times, ratio, sent, kept)
    print(f"largest difference from one process: {max(differences):.1e} of the largest value")
    return bool(max(differences) < TOLERANCE)


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


# ---------------------------------------------------------------- computed


def exchange_seconds(method: str, case: Case, on_node: int) -> float:
    """Return the time that the exchanges of a layer take on H100s, forward and backward, if nothing hides them."""
    device = DEVICE_SPECS["h100"]
    group = RankGroup(case.cp, on_node, DEVICES_PER_NODE)
    exchanged = case.sent_bytes(method) * case.cp / (case.cp - 1)  # with what stays on the rank
    if method == "all-gather":
        return 2 * gather_time(exchanged, group, device).seconds
    inside = exchanged * (on_node - 1) / case.cp / device.neighbours
    across = exchanged * (case.cp - on_node) / case.cp / (device.network / DEVICES_PER_NODE)
    latency = 2 * gather_time(exchanged / 2, group, device).latency  # queries, keys and values; then the result
    return 2 * (latency + max(inside, across) / REACHABLE_SHARE_OF_LINKS)


def computing_seconds(case: Case) -> tuple[float, float]:
    """Return the time of attention and of a whole block on an H100, forward and backward."""
    device = DEVICE_SPECS["h100"]
    speed = device.bf16_flops * device.reached
    width = case.heads * case.head_width
    attention = 3.5 * 2 * case.context**2 * width / case.cp
    weights = 2 * width**2 + 2 * width * case.kv_heads * case.head_width + 3 * width * (7 * width // 2)
    products = 3 * 2 * weights * case.context / case.cp
    return attention / speed, (attention + products) / speed


def imbalance(cp: int, documents: list[int]) -> float:
    """Return the work of the rank with the most, divided by the mean, if gathered keys are masked by document.

    Work is the number of pairs of positions that attend; documents: lengths, in order. With the all-to-all it is 1.
    """
    pairs = torch.cat([torch.arange(1, length + 1) for length in documents]).double()  # of each query
    chunks = torch.tensor([float(chunk.sum()) for chunk in pairs.chunk(2 * cp)])
    work = chunks[:cp] + chunks.flip(0)[:cp]
    return float(work.max() / work.mean())


def print_paper(heads: int, kv_heads: list[int], head_width: int, tokens: int) -> None:
    """Print the exchange of a layer on H100s, for several sizes of groups inside a node and across nodes."""
    print(f"H100, bf16, {heads} heads of {head_width}, {tokens:,} tokens per rank; one layer, forward and backward;")
    print("pairs are", *METHODS)
    exchange = ("exchange", "relative to attention", "to the block")
    print_row("kv heads", "cp", "context", "ranks on a node", "MB sent", "MB kept", *exchange)
    places = [(2, 2), (4, 4), (8, 8), (2, 1), (4, 1), (8, 1), (16, 8), (32, 8)]
    for count in kv_heads:
        for cp, on_node in places:
            case = Case(cp * tokens, cp, heads, count, head_width, element_bytes=2)
            sent = ", ".join(f"{2 * case.sent_bytes(method) / 1e6:,.0f}" for method in METHODS)
            kept = ", ".join(f"{case.kept_bytes(method) / 1e6:,.0f}" for method in METHODS)
            seconds = [exchange_seconds(method, case, on_node) for method in METHODS]
            times = ", ".join(f"{1e3 * value:.2f}" for value in seconds) + " ms"
            shares = [
                ", ".join(f"{100 * value / whole:.1f}" for value in seconds) + " %" for whole in computing_seconds(case)
            ]
            print_row(count, cp, f"{case.context:,}", on_node, sent, kept, times, *shares)
    print("\nall-gather with document masks: work of the rank with the most, relative to the mean")
    context = 8 * tokens
    windows = {
        "one document": [context],
        "documents of 1/32 of the context": [context // 32] * 32,
        "one document of a half, then such ones": [context // 2] + [context // 32] * 16,
        "one document of an eighth, then such ones": [context // 8] + [context // 32] * 28,
    }
    for name, documents in windows.items():
        print_row(name, *(f"cp {cp}: {imbalance(cp, documents):.2f}" for cp in (2, 4, 8)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], help="positions (1024 4096)")
    parser.add_argument("--cp", type=int, nargs="+", default=[2, 4], help="numbers of processes (2 4)")
    parser.add_argument("--heads", type=int, help="query heads (8; with --paper 32)")
    parser.add_argument("--kv-heads", type=int, nargs="+", help="key/value heads (8 2 1; with --paper 8 32)")
    parser.add_argument("--head-width", type=int, help="width of a head (64; with --paper 128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each method, after one to warm up (5)")
    parser.add_argument("--paper", action="store_true", help="compute the times on H100s instead of measuring")
    parser.add_argument("--tokens-per-rank", type=int, default=16384, help="with --paper: s / cp (16384)")
    options = parser.parse_args(arguments)
    if options.paper:
        heads, kv_heads = options.heads or 32, options.kv_heads or [8, 32]
        print_paper(heads, kv_heads, options.head_width or 128, options.tokens_per_rank)
        return
    cases = [
        Case(context, cp, options.heads or 8, kv_heads, options.head_width or 64)
        for cp in options.cp
        for kv_heads in options.kv_heads or [8, 2, 1]
        for context in options.contexts
    ]
    for case in cases:
        if case.context % (2 * case.cp) or case.heads % case.cp or case.heads % case.kv_heads:
            parser.error(f"{case}: cp must divide half of the context and the heads; kv_heads must divide the heads")
    if not print_measured(cases, options.rounds):
        sys.exit(1)


if __name__ == "__main__":
    main()
