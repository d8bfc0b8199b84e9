"""Owns the rehearsal of a step: the real code on tensors without memory, and what each moment would hold and send.

Must not know devices, their sizes or their speed, nor the architecture: sizes come from running it, not from formulas.
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
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.collectives import uses_gloo
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.distributed.fake_backend import NoCommunication
from tinytrain_dist.model import matmul
from tinytrain_dist.parallel.wrappers import unwrap

# Blocks are equal, so what each moment holds is linear in their number: deep models are rehearsed with these and drawn
# out (measured: exact). Fewer would not show a block in the middle, whose neighbours FSDP gathers early and frees late.
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
GATHER_OPERATIONS = re.compile(r"allgather|^send|^recv")  # over gloo they are messages
USABLE_MEMORY = 0.92  # of a device's memory: the rest is lost to fragments and to libraries' work space


class Allocation:
    """Memory of one storage; `reference` tells when it ends."""

    __slots__ = ("kind", "nbytes", "reference")

    def __init__(self, kind: str) -> None:
        self.kind, self.nbytes = kind, 0
        self.reference: Any = None


class MemoryTracker(NoCommunication):
    """Notes each storage that comes or goes while it is on, with the moment; sends nothing."""

    def __init__(self) -> None:
        """Starts at the moment "weights"; set `moment` to name the next one."""
        super().__init__()
        self.moment = "weights"
        self.events: list[tuple[str, int, Allocation]] = []
        self.passes = 0  # forward passes begun
        self._messages: list[tuple[int, str, int, tuple[int, ...]]] = []  # pass, operation, bytes, ranks of the group
        self._blocks: dict[int, Allocation] = {}
        self._resize = torch.UntypedStorage.resize_

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it made."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        gathers = func.namespace == "fsdp" and "gather" in func.__name__
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.note(value, "gathered" if gathers else None)
        return out

    def message(self, name: str, tensors: list[Tensor], ranks: tuple[int, ...]) -> None:
        """Note what would be sent; its buffers are the reduction's, or gathered weights."""
        for tensor in tensors:
            self.note(tensor, "gathered" if GATHER_OPERATIONS.search(name) else "reduction")
        self._messages.append((self.passes, name, max(tensor.nbytes for tensor in tensors), ranks))

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Know the tensor's storage from now on; `kind` says better than the moment what it is."""
        storage = local_tensor(tensor).untyped_storage()
        block = self._block(storage, storage.nbytes())
        block.kind = kind or block.kind

    def _block(self, storage: Any, nbytes: int) -> Allocation:
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Allocation(self.moment.partition(":")[0])
            block.reference = weakref.ref(storage, lambda _: self._size(self._blocks.pop(key), 0))
        self._size(block, nbytes)
        return block

    def _size(self, block: Allocation, nbytes: int) -> None:
        if nbytes != block.nbytes:
            self.events.append((self.moment, nbytes - block.nbytes, block))
            block.nbytes = nbytes

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Note storages that are resized in place, which is how FSDP frees and takes back gathered weights."""

        def resize(storage: Any, nbytes: int) -> Any:
            result = self._resize(storage, nbytes)
            self._block(storage, nbytes).kind = "gathered"
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def sent(self, passes: int) -> dict[tuple[int, ...], Counter[str]]:
        """Bytes of a step of so many passes, by ranks of the group and operation."""
        sums: dict[tuple[int, ...], Counter[str]] = {}
        for number, name, nbytes, ranks in self._messages:
            repeats = passes - 1 if number == 1 and self.passes > 1 else 1
            sums.setdefault(ranks, Counter())[name] += nbytes * repeats
        return sums

    def peaks(self) -> dict[str, Counter[str]]:
        """What each moment held at its highest: bytes by kind."""
        live: Counter[str] = Counter()
        peaks: dict[str, Counter[str]] = {}
        total, highest = 0, dict[str, int]()
        for moment, change, block in self.events:
            if moment not in peaks:  # it begins with what the one before it left
                highest[moment], peaks[moment] = total, live.copy()
            live[block.kind] += change
            total += change
            if total > highest[moment]:
                highest[moment], peaks[moment] = total, live.copy()
        return peaks


def memory_row(name: str, nbytes: float) -> str:
    """One line of a table of memory."""
    return f"  {name:<40}{nbytes / 2**30:>9.3f} GiB"


@dataclass(frozen=True)
class MemoryEstimate:
    """What one rank holds at each moment of a step (bytes by kind) and what it sends in a step."""

    moments: dict[str, Counter[str]]
    sent: dict[tuple[int, ...], dict[str, int]]  # ranks of a group -> operation -> bytes in a step

    @property
    def peak(self) -> str:
        """The moment that holds most."""
        return max(self.moments, key=lambda moment: self.moments[moment].total())

    @property
    def nbytes(self) -> int:
        """The most that is held at once."""
        return self.moments[self.peak].total()

    def table(self) -> str:
        """What is held at the peak, one kind a line, the largest first."""
        held = self.moments[self.peak]
        rows = [memory_row(MEMORY_KINDS[kind], size) for kind, size in held.most_common() if size > 0]
        return "\n".join([*rows, memory_row(f"at the peak ({self.peak})", self.nbytes)])


def estimate_memory(config: TrainingConfig, context: DistributedContext, double: Any) -> MemoryEstimate:
    """Rehearse a step of `config` on the context's layout. `double`: an Engine that was not built.

    Runs in this process alone, sends nothing and takes no memory. Compiled blocks are rehearsed as if they were not: a
    compiled run holds at most this.
    """
    assert context.parallel_dims is not None, "with_mesh comes first"
    plan = BatchPlan.make(config, context.parallel_dims)
    few = replace(config, compile=False, batch_size=config.batch_size // plan.accumulation_steps)
    if plan.accumulation_steps > 1:  # the first pass leaves gradients behind, the second meets them; the rest is alike
        few = replace(few, batch_size=2 * few.batch_size)
    depths = (config.num_layers,) if config.num_layers <= SIMULATED_DEPTHS[1] else SIMULATED_DEPTHS
    rehearsals = [_simulate_step(replace(few, num_layers=depth), context, double) for depth in depths]
    moments = _extrapolate([ledger.peaks() for ledger in rehearsals], depths, config.num_layers)
    if config.reproducible:  # the counter keeps one sum per binary digit of the passes that are done
        held = max(0, (plan.accumulation_steps - 1).bit_length() - 1) * moments["update"]["gradients"]
        moments = {moment: kinds + Counter(gradients=held) for moment, kinds in moments.items()}
    sent = _extrapolate([ledger.sent(plan.accumulation_steps) for ledger in rehearsals], depths, config.num_layers)
    return MemoryEstimate(moments, {ranks: dict(names) for ranks, names in sent.items()})


def _extrapolate(found: list[dict[Any, Counter[str]]], depths: tuple[int, ...], layers: int) -> dict[Any, Counter[str]]:
    """The line through what two depths gave, at `layers`."""
    first, last = found[0], found[-1]
    steps = (layers - depths[0]) / max(1, depths[-1] - depths[0])  # from the first, in units of what lies between
    drawn: dict[Any, Counter[str]] = {}
    for key, kinds in last.items():
        drawn[key] = Counter({k: round(n + (steps - 1) * (n - first[key][k])) for k, n in kinds.items()})
    return drawn


def _simulate_step(config: TrainingConfig, context: DistributedContext, double: Any) -> MemoryTracker:
    from torch._subclasses.fake_tensor import FakeTensorMode  # costs a second, and most runs do not need it

    double.config, double.context, double.batches = config, context.on_cpu(), EmptyBatches(double)
    ledger = MemoryTracker()
    # the CPU that rehearses a run on GPUs may compute bf16 otherwise than they do
    widened = mock.patch.object(matmul, "CPU_LACKS_BF16", matmul.CPU_LACKS_BF16 and uses_gloo())
    with FakeTensorMode(), widened, ledger, ledger.resizes():
        double.assemble(draw=False)
        for state in double.optimizer.state.values():
            for tensor in state.values():
                ledger.note(tensor, "optimizer")
        _track_stages(double, ledger)
        double.train_step()
    return ledger


class EmptyBatches:
    """Batches without data."""

    def __init__(self, double: Any) -> None:
        self.double = double

    def get(self, step: int) -> Tensor:
        """The rows of any step."""
        return torch.empty(len(self.double.slots), self.double.config.context_len + 1, dtype=torch.int32)


def _track_stages(double: Any, ledger: MemoryTracker) -> None:
    """Let the ledger know which moment of the step it is."""
    model: Any = unwrap(double.model)
    blocks = model.model.layers

    def enter(moment: str, *_: Any) -> None:
        if moment in ("forward", "update"):
            ledger.passes += moment == "forward"
            for param in double.model.parameters():
                if param.grad is not None:
                    ledger.note(param.grad, "gradients")
        ledger.moment = moment

    def before_head(_: Any, args: tuple[Tensor, ...]) -> None:
        enter("head")
        args[0].register_hook(partial(enter, "backward: last block"))

    def before_last(_: Any, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(partial(enter, "backward: blocks between"))

    def after_first(_: Any, __: Any, output: Tensor) -> None:
        output.register_hook(partial(enter, "backward: first block"))

    model.register_forward_pre_hook(partial(enter, "forward"))
    blocks[0].register_forward_hook(after_first)
    blocks[-1].register_forward_pre_hook(before_last)
    model.lm_head.register_forward_pre_hook(before_head)
    double.optimizer.register_step_pre_hook(partial(enter, "update"))
