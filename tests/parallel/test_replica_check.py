"""Check fingerprints of tensors, and which ranks are named when replicas of a shard differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ranks import run_ranks
from tinytrain_dist.parallel.replica_check import _deviating_ranks, fingerprints, weighted_bit_sum


@pytest.mark.parametrize(
    "of",
    [lambda tensor: fingerprints([tensor]).item(), lambda tensor: weighted_bit_sum(tensor, 1 << 16).item()],
    ids=["CPU", "GPU"],
)
def test_a_fingerprint_sees_every_bit_and_every_exchange(of: Callable[[torch.Tensor], int]) -> None:
    """Check fingerprints for CPUs, and those for GPUs, which can also be computed on a CPU."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3, 100_000, generator=generator)  # more than one block of the sum
    expected = of(tensor)
    for place in (0, 1, 65_535, 65_536, 299_999):
        for bit in (0, 15, 31):
            tensor.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
            assert of(tensor) != expected
            tensor.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
    assert of(tensor) == expected
    assert of(tensor.flip(1)) != expected
    assert of(-tensor) != expected
    for size in (1, 4_096, 65_536, 131_072):
        blocks = tensor.view(-1)[: 2 * size].view(2, -1)
        assert of(blocks) != of(blocks.flip(0).contiguous()), f"blocks of {size} exchanged"


def test_a_fingerprint_on_a_gpu_needs_little_memory() -> None:
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.int64:
                self.largest = max(self.largest, out.nbytes)
            return out

    with Sizes() as sizes:
        weighted_bit_sum(torch.zeros(5 * 2**22 + 1))
    assert sizes.largest == 32 * 2**20, "not 128 MiB"


def test_fingerprints_are_of_what_is_in_a_tensor_not_of_how_it_lies() -> None:
    wide = torch.arange(12.0).view(3, 4)
    kinds = [wide[:, 1], torch.tensor(1.0), torch.zeros(5, dtype=torch.bool), torch.empty(0), wide.bfloat16()[1:, 1:]]
    alike = [kind.clone(memory_format=torch.contiguous_format) for kind in kinds]
    assert fingerprints(kinds).tolist() == fingerprints(alike).tolist()
    assert len(set(fingerprints(kinds).tolist())) == len(kinds)
    assert torch.stack([weighted_bit_sum(kind) for kind in alike]).shape == (len(kinds),)


@pytest.mark.parametrize(
    ("digests", "expected"),
    [
        ([(0, "a"), (1, "b"), (0, "a"), (1, "b")], ([], 0, True)),
        ([(0, "a"), (0, "x"), (0, "a")], ([1], 0, True)),
        ([(0, "x"), (0, "a"), (0, "a")], ([0], 1, True)),
        ([(0, "a"), (1, "b"), (0, "a"), (1, "x")], ([3], 1, False)),
        ([(0, "a"), (0, "b"), (0, "c"), (0, "d")], ([1, 2, 3], 0, False)),
        ([(0, "a"), (0, "b"), (0, "b"), (0, "c"), (0, "c")], ([1, 2, 3, 4], 0, False)),
    ],
)
def test_the_minority_is_named_and_without_one_the_lowest_rank_counts_as_right(
    digests: list[tuple[int, str]], expected: Any
) -> None:
    assert _deviating_ranks(digests) == expected


def differ_on_rank_two() -> str:
    """On one of three replicas: the error after one bit of one tensor has flipped on rank 2."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.errors import ReplicaMismatchError
    from tinytrain_dist.parallel.replica_check import check_replicas

    context = init_distributed("cpu").with_mesh(ParallelDims("ddp", 3, 1, ""))
    tensors = {"first": torch.ones(3), "second": torch.ones(3)}
    check_replicas(tensors.items(), context)
    if context.rank == 2:
        tensors["second"].view(torch.int32)[1] ^= 1
    try:
        check_replicas(tensors.items(), context)
    except ReplicaMismatchError as error:
        return str(error)
    return "no error"


@pytest.mark.multiprocess
def test_one_flipped_bit_is_found_on_all_ranks() -> None:
    for message in run_ranks(3, differ_on_rank_two):
        assert message.startswith("replicas differ: second on rank 2 (")
        assert "the bits differ from those on rank 0 (" in message
        assert "resume from the last checkpoint" in message
