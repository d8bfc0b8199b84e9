"""Check the fingerprints of tensors: every bit and every exchange of two values changes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tinytrain_dist.parallel.replica_check import fingerprints, weighted_bit_sum


@pytest.mark.parametrize(
    "of",
    [lambda tensor: fingerprints([tensor]).item(), lambda tensor: weighted_bit_sum(tensor, 1 << 16).item()],
    ids=["CPU", "GPU"],
)
def test_a_fingerprint_sees_every_bit_and_every_exchange(of: Callable[[torch.Tensor], int]) -> None:
    """Those of a CPU, and those of a GPU, whose sum can be taken anywhere."""
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


def test_fingerprints_are_of_what_is_in_a_tensor_not_of_how_it_lies() -> None:
    wide = torch.arange(12.0).view(3, 4)
    kinds = [wide[:, 1], torch.tensor(1.0), torch.zeros(5, dtype=torch.bool), torch.empty(0), wide.bfloat16()[1:, 1:]]
    alike = [kind.clone(memory_format=torch.contiguous_format) for kind in kinds]
    assert fingerprints(kinds).tolist() == fingerprints(alike).tolist()
    assert len(set(fingerprints(kinds).tolist())) == len(kinds)
    assert torch.stack([weighted_bit_sum(kind) for kind in alike]).shape == (len(kinds),)
