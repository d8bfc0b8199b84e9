"""Estimate the memory and communication of a step, by running the real step on tensors without memory.

Must not know devices, or the architecture of the model: sizes come from running the step, not from formulas.

A simulated step goes through stages (weights, forward, head, backward, update). A `MemoryTracker` records each
allocation with its stage and kind. It also records each message, instead of sending it.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinytrain_dist.config.parameter_groups import blocks_are_alike
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.distributed.fake_backend import ACTIVATION_EXCHANGE, NoCommunication
from tinytrain_dist.distributed.torch_internals import after_storage_resize, fake_tensor_mode, tree_leaves
from tinytrain_dist.model.loss import ChunkLoss
from tinytrain_dist.model.matmul import simulate_device
from tinytrain_dist.optim.weight_average import AVERAGE_KEY
from tinytrain_dist.parallel.activation_offload import host_buffers
from tinytrain_dist.parallel.tree_reduction import blocks_in
from tinytrain_dist.parallel.wrappers import unwrap
from tinytrain_dist.training.train_step import TrainStep, build_train_step

# Blocks are equal, so the memory of each stage is linear in their number, unless param_groups names single blocks. Deep
# models are simulated at these two depths and extrapolated (measured: exact). With fewer blocks, none would have
# neighbours on both sides, which FSDP gathers early and frees late.
SIMULATED_DEPTHS = (3, 4)
MEMORY_KINDS = {
    "weights": "master weights",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "gathered": "weights gathered from other ranks",
    "reduction": "buffers of the reduction",
    "head": "logits and loss",
    "forward": "activations kept for backward",
    "backward": "temporaries of backward",
    "update": "temporaries of the update",
}
# Kinds of memory of the host of a GPU. Pinned memory comes from an allocator of torch, which rounds sizes up to a power
# of two.
HOST, PINNED = "host", "pinned"
GATHER_OPERATIONS = re.compile(r"allgather|^send|^recv")  # over gloo, weights are gathered by direct messages
USABLE_MEMORY = 0.92  # share of a device's memory: fragmentation and workspaces of libraries take the rest


class Allocation:
    """The memory of one storage. reference: a weak reference to it, which reports that it was freed."""

    __slots__ = ("kind", "nbytes", "reference")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.nbytes = 0
        self.reference: Any = None


class MemoryTracker(NoCommunication):
    """Record every allocation and message while the tracker is active. Set `stage` when a stage begins."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "weights"
        self.events: list[tuple[str, int, Allocation]] = []  # stage, change in bytes, allocation
        self.forward_passes = 0  # number of passes that have begun
        self.host_bytes = 0
        # of each: forward pass, operation, bytes, ranks of the group
        self._messages: list[tuple[int, str, int, tuple[int, ...]]] = []
        self._allocations: dict[int, Allocation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record the tensors that it creates."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        gathers = func.namespace == "fsdp" and "gather" in func.__name__
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.record(value, "gathered" if gathers else None)
        return out

    def message(self, name: str, tensors: list[Tensor], ranks: tuple[int, ...]) -> None:
        """Record a message that would be sent. Its buffers belong to the reduction or the update, or hold weights."""
        kind: str | None = "gathered" if GATHER_OPERATIONS.search(name) else "reduction"
        if self.stage == "update" or name == ACTIVATION_EXCHANGE:
            kind = None  # that of the stage
        for tensor in tensors:
            self.record(tensor, kind)
        self._messages.append((self.forward_passes, name, max(tensor.nbytes for tensor in tensors), ranks))

    def record(self, tensor: Tensor, kind: str | None = None) -> None:
        """Track the tensor's storage from now on. kind: overrides the kind that follows from the stage."""
        storage = local_tensor(tensor).untyped_storage()
        allocation = self._allocation(storage, storage.nbytes())
        allocation.kind = kind or allocation.kind

    def _allocation(self, storage: Any, nbytes: int) -> Allocation:
        key = storage._cdata
        allocation = self._allocations.get(key)
        if allocation is None:
            allocation = self._allocations[key] = Allocation(self.stage.partition(":")[0])
            allocation.reference = weakref.ref(storage, lambda _: self._resized(self._allocations.pop(key), 0))
        self._resized(allocation, nbytes)
        return allocation

    def _resized(self, allocation: Allocation, nbytes: int) -> None:
        if nbytes != allocation.nbytes:
            self.events.append((self.stage, nbytes - allocation.nbytes, allocation))
            allocation.nbytes = nbytes

    @contextlib.contextmanager
    def tracking_resizes(self) -> Iterator[None]:
        """Also record storages that are resized in place: this is how FSDP frees and regains gathered weights."""

        def record(storage: Any, nbytes: int) -> None:
            self._allocation(storage, nbytes).kind = "gathered"

        with after_storage_resize(record):
            yield

    def sent_bytes(self, forward_passes: int) -> dict[tuple[int, ...], Counter[str]]:
        """Return the bytes that a step with this many forward passes sends, by ranks of the group and operation.

        The passes of the simulation except its last one represent all passes except the last.
        """
        simulated = self.forward_passes - 1
        sums: dict[tuple[int, ...], Counter[str]] = {}
        for forward_pass, name, nbytes, ranks in self._messages:
            repeats = (forward_passes - 1) / simulated if 1 <= forward_pass <= simulated else 1
            sums.setdefault(ranks, Counter())[name] += round(nbytes * repeats)
        return sums

    def peaks(self) -> dict[str, Counter[str]]:
        """Return the bytes by kind that each stage held at its peak."""
        live: Counter[str] = Counter()
        peaks: dict[str, Counter[str]] = {}
        total = 0
        highest: dict[str, int] = {}
        for stage, change, allocation in self.events:
            if stage not in peaks:  # a stage begins with what the previous stage has left
                highest[stage] = total
                peaks[stage] = live.copy()
            if allocation.kind in (HOST, PINNED):
                continue
            live[allocation.kind] += change
            total += change
            if total > highest[stage]:
                highest[stage] = total
                peaks[stage] = live.copy()
        return peaks

    def count_host_memory(self) -> None:
        """Set `host_bytes` to the host memory that is in use now."""
        allocations = self._allocations.values()
        pinned = sum(1 << (each.nbytes - 1).bit_length() for each in allocations if each.kind == PINNED)
        self.host_bytes = pinned + sum(each.nbytes for each in allocations if each.kind == HOST)


def memory_row(name: str, nbytes: float) -> str:
    """Format one line of a memory table."""
    return f"  {name:<40}{nbytes / 2**30:>9.3f} GiB"


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one rank at each stage of a step (bytes by kind), and what it sends in a step.

    host_bytes: what a rank with a GPU keeps in the memory of its host. On a CPU there is no difference.
    """

    stages: dict[str, Counter[str]]
    sent: dict[tuple[int, ...], dict[str, int]]  # ranks of a group -> operation -> bytes in a step
    host_bytes: int = 0

    @property
    def peak(self) -> str:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: self.stages[stage].total())

    @property
    def nbytes(self) -> int:
        """The memory in bytes at the peak."""
        return self.stages[self.peak].total()

    def table(self) -> str:
        """Format the memory at the peak, one kind per line, the largest first."""
        held = self.stages[self.peak]
        rows = [memory_row(MEMORY_KINDS[kind], size) for kind, size in held.most_common() if size > 0]
        return "\n".join([*rows, memory_row(f"at the peak ({self.peak})", self.nbytes)])


def estimate_memory(config: TrainingConfig, context: DistributedContext) -> MemoryEstimate:
    """Simulate a step of `config` on the context's mesh, and return what it holds and sends.

    The simulation runs in this process alone, sends nothing and allocates no memory for tensors. It does not compile
    blocks; a compiled run needs at most the memory estimated here.
    """
    assert context.parallel_dims is not None, "with_mesh comes first"
    plan = BatchPlan.make(config, context.parallel_dims)
    # With accumulation, two passes are simulated: the first creates gradients, the second adds to them. All later ones
    # need the same memory as the second.
    passes = 2 if plan.accumulation_steps > 1 else 1
    num_micro_batches = passes * plan.ranks
    if config.reproducible:  # a power of two; the simulated rank may then have more passes
        num_micro_batches = min(1 << (num_micro_batches - 1).bit_length(), plan.num_micro_batches)
    batch_size = num_micro_batches * plan.micro_batch_size
    simulated = replace(
        config,
        compile=False,
        batch_size=batch_size,
        batch_size_warmup=None,
        micro_batch_size=plan.micro_batch_size,
    )
    extrapolated = config.num_layers > SIMULATED_DEPTHS[1] and blocks_are_alike(config)
    depths = SIMULATED_DEPTHS if extrapolated else (config.num_layers,)
    trackers = [_simulate_step(replace(simulated, num_layers=depth), context) for depth in depths]
    stages = _extrapolate([tracker.peaks() for tracker in trackers], depths, config.num_layers)
    if config.reproducible:  # a BinaryCounter keeps more sums in the real step
        kept_sums = max(kept_sums_of(plan, replica) for replica in range(plan.replicate))
        simulated_sums = kept_sums_of(replace(plan, batch_size=batch_size), replica=0)
        kept_bytes = max(0, kept_sums - simulated_sums) * stages["update"]["gradients"]
        stages = {stage: kinds + Counter(gradients=kept_bytes) for stage, kinds in stages.items()}
    sent_bytes = [tracker.sent_bytes(plan.accumulation_steps) for tracker in trackers]
    sent = _extrapolate(sent_bytes, depths, config.num_layers)
    on_host = _extrapolate([{HOST: Counter(bytes=each.host_bytes)} for each in trackers], depths, config.num_layers)
    return MemoryEstimate(
        stages, {ranks: dict(operations) for ranks, operations in sent.items()}, on_host[HOST]["bytes"]
    )


def kept_sums_of(plan: BatchPlan, replica: int) -> int:
    """Return how many sums of gradients a rank of a reproducible run keeps beside those of its last micro-step."""
    before_last = (len(plan.micro_steps_of(replica)) - 1) * plan.shard
    return len(blocks_in(plan.micro_batches_of(replica)[:before_last]))


def _extrapolate(
    simulated: list[dict[Any, Counter[str]]], depths: tuple[int, ...], num_layers: int
) -> dict[Any, Counter[str]]:
    """Extrapolate linearly from the sizes at the first and the last depth to `num_layers`."""
    first, last = simulated[0], simulated[-1]
    distance = (num_layers - depths[0]) / max(1, depths[-1] - depths[0])  # 0: first depth, 1: last depth
    extended: dict[Any, Counter[str]] = {}
    for key, kinds in last.items():
        sizes = {kind: size + (distance - 1) * (size - first[key][kind]) for kind, size in kinds.items()}
        extended[key] = Counter({kind: round(size) for kind, size in sizes.items()})
    return extended


def _simulate_step(config: TrainingConfig, context: DistributedContext) -> MemoryTracker:
    tracker = MemoryTracker()
    # the simulated run may be on GPUs, where the model takes other branches than on this CPU
    device = simulate_device(context.target_type)
    on_cpu = context.on_cpu()  # before tensors are fake, because it makes a mesh from real ones
    with fake_tensor_mode(), device, tracker, tracker.tracking_resizes():
        # the forward pass of stability_every needs less memory than a step
        train_step = build_train_step(replace(config, stability_every=None), on_cpu, draw=False)
        on_host = context.target_type == "cuda"  # whether the memory of the host is not that of the device
        for state in train_step.optimizer.state.values():
            for key, tensor in state.items():
                is_on_host = key == AVERAGE_KEY and config.ema_on_host and on_host
                tracker.record(tensor, HOST if is_on_host else "optimizer")
        _track_stages(train_step, tracker)
        _simulate_few_chunks(unwrap(train_step.model))
        share = train_step.share(0)
        windows = empty_windows(config, len(share.slots)).take_columns(share.columns)
        train_step.run(0, EmptyBatches(windows))
        for buffer in host_buffers(unwrap(train_step.model)) if on_host else ():
            tracker.record(buffer, PINNED)
        tracker.count_host_memory()  # before it is freed
    return tracker


class EmptyBatches:
    """Batches that are the same in every step."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def get(self, step: int) -> Windows:
        """Return the windows of any step."""
        return self.windows


class EmptyWindows(Windows):
    """Windows whose values are not read, because a simulated tensor has none."""

    @property
    def num_counted(self) -> int:
        """Return the number of all targets."""
        return len(self.tokens) * (self.tokens.shape[1] - 1)


def empty_windows(config: TrainingConfig, num_windows: int) -> Windows:
    """Return windows of the shapes and types that a run has, without data."""
    shape = (num_windows, config.context_len)
    return EmptyWindows(
        torch.zeros(num_windows, config.context_len + 1, dtype=torch.int32),
        torch.ones(shape, dtype=torch.bool) if config.counts_tokens else None,
        torch.zeros(shape, dtype=torch.int32) if config.document_mask else None,
    )


class FewChunks:
    """The loss of a chunk of tokens, which is computed for the first two chunks and the last two.

    The others only have memory for their results, because a long sequence has thousands of chunks.
    """

    def __init__(self, chunk_loss: ChunkLoss) -> None:
        self.chunk_loss = chunk_loss
        self.tokens = 0  # of this forward pass, not yet computed
        self.results: list[list[tuple[torch.Size, torch.dtype]]] = []  # shapes and types

    def begin(self, tokens: int) -> None:
        """Begin a forward pass with so many tokens."""
        self.tokens = tokens
        self.results.clear()

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return results of the shapes and types that the loss of the chunk has."""
        self.tokens -= len(targets)
        if len(self.results) < 2 or self.tokens <= len(targets):
            found = self.chunk_loss(logits, targets)
            self.results.append([(tensor.shape, tensor.dtype) for tensor in found])
            return found
        return tuple(logits.new_empty(shape, dtype=dtype) for shape, dtype in self.results[1])


def _simulate_few_chunks(model: Any) -> None:
    chunk_loss = FewChunks(model.lm_head.loss_piece)
    model.lm_head.loss_piece = chunk_loss
    model.lm_head.register_forward_pre_hook(lambda _, args: chunk_loss.begin(args[0].shape[:-1].numel()))


def _track_stages(train_step: TrainStep, tracker: MemoryTracker) -> None:
    """Let hooks on the model and the optimizer set the tracker's stage."""
    model: Any = unwrap(train_step.model)
    blocks = model.model.layers

    def enter(stage: str, *_: Any) -> None:
        if stage in ("forward", "update"):
            tracker.forward_passes += stage == "forward"
            for param in train_step.model.parameters():
                if param.grad is not None:
                    tracker.record(param.grad, "gradients")
        tracker.stage = stage

    def before_head(_: Any, args: tuple[Tensor, ...]) -> None:
        enter("head")
        args[0].register_hook(partial(enter, "backward: last block"))

    def before_last_block(_: Any, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(partial(enter, "backward: blocks between"))

    def after_first_block(_: Any, __: Any, output: Tensor) -> None:
        output.register_hook(partial(enter, "backward: first block"))

    model.register_forward_pre_hook(partial(enter, "forward"))
    blocks[0].register_forward_hook(after_first_block)
    blocks[-1].register_forward_pre_hook(before_last_block)
    model.lm_head.register_forward_pre_hook(before_head)
    train_step.optimizer.register_step_pre_hook(partial(enter, "update"))
