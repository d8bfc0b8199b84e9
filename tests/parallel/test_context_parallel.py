"""Attention whose sequences are divided among ranks equals attention of whole sequences, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.parallel.context_parallel import placement_problem

pytestmark = pytest.mark.multiprocess

# (query heads, key/value heads, type, whether documents are separated)
CASES = [
    (4, 4, "float32", False),
    (4, 1, "float32", True),  # fewer key heads than ranks
    (12, 3, "float32", False),  # ranks do not divide the key heads
    (4, 2, "bfloat16", False),
]
POSITIONS, HEAD_WIDTH, BATCH = 12, 4, 2


def compare_with_whole(cases: list[tuple[int, int, str, bool]]) -> list[list[float]]:
    """On a rank: return the largest differences of output and gradients of q, k and v on this rank's positions."""
    from tinytrain_dist.distributed.context import CONTEXT, init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.model.attention import CausalAttention
    from tinytrain_dist.model.document_mask import dense_mask
    from tinytrain_dist.parallel.context_parallel import HeadExchange

    context = init_distributed("cpu")
    context = context.with_mesh(ParallelDims("none", 1, 1, "", context.world_size))
    group = context.group(CONTEXT)
    assert group is not None
    width = POSITIONS // context.world_size
    own = slice(context.rank * width, (context.rank + 1) * width)
    exchange: Any = HeadExchange(CausalAttention(), group)
    differences = []
    for heads, key_heads, dtype, documents in cases:
        generator = torch.Generator().manual_seed(3)
        shapes = [(BATCH, count, POSITIONS, HEAD_WIDTH) for count in (heads, key_heads, key_heads, heads)]
        *inputs, weights = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
        mask = None
        if documents:
            starts = torch.rand(BATCH, POSITIONS, generator=generator) < 0.3
            mask = dense_mask(starts.cumsum(dim=1), inputs[0].dtype)
        whole = [tensor.clone().requires_grad_() for tensor in inputs]
        parts = [tensor[:, :, own].clone().requires_grad_() for tensor in inputs]
        y = CausalAttention()(*whole, mask)
        (y * weights).sum().backward()
        # one graph, or an error; compiled kernels are not needed to see that
        attend = torch.compile(exchange, fullgraph=True, backend="aot_eager") if heads == 12 else exchange
        y_part = attend(*parts, mask)
        (y_part * weights[:, :, own]).sum().backward()
        pairs = [(y[:, :, own], y_part)]
        pairs += [(tensor.grad[:, :, own], part.grad) for tensor, part in zip(whole, parts, strict=True)]  # type: ignore[index]
        differences.append([float((a - b).abs().max()) for a, b in pairs])
    return differences


def logits_of_parts() -> dict[str, list[float]]:
    """On a rank: return the largest differences from a model alone, for this rank's columns and for whole sequences."""
    from tests.helpers.models import KINDS, random_model, some_ids
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.parallel.context_parallel import apply_context_parallel, whole_sequences

    context = init_distributed("cpu")
    context = context.with_mesh(ParallelDims("none", 1, 1, "", context.world_size))
    config = KINDS["gqa"]
    ids = some_ids(config)
    documents = torch.arange(ids.shape[1]).expand(len(ids), -1) // 7
    columns = torch.arange(ids.shape[1]).chunk(context.world_size)[context.rank]
    alone, model = random_model(config), random_model(config)
    apply_context_parallel(model, context)
    differences: dict[str, list[float]] = {"columns": [], "whole": []}

    def compare() -> None:
        for separated in (None, documents):
            y, y_part = alone(ids, documents_bt=separated), model(ids[:, columns], documents_bt=separated)
            differences["columns"].append(float((y[:, columns] - y_part).abs().max().detach()))

    compare()
    with whole_sequences(model):
        differences["whole"].append(float((alone(ids) - model(ids)).abs().max().detach()))
    compare()
    return differences


def test_a_model_computes_its_columns_and_whole_sequences_to_generate_text() -> None:
    for differences in run_ranks(2, logits_of_parts):
        assert max(differences["columns"]) < 1e-5
        assert differences["whole"] == [0.0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchanged_heads_give_the_attention_of_whole_sequences(ranks: int) -> None:
    for rank, differences in enumerate(run_ranks(ranks, compare_with_whole, CASES)):
        for case, found in zip(CASES, differences, strict=True):
            assert max(found) < (1e-5 if case[2] == "float32" else 5e-2), (rank, case, found)


def refused_placement(hosts: list[str]) -> str:
    """On a rank of a host: return why the ranks cannot share sequences by twos."""
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.parallel.context_parallel import check_placement

    context = init_distributed("cpu")
    try:
        check_placement(replace(context, host=hosts[context.rank]), 2)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_share_sequences_are_on_one_node() -> None:
    assert placement_problem(["a", "a", "b", "b"], 2) == ""
    assert placement_problem(["a", "b", "a", "b"], 4).startswith("cp: ranks 0 to 3 share sequences, and must be on one")
    assert placement_problem(["a", "a", "a", "b"], 2).startswith("cp: ranks 2 to 3 share")
    for found in run_ranks(2, refused_placement, ["b", "a"]):
        assert "they are on a, b; give the ranks of a node consecutive numbers" in found
