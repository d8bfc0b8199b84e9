"""Keep the inputs of checkpointed blocks in host memory between forward and backward.

With activation_checkpointing = "block", a block keeps nothing for backward but its input. Here forward copies that
input to the host while the block computes, and backward copies it back while the block behind it computes:

- The input of a block leaves the device when the next block begins, which waits for the copy.
- The last block keeps its input, because backward needs it at once.
- When a block begins its backward pass, the input of the block before it begins to arrive.

Every block has one buffer on the host, which is pinned for a GPU, and used again in every pass. All copies run on one
stream beside that of the computation; on a CPU, a copy is done as soon as it is started. Must not know what a block
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.distributed.torch_internals import wrap_calls


class HostCopies:
    """Copies between a device and its host: one after the other, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy after all work that is enqueued now; return what to pass to `wait` before either tensor is used."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copy: Any) -> None:
        """Let the work that is enqueued from now on wait for a copy. Does not block."""
        if copy is not None:
            torch.cuda.current_stream(self.device).wait_event(copy)


class BlockInput:
    """The input of one block, between the forward and the backward pass of a micro-batch."""

    def __init__(self, copies: HostCopies, before: BlockInput | None, stays: bool) -> None:
        """before: that of the block before this one. stays: it is not copied to the host."""
        self.copies = copies
        self.before = before
        self.stays = stays
        self.buffer: Tensor | None = None  # on the host
        self.passes = 0  # forward passes that have begun
        self.input: Tensor | None = None  # while the block saves tensors
        self.leaving: tuple[Tensor, Any] | None = None  # the input, and the copy that reads it
        self.arriving: tuple[Tensor, Any] | None = None  # its place on the device, and the copy that fills it

    def call(self, block: Callable[..., Any], *args: Any) -> Any:
        """Call the block, whose first argument is its input."""
        if not torch.is_grad_enabled():
            return block(*args)
        if self.before is not None:
            self.before.leave()
        self.passes += 1
        self.forget_copies()
        self.input = args[0]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return block(*args)
        finally:
            self.input = None

    def forget_copies(self) -> None:
        """Free what a pass that was not completed has on the device. A copy may still write there, so wait for it."""
        for unfinished in (self.leaving, self.arriving):
            if unfinished is not None:
                self.copies.wait(unfinished[1])
        self.leaving = self.arriving = None

    def pack(self, tensor: Tensor) -> Tensor | int:
        """Return what autograd keeps of a tensor that the block saves; instead of its input, the number of the pass."""
        if self.stays or self.input is None or not _is_same(tensor, self.input):
            return tensor
        if self.leaving is None:  # not if autograd saves it again
            if self.buffer is None or (self.buffer.shape, self.buffer.dtype) != (tensor.shape, tensor.dtype):
                self.buffer = torch.empty_like(tensor, device="cpu", pin_memory=self.copies.stream is not None)
            self.leaving = tensor, self.copies.start(self.buffer, tensor)
        return self.passes

    def leave(self) -> None:
        """Free the memory of the input on the device; what is enqueued from now on may use it."""
        if self.leaving is not None:
            _, copy = self.leaving
            self.copies.wait(copy)
            self.leaving = None

    def unpack(self, packed: Tensor | int) -> Tensor:
        """Return a tensor that the block has saved. Called when the block begins its backward pass."""
        if isinstance(packed, Tensor):
            tensor = packed
        else:
            assert packed == self.passes, "a block began another forward pass before this backward pass"
            tensor, copy = self.arrive()
            self.copies.wait(copy)
            self.arriving = None
        if self.before is not None:
            self.before.arrive()
        return tensor

    def arrive(self) -> tuple[Tensor, Any]:
        """Begin to copy the input back, unless this has begun; return its place on the device, and the copy."""
        if self.arriving is None:
            assert self.buffer is not None, "forward has copied the input"
            place = torch.empty_like(self.buffer, device=self.copies.device)
            self.arriving = place, self.copies.start(place, self.buffer)
        return self.arriving


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same view of the same memory, also if the memory is simulated."""

    def view(each: Tensor) -> tuple[Any, ...]:
        return each.untyped_storage()._cdata, each.storage_offset(), each.shape, each.stride()

    return view(tensor) == view(other)


def apply_activation_offload(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Keep the inputs of checkpointed blocks in host memory, in place. After compilation, before DDP or FSDP.

    blocks: in the order in which forward calls them. The first argument of each is the output of the one before it.
    """
    copies = HostCopies(device)
    before: BlockInput | None = None
    for block in blocks:
        before = BlockInput(copies, before, stays=block is blocks[-1])
        block.offloaded_input = before  # type: ignore[assignment]
        wrap_calls(block, before.call)


def host_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers on the host that the blocks of a model have used."""
    inputs = [vars(module).get("offloaded_input") for module in model.modules()]
    return [each.buffer for each in inputs if each is not None and each.buffer is not None]
