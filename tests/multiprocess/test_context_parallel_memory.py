"""Check what a rank keeps for backward if ranks share sequences: it falls as 1 / cp, except for what is named here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.multiprocess

# The proportions of Llama 3, with heads and columns for up to 4 ranks. With 4, the 2 key heads are repeated. What does
# not fall to 1 / cp: the result of attention is kept before and after it is exchanged, and on a CPU keys and values are
# kept beside those that are repeated for each query head.
SIZES: dict[str, Any] = {
    "device": "cpu",
    "parallel": "none",
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_model": 32,
    "d_ff": 112,
    "vocab_size": 64,
    "context_len": 256,
    "batch_size": 4,
    "micro_batch_size": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "all activations": {},
    "inputs of blocks": {"activation_checkpointing": "block"},
    "documents": {"document_mask": True},
}


def kept_by_rank(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """On a rank: return the bytes that one forward pass keeps for backward, by case and kind."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
    from tinytrain_dist.training.train_step import build_train_step

    context = init_distributed("cpu")
    ranks = context.world_size
    kept = {}
    for name, settings in cases.items():
        config = TrainingConfig(**SIZES, **settings, cp=ranks)
        step = build_train_step(config, context.with_mesh(choose_parallel_dims(config, ranks, ranks)))
        kept[name] = kept_by_forward(step)
    return kept


def kept_by_forward(step: Any) -> dict[str, int]:
    """Run one micro-step, and return the bytes of all storages that its forward pass saves, by kind."""
    import torch

    from tinytrain_dist.parallel.wrappers import unwrap
    from tinytrain_dist.training.memory_estimate import empty_windows
    from tinytrain_dist.training.micro_steps import micro_steps

    head = unwrap(step.model).lm_head.weight
    weights = {param.untyped_storage()._cdata for param in step.model.parameters()}
    whole = step.config.context_len
    saved: dict[int, tuple[str, int]] = {}

    def record(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kind = "activations"
        if storage._cdata in weights:
            kind = "weights"
        elif tensor.shape == head.shape:
            kind = "gradient of the head"  # the head computes it in forward
        elif tensor.shape[-2:] == (whole, whole):
            kind = "mask"
        saved[storage._cdata] = kind, storage.nbytes()
        return tensor

    share = step.share(0)
    windows = empty_windows(step.config, len(share.slots)).take_columns(share.columns)
    _, _, micro_batch = next(iter(micro_steps(share, windows, step.context.device)))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = step.model(*micro_batch)
    loss.backward()
    sums: dict[str, int] = {}
    for kind, nbytes in saved.values():
        sums[kind] = sums.get(kind, 0) + nbytes
    return sums


@pytest.fixture(scope="module")
def kept() -> dict[int, dict[str, dict[str, int]]]:
    """Return what a rank keeps, by cp, case and kind."""
    by_cp = {}
    for cp in (1, 2, 4):
        first, *others = run_ranks(cp, kept_by_rank, CASES)
        assert all(other == first for other in others), "ranks keep equally much"
        by_cp[cp] = first
    return by_cp


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cp", [2, 4])
def test_activations_fall_as_the_ranks_that_share_a_sequence(
    kept: dict[int, dict[str, dict[str, int]]], case: str, cp: int
) -> None:
    alone, shared = kept[1][case]["activations"], kept[cp][case]["activations"]
    print(f"{case}, cp {cp}: {alone:,} bytes alone, {shared:,} on each rank")
    assert shared == pytest.approx(alone / cp, rel=0.1)


def test_weights_the_gradient_of_the_head_and_a_mask_do_not_fall(kept: dict[int, dict[str, dict[str, int]]]) -> None:
    for case in CASES:
        for cp in (2, 4):
            alone, shared = kept[1][case], kept[cp][case]
            assert {**alone, "activations": 0} == {**shared, "activations": 0}
    # an element for each pair of positions of each window of the micro-batch
    assert kept[4]["documents"]["mask"] == 4 * 2 * 256 * 256
    assert kept[4]["all activations"]["gradient of the head"] == 4 * 64 * 32
