"""Offload of the inputs of blocks changes no bits, and frees them on the device between forward and backward."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit_all, settings_for
from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing
from tinytrain_dist.parallel.activation_offload import BlockInput, HostCopies, apply_activation_offload, host_buffers


class Block(nn.Module):
    """A block that also saves a tensor which is no input of a block before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = x + self.linear(x).tanh() * scale
        return y


class Recorded(HostCopies):
    """Copies that are recorded when they start, and when something waits for them."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self.log = log

    def start(self, target: Tensor, source: Tensor) -> Any:
        self.log.append("start")
        return super().start(target, source)

    def wait(self, copy: Any) -> None:
        self.log.append("wait")
        super().wait(copy)


def blocks_of(number: int, offload: bool) -> list[Block]:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(number)]
    for block in blocks:
        apply_activation_checkpointing(block, "block")
    if offload:
        apply_activation_offload(blocks, torch.device("cpu"))
    return blocks


def gradients(blocks: list[Block], passes: int = 2) -> list[Tensor]:
    """Run some passes, and return the gradients of all weights and of the last pass's input."""
    scale = torch.linspace(0.5, 1, 4)
    for number in range(passes):
        x = inputs = torch.full((3, 4), 0.1 * (number + 1), requires_grad=True)
        for block in blocks:
            x = block(x, scale)
        x.square().sum().backward()
    assert inputs.grad is not None
    return [param.grad for block in blocks for param in block.parameters() if param.grad is not None] + [inputs.grad]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_gradients_are_equal_bit_for_bit(number: int) -> None:
    expected, found = gradients(blocks_of(number, False)), gradients(blocks_of(number, True))
    assert len(expected) == 2 * number + 1
    assert all(map(torch.equal, found, expected))


def test_the_inputs_of_all_blocks_but_the_last_are_on_the_host_only() -> None:
    model = nn.Sequential(*blocks_of(4, True))

    def forward() -> tuple[Tensor, list[Any]]:
        """Return the result, and references to the memory of the inputs."""
        x = torch.ones(3, 4, requires_grad=True) * 1
        inputs = []
        for block in model:
            inputs.append(weakref.ref(x.untyped_storage()))
            x = block(x, torch.ones(4))
            assert [each() is not None for each in inputs[:-2]] == [False] * len(inputs[:-2])
        return x, inputs

    y, inputs = forward()
    assert [each() is not None for each in inputs] == [False, False, False, True]
    buffers = host_buffers(model)
    assert [buffer.shape for buffer in buffers] == [(3, 4)] * 3
    y.sum().backward()
    assert inputs[-1]() is None
    forward()
    again = host_buffers(model)
    assert [buffer.data_ptr() for buffer in again] == [buffer.data_ptr() for buffer in buffers], "they are used again"


def test_copies_run_while_a_block_computes() -> None:
    log: list[str] = []
    copies = Recorded(log)
    x = torch.ones(3, 4, requires_grad=True)
    before: BlockInput | None = None
    for number, block in enumerate(blocks_of(3, False)):
        block.linear.register_forward_pre_hook(lambda *_, number=number: log.append(f"block {number}"))
        before = BlockInput(copies, before, stays=number == 2)
        x = before.call(block, x, torch.ones(4))
    assert log == ["start", "block 0", "wait", "start", "block 1", "wait", "block 2"]
    log.clear()
    x.sum().backward()
    # backward computes each block again; the input of the block before it is then on its way
    assert log == ["start", "block 2", "wait", "start", "block 1", "wait", "block 0"]


def test_a_second_forward_before_backward_is_an_error_and_not_another_gradient() -> None:
    blocks = blocks_of(2, True)
    scale = torch.ones(4)

    def forward() -> Tensor:
        x = torch.ones(3, 4, requires_grad=True)
        for block in blocks:
            x = block(x, scale)
        return x.sum()

    first = forward()
    second = forward()
    second.backward()
    with pytest.raises(AssertionError, match="another forward pass"):
        first.backward()


def test_a_pass_waits_for_copies_of_a_backward_pass_that_failed() -> None:
    log: list[str] = []
    copies = Recorded(log)
    blocks = blocks_of(2, False)
    first = BlockInput(copies, None, stays=False)
    last = BlockInput(copies, first, stays=True)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = last.call(blocks[1], first.call(blocks[0], x, torch.ones(4)), torch.ones(4))
        return y

    def fail(*_: Any) -> None:
        raise ValueError("backward fails")

    y = forward(torch.ones(3, 4, requires_grad=True))
    hook = blocks[1].linear.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="backward fails"):
        y.sum().backward()
    hook.remove()
    assert first.arriving is not None
    log.clear()
    forward(torch.ones(3, 4, requires_grad=True))
    # before the memory that the failed pass copies into is used again
    assert log == ["wait", "start", "wait"]


def test_an_input_of_another_type_is_not_converted() -> None:
    blocks = blocks_of(2, True)
    for dtype in (torch.bfloat16, torch.float64):
        for block in blocks:
            block.to(dtype)
        x = torch.ones(3, 4, dtype=dtype, requires_grad=True)
        blocks[1](blocks[0](x, torch.ones(4, dtype=dtype)), torch.ones(4, dtype=dtype)).sum().backward()
        assert [buffer.dtype for buffer in host_buffers(nn.Sequential(*blocks))] == [dtype]


def test_an_evaluation_between_forward_and_backward_copies_nothing() -> None:
    blocks = blocks_of(2, True)
    with torch.no_grad():
        blocks[1](blocks[0](torch.ones(3, 4), torch.ones(4)), torch.ones(4))
    assert host_buffers(nn.Sequential(*blocks)) == []
    x = torch.ones(3, 4, requires_grad=True)
    y = blocks[1](blocks[0](x, torch.ones(4)), torch.ones(4))
    with torch.no_grad():
        blocks[1](blocks[0](torch.zeros(3, 4), torch.ones(4)), torch.ones(4))
    y.sum().backward()
    found = x.grad
    x.grad = None
    plain = blocks_of(2, False)
    plain[1](plain[0](x, torch.ones(4)), torch.ones(4)).sum().backward()
    assert found is not None
    assert x.grad is not None
    assert torch.equal(found, x.grad)


# ---------------------------------------------------------------- runs

SETTINGS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 3,
    "total_steps": 3,
    "eval_every": 3,
    "ckpt_every": 3,
    "reproducible": True,
    "activation_checkpointing": "block",
    "optimizer": "muon",
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"none": {"parallel": "none"}},
    2: {
        "ddp": {"parallel": "ddp"},
        "fsdp": {"parallel": "fsdp", "document_mask": False},
        "cp": {"parallel": "fsdp", "cp": 2},
    },
}


@pytest.mark.multiprocess
def test_runs_have_equal_bits(tmp_path: Path) -> None:
    for ranks, layouts in LAYOUTS.items():
        variants = [
            settings_for(tmp_path, f"{name} {offload}", **SETTINGS, **mesh, activation_offload=offload)
            for name, mesh in layouts.items()
            for offload in (False, True)
        ]
        run_ranks(ranks, fit_all, variants)
    for layouts in LAYOUTS.values():
        for name in layouts:
            stays, moves = Run(tmp_path / f"{name} False"), Run(tmp_path / f"{name} True")
            assert moves.digests() == stays.digests(), name
            assert moves.values("train", "loss") == stays.values("train", "loss"), name
            assert moves.values("eval", "loss") == stays.values("eval", "loss"), name


def compiled_gradients() -> tuple[list[bool], int, int]:
    """On a rank: whether gradients of a compiled model are equal with offload; the buffers; the graphs."""
    from tests.helpers.models import KINDS, random_model, some_ids
    from tinytrain_dist.parallel.compile import apply_compile, compiled_graph_count

    ids = some_ids(KINDS["gqa"])
    grads: list[list[Tensor | None]] = []
    for offload in (False, True):
        model: Any = random_model(KINDS["gqa"])
        for block in model.model.layers:
            apply_activation_checkpointing(block, "block")
        apply_compile(model)
        if offload:
            before = compiled_graph_count()
            apply_activation_offload(list(model.model.layers), torch.device("cpu"))
        for _ in range(2):
            model(ids, ids).backward()
        grads.append([param.grad for param in model.parameters()])
    equal = [torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None and b is not None]
    return equal, len(host_buffers(model)), compiled_graph_count() - before


@pytest.mark.multiprocess
def test_compiled_blocks_offload_their_inputs_too() -> None:
    ((equal, buffers, graphs),) = run_ranks(1, compiled_gradients)
    assert all(equal)
    assert len(equal) > 10
    assert buffers == 1  # of two blocks, the last one keeps its input
    assert graphs <= 2
