"""Predict the time of a step on GPUs: a timeline of computation, collectives and what waits for what.

The order of the tasks is that of the real step on NCCL (parallel/parallelize.py, grad_reduction.py, and torch's DDP
and FSDP2): which weights are gathered when, how DDP fills its buckets, what is summed in which micro-step. Tests
compare the collectives with those of the simulated step, and the buckets with those of DDP. Two numbers are
assumptions: the share of the peak that computation reaches (`DeviceSpec.reached`), and that of the links
(`REACHABLE_SHARE_OF_LINKS`).

Not modelled:

- collectives take processors of the GPU and bandwidth of its memory from computation
- copies into and out of FSDP's buffers, and the casts of weights without FSDP
- ranks that are slower than others, and other traffic in the network
- small micro-batches reach a smaller share of the peak
- reproducible mode

Must not know torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import BF16_PRECISIONS
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.exchange_plan import ROUNDS_AHEAD, Round
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.metrics.collective_times import RankGroup, all_reduce_time, all_to_all_time, gather_time
from tinytrain_dist.metrics.device_specs import REACHABLE_SHARE_OF_LINKS, DeviceSpec, product_type
from tinytrain_dist.optim.costs import update_work
from tinytrain_dist.training.timeline import Task, Timeline, waiting

FLOAT32 = 4  # bytes; gradients, their sums and the optimizer's state are float32
MIB = 2**20
# measured (H200, 2026-11-27): norm, clipping and update with AdamW of 1.28e9 weights take 13.8 ms; these numbers and
# those of optim/costs.py give 12.2
NORM_BYTES = 4  # read for each weight by the gradient norm
BF16 = 2  # bytes; Newton-Schulz on GPUs
REACHED_OF_MEMORY = 0.7  # share of the memory's bandwidth that the update reaches
# what communication is for
WEIGHTS, GRADIENTS, NORM, MATRICES = "weights", "gradients", "loss and norm", "whole matrices"
SEQUENCES = "parts of sequences"
INPUTS = "inputs of blocks"  # with activation_offload; between a GPU and its host
# the order in which a block uses its weights; their gradients arrive in the reverse order
USED_IN_ORDER = (
    "input_layernorm q_proj k_proj v_proj q_norm k_norm o_proj post_attention_layernorm gate_proj up_proj down_proj"
).split()


@dataclass(frozen=True)
class Unit:
    """A part of the model whose weights FSDP gathers together.

    * `shapes`: of its weights, in the order in which they are used.
    * `forward_flops`, `backward_flops`: for one token.
    * `gathered_bytes`: of one weight when it is gathered.
    """

    shapes: tuple[tuple[int, ...], ...]
    forward_flops: float
    backward_flops: float
    gathered_bytes: int

    def num_weights(self, shards: int = 1) -> int:
        """Return how many weights are sent, with the padding that makes all shards equal."""
        return sum(shards * math.ceil(shape[0] / shards) * math.prod(shape[1:]) for shape in self.shapes)


@dataclass(frozen=True)
class ModelUnits:
    """The units of a model in the order of forward. With a tied head, the embedding's unit has the weights of both."""

    embedding: Unit
    blocks: tuple[Unit, ...]
    norm: Unit
    head: Unit
    tied: bool

    @property
    def num_weights(self) -> int:
        """Number of weights of the model."""
        return sum(unit.num_weights() for unit in (self.embedding, *self.blocks, self.norm, self.head))


def units_of(model: Any, config: TrainingConfig) -> ModelUnits:
    """Return the units of a TransformerLM, which may be on the meta device.

    A third of a matrix's FLOPs are in forward. The head computes its gradient with the loss, so all of its are.
    """
    block_bytes = 2 if config.precision in BF16_PRECISIONS else FLOAT32
    factor = 1 if config.activation_checkpointing == "block" else 0  # of forward, which backward repeats

    def shapes(module: Any) -> tuple[tuple[int, ...], ...]:
        named = sorted(module.named_parameters(), key=lambda item: _place_of_use(item[0]))
        return tuple(tuple(param.shape) for _, param in named)

    def matrix_weights(module: Any) -> int:
        return sum(param.numel() for param in module.parameters() if param.ndim >= 2)

    blocks = list(model.model.layers)
    head_weights = model.lm_head.weight.numel()
    attention = model.flops_per_token() - 6 * (head_weights + sum(matrix_weights(block) for block in blocks))
    block_units = []
    for block in blocks:
        forward = 2 * matrix_weights(block) + attention / len(blocks) / 3
        block_units.append(Unit(shapes(block), forward, (2 + factor) * forward, block_bytes))
    return ModelUnits(
        embedding=Unit(shapes(model.model.embed_tokens), 0, 0, FLOAT32),
        blocks=tuple(block_units),
        norm=Unit(shapes(model.model.norm), 0, 0, block_bytes),
        head=Unit(() if config.tie_embeddings else shapes(model.lm_head), 6 * head_weights, 0, FLOAT32),
        tied=config.tie_embeddings,
    )


def _place_of_use(name: str) -> int:
    return next((place for place, part in enumerate(USED_IN_ORDER) if part in name), 0)


def ddp_buckets(sizes: Sequence[int], cap_bytes: int, first_bytes: int) -> list[list[int]]:
    """Return which gradients are in each of DDP's buckets. sizes: bytes, in the order in which gradients arrive.

    A bucket is closed when it holds its limit or more. These are the buckets from the second step on.
    """
    buckets: list[list[int]] = [[]]
    held, limit = 0, first_bytes
    for index, size in enumerate(sizes):
        buckets[-1].append(index)
        held += size
        if held >= limit:
            buckets.append([])
            held, limit = 0, cap_bytes
    return buckets if buckets[-1] else buckets[:-1]


@dataclass(frozen=True)
class StepPrediction:
    """Where the time of a step goes, on each GPU.

    * `waits`: how long computation waits for communication, in seconds, by what is communicated.
    * `sent`: group, operation and bytes of each collective, in the order in which they are issued.
    """

    compute_seconds: float  # forward and backward
    update_seconds: float  # gradient norm and optimizer
    waits: dict[str, float]
    sent: list[tuple[str, str, int]]

    @property
    def exposed_seconds(self) -> float:
        """Seconds in which the GPU only waits for communication."""
        return sum(self.waits.values())

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.compute_seconds + self.update_seconds + self.exposed_seconds


@dataclass(frozen=True)
class StepSettings:
    """What decides the timeline of a step. bucket_mb: the limit of DDP's buckets, None for torch's own."""

    units: ModelUnits
    config: TrainingConfig
    dims: ParallelDims
    plan: BatchPlan
    device: DeviceSpec
    devices_per_node: int
    bucket_mb: int | None = None
    separate_reduce_scatter: bool = False


def predict_step(settings: StepSettings) -> StepPrediction:
    """Simulate one step, and return where its time goes. Does not know reproducible mode."""
    assert not settings.config.reproducible, "the reductions of reproducible mode are not modelled"
    step = _Step(settings)
    step.build()
    waits = waiting(step.timeline, step.timeline.run(), COMPUTE)
    return StepPrediction(step.compute_seconds, step.update_seconds, waits, step.sent)


def seconds_alone(settings: StepSettings) -> float:
    """Return the time of the same micro-steps on one GPU that holds the whole model and waits for nobody."""
    step = _Step(settings)
    flops = sum(unit.forward_flops + unit.backward_flops for unit in step.order)
    computing = settings.plan.accumulation_steps * step.seconds_of(flops)
    return computing + step.seconds_of_update(1) + step.seconds_of_matrices(sum(step.work.plan.costs))


def exchanged_bytes(config: TrainingConfig, plan: BatchPlan) -> tuple[int, ...]:
    """Return what a rank sends in the forward pass of a block: queries, keys and values, then what attention returns.

    Nothing without context parallelism. Keys and values have at least one head for each rank.
    """
    if plan.cp == 1:
        return ()
    width = config.head_width * (BF16 if config.precision in BF16_PRECISIONS else FLOAT32)
    positions = plan.micro_batch_size * plan.context_len // plan.cp
    heads = config.num_heads, config.num_heads + 2 * math.lcm(config.kv_heads, plan.cp)
    return positions * heads[1] * width, positions * heads[0] * width


def offloaded_bytes(config: TrainingConfig, plan: BatchPlan) -> int:
    """Return the size of the input of a block in one micro-step, which offload copies to the host and back."""
    width = config.d_model * (BF16 if config.precision in BF16_PRECISIONS else FLOAT32)
    return plan.micro_batch_size * plan.context_len // plan.cp * width


def offload_seconds(config: TrainingConfig, plan: BatchPlan, device: DeviceSpec) -> float:
    """Return how long a GPU sends inputs of blocks to its host and back in a step; 0 without offload."""
    num_copies = 2 * (config.num_layers - 1) * plan.accumulation_steps if config.activation_offload else 0
    return num_copies * offloaded_bytes(config, plan) / (device.host_link * REACHABLE_SHARE_OF_LINKS)


COMPUTE = "compute"
HOST_COPIES = "host copies"  # the stream of activation_offload
SHARD, REPLICATE, WORLD, CONTEXT = "shard", "replicate", "world", "cp"  # groups of ranks, each with a communicator
REDUCE_SCATTER = "reduce-scatter"  # the second communicator of the shards


class _Step:
    """Builds the timeline of a step: `build` adds all tasks."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        self.timeline = Timeline()
        self.compute_seconds = 0.0
        self.update_seconds = 0.0
        self.sent: list[tuple[str, str, int]] = []
        dims, per_node = settings.dims, settings.devices_per_node
        self.shards, self.replicas, ranks = dims.weight_shards, dims.weight_replicas, settings.plan.world_size
        replicas_on_node = max(1, per_node // self.shards)
        self.groups = {
            SHARD: RankGroup(self.shards, min(self.shards, per_node), per_node),
            REPLICATE: RankGroup(self.replicas, min(self.replicas, replicas_on_node), per_node),
            WORLD: RankGroup(ranks, min(ranks, per_node), per_node),
            CONTEXT: RankGroup(dims.cp, min(dims.cp, per_node), per_node),
        }
        units = settings.units
        self.order = [units.norm, units.embedding, *units.blocks, units.head]
        self.work = update_work(settings.config, self.replicas, self.shards)
        self.reductions: list[int] = []  # tasks that the end of the step waits for
        self.last_compute: tuple[int, ...] = ()
        self.leaving: list[int] = []  # copies of the inputs that are on the host, by block
        self.arriving: int | None = None  # the copy of the input of the next block in backward

    # ------------------------------------------------------------ tasks

    def seconds_of(self, flops_per_token: float) -> float:
        """Return how long one micro-batch computes this."""
        config, device, plan = self.settings.config, self.settings.device, self.settings.plan
        speed = device.peak_flops(product_type(config.precision, config.reproducible)) * device.reached
        return flops_per_token * plan.micro_batch_size * plan.context_len / plan.cp / speed

    def seconds_of_update(self, shards: int) -> float:
        """Return how long the norm and the update of one of so many shards take, without Newton-Schulz."""
        nbytes = self.settings.units.num_weights * NORM_BYTES + self.work.bytes
        return nbytes / shards / (self.settings.device.bandwidth * REACHED_OF_MEMORY)

    def seconds_of_matrices(self, flops: float) -> float:
        """Return how long so many operations of Newton-Schulz take."""
        device = self.settings.device
        return flops / (device.peak_flops("bf16") * device.reached)

    def compute(self, seconds: float, after: Iterable[int] = ()) -> int:
        """Add a task of the GPU's main stream. Without seconds it only marks a point, and waits."""
        number = self.timeline.add(Task(COMPUTE, COMPUTE, seconds, tuple(after)))
        self.last_compute = (number,)
        return number

    def micro_compute(self, flops_per_token: float) -> int:
        seconds = self.seconds_of(flops_per_token)
        self.compute_seconds += seconds
        return self.compute(seconds)

    def unit_compute(self, unit: Unit, is_backward: bool = False) -> int:
        """Add a pass through a unit. With context parallelism, a block waits for what its attention exchanges."""
        is_block = unit in self.settings.units.blocks
        if is_block and self.settings.config.activation_offload:
            move_input = self.fetch_input if is_backward else self.offload_input
            move_input()
        sizes = exchanged_bytes(self.settings.config, self.settings.plan) if is_block else ()
        if is_backward:
            recomputed = sizes if self.settings.config.activation_checkpointing != "none" else ()
            sizes = (*recomputed, *reversed(sizes))
        for nbytes in sizes:
            exchanged = self.communicate(SEQUENCES, "all_to_all_single", CONTEXT, nbytes, self.last_compute)
            self.compute(0.0, [exchanged])
        return self.micro_compute(unit.backward_flops if is_backward else unit.forward_flops)

    def offload_input(self) -> None:
        """Add the copy of the input of a block to the host. Its forward waits for that of the block before it."""
        if self.leaving:
            self.compute(0.0, self.leaving[-1:])
        if len(self.leaving) < len(self.settings.units.blocks) - 1:  # the last block keeps its input
            self.leaving.append(self.copy_input())

    def fetch_input(self) -> None:
        """Let the backward pass of a block wait for its input, and add the copy for the block before it."""
        if self.arriving is not None:
            self.compute(0.0, [self.arriving])
        self.arriving = None
        if self.leaving:
            self.leaving.pop()
            self.arriving = self.copy_input()

    def copy_input(self) -> int:
        config, plan, device = self.settings.config, self.settings.plan, self.settings.device
        seconds = offloaded_bytes(config, plan) / (device.host_link * REACHABLE_SHARE_OF_LINKS)
        return self.timeline.add(Task(INPUTS, HOST_COPIES, seconds, self.last_compute))

    def communicate(self, name: str, operation: str, group: str, nbytes: int, after: Iterable[int]) -> int:
        """Add a collective of a group."""
        ranks, device = self.groups[group], self.settings.device
        time_of = {"allreduce": all_reduce_time, "all_to_all_single": all_to_all_time}.get(operation, gather_time)
        time = time_of(nbytes, ranks, device)
        queue = group
        if operation == "reduce_scatter" and self.settings.separate_reduce_scatter:
            queue = REDUCE_SCATTER
        link = "network" if ranks.nodes > 1 else "node"
        self.sent.append((group, operation, nbytes))
        return self.timeline.add(Task(name, queue, time.transfer, tuple(after), time.latency, link))

    # ------------------------------------------------------------ the step

    def build(self) -> None:
        """Add the tasks of all micro-steps, and of the update."""
        steps = self.settings.plan.accumulation_steps
        for micro_step in range(steps):
            if self.shards > 1:
                self.sharded_micro_step(is_last=micro_step == steps - 1)
            else:
                self.replicated_micro_step(is_last=micro_step == steps - 1)
        self.finish()

    def replicated_micro_step(self, is_last: bool) -> None:
        """Add one micro-step of DDP, which sums gradients in the last one only, or of a single rank."""
        units = self.settings.units
        for unit in self.order:
            self.unit_compute(unit)
        arriving = [units.head, units.norm, *reversed(units.blocks), units.embedding]
        computed = {id(unit): self.unit_compute(unit, is_backward=True) for unit in arriving}
        if not is_last or self.replicas == 1:
            return
        gradients = [(FLOAT32 * math.prod(shape), unit) for unit in arriving for shape in reversed(unit.shapes)]
        cap = (self.settings.bucket_mb or 25) * MIB
        first = MIB if self.settings.bucket_mb is None else cap
        for bucket in ddp_buckets([size for size, _ in gradients], cap, first):
            nbytes = sum(gradients[index][0] for index in bucket)
            ready = computed[id(gradients[bucket[-1]][1])]
            self.reductions = [self.communicate(GRADIENTS, "allreduce", REPLICATE, nbytes, [ready])]

    def sharded_micro_step(self, is_last: bool) -> None:
        """Add one micro-step of FSDP or HSDP."""
        units, config = self.settings.units, self.settings.config
        start = self.last_compute  # FSDP's streams wait for the main stream once, at the beginning of forward
        marks: list[int] = []  # when the weights of each gathered unit are copied out of the buffer
        for unit in self.order:
            if unit.shapes:
                # the buffer of the unit before the last one must be free
                gathered = self.gather(unit, marks[-2:-1] or start)
                marks.append(self.compute(0.0, [gathered]))
            self.unit_compute(unit)

        if units.head.shapes:
            self.micro_compute(units.head.backward_flops)
            self.reduce(units.head, is_last)
        blocks = units.blocks
        resharded = config.reshard_after_forward is not False  # all blocks but the last, which stays gathered
        prefetched: int | None = None  # the gather of the next block to compute
        prefetch_after = marks[-1:]
        for index in reversed(range(len(blocks))):
            if prefetched is not None:
                prefetch_after = [self.compute(0.0, [prefetched])]
            prefetched = self.gather(blocks[index - 1], prefetch_after) if index and resharded else None
            self.unit_compute(blocks[index], is_backward=True)
            self.reduce(blocks[index], is_last)
        # their inputs need no gradient, so FSDP reduces these at the end of backward
        self.reduce(units.norm, is_last)
        self.reduce(units.embedding, is_last)

    def gather(self, unit: Unit, after: Iterable[int]) -> int:
        """Add the all-gather of a unit's weights."""
        nbytes = unit.gathered_bytes * unit.num_weights(self.shards)
        return self.communicate(WEIGHTS, "allgather", SHARD, nbytes, after)

    def reduce(self, unit: Unit, is_last: bool) -> None:
        """Add the sum of a unit's gradients: over the shards, and in the last micro-step over the replicas."""
        shards = self.shards
        nbytes = FLOAT32 * unit.num_weights(shards)
        # the buffer of the previous reduce-scatter must be free
        copied = self.compute(0.0, self.reductions[:1])
        scattered = self.communicate(GRADIENTS, "reduce_scatter", SHARD, nbytes, [copied])
        self.reductions = [scattered]
        if is_last and self.replicas > 1:
            self.reductions.append(self.communicate(GRADIENTS, "allreduce", REPLICATE, nbytes // shards, [scattered]))

    def finish(self) -> None:
        """Add what follows the last backward: losses, gradient norm and update."""
        plan = self.settings.plan
        done = self.compute(0.0, self.reductions)
        if plan.world_size > 1:
            losses = self.communicate(NORM, "allreduce", WORLD, 8 * plan.num_micro_batches * plan.cp, [done])
            done = self.compute(0.0, [losses])
        update_seconds = self.seconds_of_update(self.shards)
        norm_bytes = self.settings.units.num_weights * NORM_BYTES
        norm_seconds = update_seconds * norm_bytes / (norm_bytes + self.work.bytes)
        done = self.compute(norm_seconds)
        after = [done]
        if self.shards > 1:
            after = [self.communicate(NORM, "allreduce", SHARD, 8, [done])]
        self.compute(update_seconds - norm_seconds, after)
        self.update_seconds = update_seconds + self.exchange_matrices()

    def exchange_matrices(self) -> float:
        """Add what MatrixExchange does for the matrices of Muon, as seen by rank 0; return the seconds it computes."""
        plan = self.work.plan
        rounds = deque(plan.rounds())
        collected: deque[tuple[Round, list[int]]] = deque()  # a round, and the task to wait for
        returning: deque[tuple[Round, list[int]]] = deque()
        sharing: deque[list[int]] = deque()
        seconds = 0.0
        while rounds or collected or returning or sharing:
            while rounds and len(collected) < ROUNDS_AHEAD:
                collected.append((rounds[0], self.send_rows(rounds.popleft())))
            is_computing = bool(collected)
            if is_computing:
                matrices, arrived = collected.popleft()
                own_seconds = self.seconds_of_matrices(plan.costs[matrices[0]]) if 0 in matrices else 0.0
                seconds += own_seconds
                self.compute(own_seconds, arrived)
                returning.append((matrices, self.send_rows(matrices)))
                if rounds:
                    collected.append((rounds[0], self.send_rows(rounds.popleft())))
            if sharing:
                self.compute(0.0, sharing.popleft())
            if returning and (plan.shards == 1 or len(returning) > is_computing):
                sharing.append(self.share_rows(*returning.popleft()))
        return seconds

    def send_rows(self, matrices: Round) -> list[int]:
        """Add the message that collects the rows of a round's matrices at their owners, or that returns them."""
        plan = self.work.plan
        sent, received = plan.collect_sizes(matrices, replica=0, shard=0)
        if plan.shards == 1 or not any(index is not None for index in plan.owned(matrices, 0)):
            return []
        nbytes = BF16 * max(sum(sent), sum(received))
        return [self.communicate(MATRICES, "alltoall", SHARD, nbytes, self.last_compute)]

    def share_rows(self, matrices: Round, arrived: list[int]) -> list[int]:
        """Add the messages that send a round's results to the other replicas."""
        plan = self.work.plan
        start = self.compute(0.0, arrived)
        sizes = [plan.share_size(matrices, replica, 0) for replica in range(plan.replicas)] if plan.replicas > 1 else []
        return [self.communicate(MATRICES, "broadcast", REPLICATE, BF16 * size, [start]) for size in sizes if size]
